"""The rows of our own features in Plan, in the order in which they act, and what is known beforehand of their declines."""

from typing import Any

import comfy.sample

from .. import archs
from .attention import AttentionFeature
from .attention_around import AroundAttention, KeyFeature
from .blocks import BlockFeature, positions
from .compose import LISTED
from .forward import ModelFeature, NetworkFeature, PartFeature
from .plan_words import Row, ranges
from .run import Feature


def rows(features: tuple[Feature, ...], model: Any) -> list[Row]:
    """Of every feature one row, at the stage where it first acts; inside a stage the outermost first."""
    staged = [(stage_of(feature), feature) for feature in features]
    found = []
    for stage in ("run", "call", "network", "blocks", "attention"):
        found += [row(feature, stage, model) for feature in ordered(stage, [f for s, f in staged if s == stage])]
    return found


def stage_of(feature: Feature) -> str:
    if isinstance(feature, PartFeature | ModelFeature):
        return "call"
    if isinstance(feature, NetworkFeature):
        return "network"
    if isinstance(feature, BlockFeature):
        return "blocks"
    return "attention" if isinstance(feature, AttentionFeature | AroundAttention | KeyFeature) else "run"


def ordered(stage: str, features: list[Any]) -> list[Any]:
    """Who is asked first. Each hook is put around the earlier ones, so the newest one is; see forward.py, blocks.py and
    attention.py."""
    newest = features[::-1]
    if stage == "blocks":
        return sorted(newest, key=lambda f: f.inner)
    if stage == "attention":
        return sorted(newest, key=lambda f: 2 - isinstance(f, AroundAttention) - 2 * isinstance(f, KeyFeature))
    if stage == "call":
        return [*(f for f in features if isinstance(f, PartFeature)),
                *(f for f in newest if not isinstance(f, PartFeature))]  # fmt: skip
    return features


def row(feature: Feature, stage: str, model: Any) -> Row:
    network = model.get_model_object("diffusion_model")
    arch = archs.find(network)
    stack = positions(arch, network) if arch is not None else []
    percent = getattr(feature, "sigma_percent", None) or getattr(feature, "percents", None)
    if percent is None and hasattr(feature, "end_percent"):
        percent = (0.0, feature.end_percent)
    made = Row(stage, "Tessera", feature.name, feature.plan(), feature.node)
    if stack and isinstance(feature, BlockFeature | AttentionFeature | AroundAttention):
        made.blocks, made.of = ranges(sorted(blocks_of(feature, len(stack)))), len(stack)
    if percent is not None:
        sampling = model.get_model_object("model_sampling")
        made.percent = [float(p) for p in percent]
        made.sigma = [float(sampling.percent_to_sigma(p)) for p in percent]
    if feature.inactive:
        made.state, made.why = "inactive", feature.inactive
    elif getattr(feature, "off", False) or getattr(feature, "strength", 1.0) == 0:
        made.state, made.why = "off", "its settings leave the MODEL as it is"
    return made


def blocks_of(feature: Any, count: int) -> set[int]:
    """Numbers of the stack's blocks at which a feature may act."""
    first, last = getattr(feature, "dense_blocks", None) or (
        getattr(feature, "first_blocks", 0),
        getattr(feature, "last_blocks", 0),
    )
    chosen = getattr(feature, "blocks", None)
    return {n for n in range(first, count - last) if chosen is None or n in chosen}


def declines(features: tuple[Feature, ...], model: Any, latent: dict[str, Any] | None) -> list[str]:
    """What our nodes on this MODEL will leave undone, as far as it is known before a run."""
    diffusion_model = model.get_model_object("diffusion_model")
    arch = archs.find(diffusion_model)
    found = [f"{f.name} does nothing on this MODEL: {f.inactive}" for f in features if f.inactive]
    plans = [f for f in features if isinstance(f, AttentionFeature) and not f.inactive]
    for feature in features:
        found += foreseen(feature, features, model)[0]
    if arch is None:
        return found
    kinds = {kind for spec in arch.blocks if spec.stack for kind in spec.calls}
    for plan in plans:
        if plan.scope not in ("all", *kinds):
            offered = " and ".join(sorted(kinds & {"self", "joint"})) or "other"
            found.append(
                f"{plan.name} has scope {plan.scope}, and attention of {arch.name} is {offered}: all is declined"
            )
    grid = token_grid(model, latent)
    if grid is not None:
        tokens = grid[0] * grid[1] * grid[2]
        found += [
            f"{plan.name} declines every call: {tokens:,} image tokens are fewer than its min_tokens {plan.min_tokens:,}"
            for plan in plans
            if tokens < plan.min_tokens
        ]
    return found + overlaps(plans, len(positions(arch, diffusion_model)))


def token_grid(model: Any, latent: dict[str, Any] | None) -> tuple[int, int, int] | None:
    """(frames, rows, columns) of the image tokens of a LATENT, where the family tells."""
    arch = archs.find(model.get_model_object("diffusion_model"))
    if latent is None or arch is None:
        return None
    ratios = latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"], *ratios)
    samples = samples.unbind()[0] if getattr(samples, "is_nested", False) else samples
    try:
        return arch.grid(model.get_model_object("diffusion_model"), samples)
    except (IndexError, TypeError, AttributeError, ValueError, RuntimeError):  # no latent of this family
        return None


def overlaps(plans: list[AttentionFeature], count: int) -> list[str]:
    """Who serves first where two attention nodes are offered the same calls."""
    found = []
    for i, newer in enumerate(reversed(plans)):
        for older in [*reversed(plans)][i + 1 :]:
            shared = blocks_of(newer, count) & blocks_of(older, count)
            start = max(newer.sigma_percent[0], older.sigma_percent[0])
            end = min(newer.sigma_percent[1], older.sigma_percent[1])
            scopes = {newer.scope, older.scope} - {"all"}
            if shared and start < end and len(scopes) < 2:
                found.append(
                    f"{newer.name} is asked before {older.name} in blocks {ranges(sorted(shared))} from {start:.0%} to {end:.0%} of the "
                    f"schedule: {older.name} gets there what {newer.name} declines"
                )
    return found


def refused(features: tuple[Feature, ...], model: Any) -> list[str]:
    """Why a run on this MODEL will stop at its start."""
    options = model.model_options.get("transformer_options", {})
    acting = [f for f in features if not f.inactive]
    found = [sentence for f in acting if (sentence := f.refuses(options))]
    for i, one in enumerate(acting):
        for other in acting[:i]:
            sentence = one.conflicts(other) or other.conflicts(one)
            if sentence:
                found.append(sentence)
        found += foreseen(one, features, model)[1]
    return [*dict.fromkeys(found)]


def foreseen(feature: Feature, features: tuple[Feature, ...], model: Any) -> tuple[list[str], list[str]]:
    """Without the words of a refusal that point at the plan itself."""
    if feature.inactive:
        return [], []
    declined, stops = feature.foreseen(tuple(f for f in features if f is not feature), model)
    return [s.removesuffix(f" {LISTED}") for s in declined], [s.removesuffix(f" {LISTED}") for s in stops]
