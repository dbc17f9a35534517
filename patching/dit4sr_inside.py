"""What DiT4SR does inside a block, where 2 N tokens run: the picture's, behind them the low-resolution ones."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import comfy.ops
import torch

from ..kernels.control.cross_stream_conv import cross_stream_conv
from .run import Feature, current_forward


@dataclass
class Call:
    """One call of the model, while it lasts."""

    rows: torch.Tensor  # the low-resolution tokens [B, N, D] as the last block left them
    grid: list[int]  # their H, W
    last: int = -1  # number of the block that was computed last
    inside: int | None = None  # and of the one being computed
    residuals: dict[str, torch.Tensor] = field(default_factory=dict)  # by attention: what its projections took of them

    @property
    def tokens(self) -> int:
        return self.rows.shape[1]


Act = Callable[[Call, torch.Tensor, Callable], torch.Tensor]  # (call, the module's input, its forward) -> its output


def acts(control, conv_scale: float, legacy: bool) -> Iterator[tuple[str, Act]]:
    """(path of a module below the image's half of a block, what it does while the low-resolution tokens are there).
    control: the block's ControlBlock."""
    yield "mlp.act", partial(_mixed, control.control_conv, conv_scale)
    for name in ("attn", "attn2"):
        layers = getattr(control, name)
        if layers is not None:
            yield f"{name}.qkv", partial(_projected, layers, name)
            yield f"{name}.proj", partial(_left, layers, name)
            if legacy:
                yield f"{name}.ln_k", _copied


class Inside:
    """Stands in for the forward of a module in a block. Inert but where the low-resolution tokens are in that block."""

    def __init__(self, original, feature: Feature, number: int, act: Act):
        self.original, self.feature, self.number, self.act = original, feature, number, act

    def __call__(self, x, *args, **kwargs):
        forward = current_forward.get()
        call = None if forward is None else forward.held.get(self.feature)
        if call is None or call.inside != self.number:
            return self.original(x, *args, **kwargs)
        return self.act(call, x, self.original)


def _projected(layers, name: str, call: Call, x: torch.Tensor, original) -> torch.Tensor:
    """x [B, 2 N, D] -> q, k, v [B, 2 N, 3 D]."""
    made, n = original(x), call.tokens
    call.residuals[name] = x[:, n:]
    return torch.cat((made[:, :n], layers.projected(made[:, n:])), 1)


def _left(layers, name: str, call: Call, x: torch.Tensor, original) -> torch.Tensor:
    """What attention gave [B, 2 N, D] -> its output projection."""
    n = call.tokens
    return torch.cat((original(x[:, :n]), layers.to_out_control(x[:, n:] + call.residuals[name])), 1)


def _copied(call: Call, k: torch.Tensor, original) -> torch.Tensor:
    """Keys [B, 2 N, H, d] -> normed; those of the low-resolution tokens are the image's, normed twice, as v1 has them."""
    own = original(k[:, : call.tokens])
    return torch.cat((own, original(own)), 1)


def _mixed(conv, scale: float, call: Call, x: torch.Tensor, original) -> torch.Tensor:
    """Hidden activations [B, 2 N, 4 D] before the GELU -> behind it, with the convolution."""
    n = call.tokens
    weight, bias, stream = comfy.ops.cast_bias_weight(conv, x, offloadable=True)
    out = torch.cat(cross_stream_conv(x[:, :n], x[:, n:], weight, bias, call.grid, scale, "tanh"), 1)
    comfy.ops.uncast_bias_weight(conv, weight, bias, stream)
    return out
