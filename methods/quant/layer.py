"""One Linear layer, quantized as a whole, and its product in plain torch:

    y = A((x / s) R) Q((W s - U D) R)' + x (D / s)' U' + bias

s smooths, R rotates, A rounds each token, Q is the packed weight and U D the low-rank branch, which sees the layer's own
input: `down` holds D / s already.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...kernels.quant.packed import Packed, decode
from .adaptive import ROUNDS as QUICK
from .adaptive import Choice, choose, importance_of
from .calibration import LayerStatistics
from .codebook import Fit, check_weight
from .formats import find
from .low_rank import split
from .rotation import KINDS, Rotation, block_of, rotation
from .round_trip import activations, quantize, weights
from .smooth import ALPHAS

RANK = 32


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """packed: the codes of the smoothed, rotated weight (without the branch). activations: kind of rounding of the input.
    smooth [K]; up [N, r] and down [r, K]; fit: of the codes; choice: how rotation and smoothing were found."""

    packed: Packed
    fit: Fit
    activations: str
    rotation: Rotation
    smooth: torch.Tensor | None = None
    up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    choice: Choice | None = None

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] -> [..., N], in fp32 and rounded once to x's dtype."""
        inner = x.float()
        y = inner if self.smooth is None else inner / self.smooth
        y = activations(self.rotation.apply(y), self.activations) @ decode(self.packed).T
        if self.up is not None and self.down is not None:
            y = y + (inner @ self.down.float().T) @ self.up.float().T
        return (y if bias is None else y + bias.float()).to(x.dtype)

    def weight(self) -> torch.Tensor:
        """What the layer's weight [N, K] comes back as, fp32: without the rounding of activations."""
        w = self.rotation.undo(decode(self.packed))
        w = w if self.smooth is None else w / self.smooth
        return w if self.up is None or self.down is None else w + self.up.float() @ self.down.float()


def quantize_layer(
    weight: torch.Tensor,
    format: str,
    kind: str = "none",
    group: int | None = None,
    rotate: str = "auto",
    alphas: Sequence[float] = ALPHAS,
    statistics: LayerStatistics | None = None,
    rank: int = RANK,
    seed: int = 0,
) -> QuantizedLayer:
    """weight [N, K] in one of our own formats. kind: of activations. rotate: "auto" chooses by measured error, any other is
    taken wherever its blocks fit and the layer goes without elsewhere. alphas: of smoothing to choose from (with statistics
    only), () for none. rank: of svdquant_int4's branch. ValueError for what does not go together."""
    check_weight(weight)
    known = find(format)
    size, kind = known.check_group(group), known.check_activations(kind)
    if known.owner != "tessera":
        raise ValueError(f"{format} is stored by ComfyUI's own layouts; this packs the formats of this pack.")
    choice = _choice(weight, format, kind, size or weight.shape[1], rotate, alphas, statistics, seed)
    turn, smooth = choice.rotation, choice.smooth
    squares = None if statistics is None or not statistics.count else statistics.mean_square.to(weight.device)
    importance = importance_of(squares, turn, smooth)
    w = weight.float() if smooth is None else weight.float() * smooth
    up = down = None
    if known.branch and rank > 0:
        up, down = _branch(w, format, size, turn, smooth, squares, rank, seed)
        w = w - up.float() @ down.float()
        down = down if smooth is None else (down.float() / smooth).to(down.dtype)
    packed, fit = quantize(turn.apply(w), format, size or weight.shape[1], importance)
    return QuantizedLayer(packed, fit, kind, turn, smooth, up, down, choice)


def _choice(weight, format: str, kind: str, group: int, rotate: str, alphas, statistics, seed: int) -> Choice:
    """What `rotate` says: measured, or this one where its blocks fit."""
    if rotate == "auto":
        return choose(weight, format, kind, group, statistics, alphas=alphas, seed=seed)
    if rotate not in KINDS:
        raise ValueError(f"Unknown rotation {rotate!r}. Known are auto, {', '.join(KINDS)}.")
    if rotate == "zigzag_hadamard" and (statistics is None or not statistics.count):
        raise ValueError("zigzag_hadamard sorts channels by their magnitudes; connect a calibration or choose another.")
    if statistics is not None and len(statistics.rows) and alphas:
        return choose(weight, format, kind, group, statistics, (rotate,), alphas, seed)
    fits = rotate == "none" or block_of(rotate, weight.shape[1])
    amax = None if statistics is None else statistics.amax
    return Choice(rotation(rotate if fits else "none", weight.shape[1], amax, seed))


def _branch(w, format: str, group: int, turn: Rotation, smooth, squares, rank: int, seed: int):
    """up [N, r] and down [r, K] of the smoothed weight, in the 16 bit that they are stored in."""
    importance = importance_of(squares, turn, smooth)

    def round_trip(residual: torch.Tensor) -> torch.Tensor:
        return turn.undo(weights(turn.apply(residual), format, group, importance, QUICK)[0])

    plain = importance_of(squares, Rotation("none"), smooth)
    up, down, _ = split(w, rank, round_trip, plain, seed=seed)
    return up.to(torch.bfloat16), down.to(torch.bfloat16)
