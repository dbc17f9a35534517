"""The accelerators that Accelerate tries, as settings in JSON and as features on a MODEL. All keep stock weights."""

import math
from collections.abc import Sequence
from typing import Any

from ..methods.attention.local_window import LocalWindow
from ..methods.attention.sparse_linear import SparseLinear
from . import compose
from .attention import AttentionFeature
from .cache_blocks import StackCache
from .cache_output import OutputCache
from .run import Feature, Unserved
from .sparse_linear import NAME as SPARSE_LINEAR
from .sparse_linear import SparseLinearFeature

Setting = dict[str, Any]
INTERVALS = (2, 3, 4, 5, 6, 8)
ORDERS = (1, 2)  # 2 follows curves that 1 cuts
TOPK = (0.5, 0.3, 0.2)
REACHES = (2, 3, 4)  # parts of the picture's longer side that a window's radius takes
FEWEST_TOKENS = 1024  # of an image, below which sparse attention is not tried
NOTHING = (
    f"nothing can be tried here; caches are from 6 steps on, sparse attention from {FEWEST_TOKENS:,} image tokens on"
)
LEVELS = {"last_block": StackCache, "output": OutputCache}
KIND = {"taylor": "cache", "sparse_linear": "attention", "local_window": "attention", "packed": "weights"}


def ladders(grid: tuple[int, int, int] | None, steps: int, known: bool, packed: bool) -> dict[str, list[list[Setting]]]:
    """Of every kind its settings, mildest first. known: whether the model's blocks are."""
    level = "last_block" if known else "output"
    intervals = [n for n in INTERVALS if 2 * n <= steps - 2]
    found = {"cache": [[taylor(n, order, steps, level) for n in intervals] for order in ORDERS]}
    if grid is not None and math.prod(grid) >= FEWEST_TOKENS:
        found["attention"] = [[sparse(k) for k in TOPK], [window(r, grid) for r in radii(grid)]]
    if packed:
        found["weights"] = [[{"method": "packed", "name": "packed weights"}]]
    return {kind: several for kind, several in found.items() if any(several)}


def taylor(interval: int, order: int, steps: int, level: str) -> Setting:
    """Taylor Cache; short runs warm up for less."""
    warmup = 3 if steps >= 12 else 2 if steps >= 8 else 1
    return {"method": "taylor", "name": f"Taylor Cache {interval}, order {order}", "interval": interval,
            "order": order, "warmup": warmup, "tail_full": 1, "level": level}  # fmt: skip


def sparse(topk: float) -> Setting:
    return {"method": "sparse_linear", "name": f"Sparse-Linear Attention {topk:g}", "topk": topk}


def window(radius: int, grid: tuple[int, int, int]) -> Setting:
    frames = max(2, grid[0] // 4) if grid[0] > 1 else 0
    return {"method": "local_window", "name": f"Local Window Attention {radius}", "radius": radius,
            "temporal_radius": frames}  # fmt: skip


def radii(grid: tuple[int, int, int]) -> list[int]:
    side = max(grid[1:])
    return sorted({max(2, round(side / part)) for part in REACHES}, reverse=True)


def feature_of(setting: Setting, node: str | None) -> Feature | None:
    """The feature of a setting; None for packed weights, which are a MODEL. ValueError where the setting is unknown or
    one of its numbers lies outside what its node takes."""
    method = setting.get("method")
    if method == "packed":
        return None
    if method == "taylor":
        _within(setting, interval=(1, 20), order=(0, 4), warmup=(0, 100), tail_full=(0, 10))
        level = setting.get("level")
        if not isinstance(level, str) or level not in LEVELS:
            raise ValueError(f"This stack asks for the cache level {level!r}, not one of {', '.join(LEVELS)}.")
        kept = {name: setting[name] for name in ("interval", "order", "warmup", "tail_full")}
        return LEVELS[level](node, name="Taylor Cache", given={**kept, "level": level}, **kept)
    if method == "sparse_linear":
        _within(setting, topk=(0.01, 1.0))
        plan = SparseLinear(float(setting["topk"]), "main", 0.1, "softmax", 0, 0, True, "auto", None)
        return SparseLinearFeature(node, SPARSE_LINEAR, method=plan, min_tokens=0)
    if method == "local_window":
        _within(setting, radius=(1, 512), temporal_radius=(0, 512))
        plan = LocalWindow(setting["radius"], "circle", setting["temporal_radius"], 4, "auto", False)
        return AttentionFeature(node, "Local Window Attention", method=plan, min_tokens=0)
    raise ValueError(f"This stack asks for {method!r}, which this version of Tessera does not know. Update it.")


def _within(setting: Setting, **bounds: tuple[float, float]) -> None:
    for name, (low, high) in bounds.items():
        value, whole = setting.get(name), isinstance(low, int)
        right = type(value) is int if whole else type(value) in (int, float)
        if not right or not low <= value <= high:  # type: ignore[operator]
            raise ValueError(f"This stack has {name} {value!r}; it goes from {low} to {high}.")


def features_of_stack(parts: dict[str, Setting], node: str | None) -> tuple[Feature, ...]:
    """In the order in which nodes would put them on the MODEL: attention first, the cache around it."""
    ordered = [(kind, parts[kind]) for kind in ("weights", "attention", "cache") if kind in parts]
    made = [(kind, setting["method"], feature_of(setting, node)) for kind, setting in ordered]
    for kind, method, _ in made:
        if KIND[method] != kind:
            raise ValueError(f"This stack has {method} as its {kind}. Make one with Accelerate.")
    return tuple(feature for _, _, feature in made if feature is not None)


def served(several: Sequence[Sequence[Setting]], present, model) -> tuple[list[list[Setting]], list[str]]:
    """(the ladders that can act on this MODEL beside the features present, why the others cannot)."""
    kept, declined = [], []
    for ladder in several:
        try:
            for setting in ladder:
                feature = feature_of(setting, None)
                if feature is not None:
                    compose.joins(present, feature, model)
            kept.append(list(ladder))
        except (Unserved, ValueError) as sentence:
            declined.append(str(sentence))
    return kept, declined
