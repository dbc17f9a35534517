"""The functions of _reference.py on Triton kernels: heads of up to 256, fp32, fp16 and bf16."""

from functools import lru_cache

import torch

from .. import _config
from .._triton import triton
from ._gradients import linear_gradient, linear_rows
from ._kernels import MAPS, NORMS, linear_apply, linear_scan, linear_state
from ._reference import rows_like

LONGEST = 256  # head size: wider states leave no room for a tile, and matrix products of the reference are efficient
PIECE = 1024  # tokens that one program sums; a function of nothing but the chunk, so that a continued clip is bit-equal


def serves(x: torch.Tensor, v: torch.Tensor) -> bool:
    return x.dtype != torch.float64 and max(x.shape[3], v.shape[3]) <= LONGEST


@lru_cache(maxsize=64)
def _spans(bounds: tuple[int, ...], size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [P, 3] (chunk, first, end) of pieces of at most `size` tokens; the first piece of each chunk, [C + 1]."""
    pieces, groups = [], [0]
    for chunk, (first, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        pieces += [(chunk, n, min(n + size, end)) for n in range(first, end, size)]
        groups.append(len(pieces))
    table = torch.tensor(pieces, dtype=torch.int32, device=device)
    return table, torch.tensor(groups, dtype=torch.int32, device=device)


def padded(d: int) -> int:
    return max(16, 1 << (d - 1).bit_length())


def _tile(kind: str, x: torch.Tensor, d: int, e: int) -> dict:
    """Constants and options of the launch of `kind` for head sizes d, e."""
    tuned = _config.lookup(kind, x, padded(d))
    bn, be = tuned["tile"]
    sizes = {"D": d, "E": e, "BD": padded(d), "BN": bn, "BE": min(be, padded(e))}
    return sizes | {"num_warps": tuned["warps"], "num_stages": tuned["stages"]}


def _ready(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _halves(feature_map: str) -> int:
    return 2 if feature_map == "hedgehog" else 1


def state(x, rotated, v, bounds, feature_map, start=None, grad=None, factor=None, slope=None, reverse=False):
    x, v = _ready(x), _ready(v)
    xr = x if rotated is None else _ready(rotated)
    (b, h, n, d), e, chunks = x.shape, v.shape[3], len(bounds) - 1
    spans, groups = _spans(tuple(bounds), PIECE, x.device)
    halves, pieces = _halves(feature_map), len(spans)
    width = halves * d * (e + 1)
    part = x.new_empty(b, h, pieces, width, dtype=torch.float32)
    tile = _tile("linear_state", x, d, e)
    rows = (spans, spans) if factor is None else (factor.contiguous(), slope.contiguous())
    gain = 2.0 ** (n.bit_length() - 1)  # the factor is about 1 / n
    linear_state[(pieces * triton.cdiv(e, tile["BE"]), h * halves, b)](
        x, xr, v, *rows, part, spans, gain, pieces, n, width, *x.stride()[:3], *xr.stride()[:3], *v.stride()[:3],
        MAP=MAPS[feature_map], HALVES=halves, DUAL=rotated is not None, WEIGHTED=factor is not None, **tile,
    )  # fmt: skip
    total = x.new_empty(b, h, chunks, width, dtype=torch.float32)
    block = min(1024, padded(width))
    linear_scan[(triton.cdiv(width, block), b * h)](
        part, groups, part if start is None else start.contiguous(), part if grad is None else grad.contiguous(), total,
        pieces, chunks, width, STARTED=start is not None, GIVEN=grad is not None, REVERSE=reverse, BLOCK=block,
    )  # fmt: skip
    return total


def apply(x, rotated, state, bounds, feature_map, normalizer, eps, width):
    (b, h, n, d), out = x.shape, rows_like(x, width)
    x = _ready(x)
    xr = x if rotated is None else _ready(rotated)
    share = x.new_empty(b, h, n, dtype=torch.float32)
    tile = _tile("linear_apply", x, d, width)
    spans, _ = _spans(tuple(bounds), tile["BN"], x.device)
    linear_apply[(len(spans), h, b)](
        x, xr, state, out, share, spans, eps, state.shape[2], state.shape[3], n,
        *x.stride()[:3], *xr.stride()[:3], *out.stride()[:3],
        MAP=MAPS[feature_map], HALVES=_halves(feature_map), DUAL=rotated is not None, NORM=NORMS[normalizer], **tile,
    )  # fmt: skip
    return out, share


def rows(grad, out, share, normalizer):
    grad, norm, (b, h, n, e) = _ready(grad), NORMS[normalizer], grad.shape
    passed = rows_like(grad, e) if norm == 2 else grad
    slope = torch.empty_like(share)
    linear_rows[(triton.cdiv(n, 32), h, b)](
        grad, out, share, slope, passed, n, *grad.stride()[:3], *out.stride()[:3], *passed.stride()[:3],
        E=e, BE=padded(e), BN=32, NORM=norm, num_warps=4,
    )  # fmt: skip
    return slope, passed


def gradient(x, v, state, bounds, feature_map, dual, factor=None, slope=None):
    (b, h, n, d), dx = x.shape, rows_like(x, x.shape[3])
    rotated = rows_like(x, d) if dual else dx
    x, v = _ready(x), _ready(v)
    tile = _tile("linear_gradient", x, d, v.shape[3])
    spans, _ = _spans(tuple(bounds), tile["BN"], x.device)
    linear_gradient[(len(spans), h, b)](
        x, v, state, spans if factor is None else factor, spans if factor is None else slope, dx, rotated, spans,
        state.shape[2], state.shape[3], n,
        *x.stride()[:3], *v.stride()[:3], *dx.stride()[:3], *rotated.stride()[:3],
        MAP=MAPS[feature_map], HALVES=_halves(feature_map), DUAL=dual, WEIGHTED=factor is not None, **tile,
    )  # fmt: skip
    return dx, (rotated if dual else x.new_empty(0))
