"""The low-rank branch beside a quantized weight, x down' up', which every layout of ours may have: LoRA lie in it."""

from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedLayout, QuantizedTensor


class BranchLayout(QuantizedLayout):
    """A layout whose Params have down [r, K] and up [N, r], or None in both. Weights of it are made elsewhere."""

    QUANTIZES_INPUT = False

    @classmethod
    def quantize(cls, tensor: torch.Tensor, **kwargs: Any):
        raise NotImplementedError(
            f"{cls.__name__} quantizes nothing: Quantize Model does, and LoRA lie beside a weight."
        )

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        return qtensor._qdata, *(getattr(qtensor._params, name) for name in qtensor._params._tensor_fields())


def fits(down: torch.Tensor | None, up: torch.Tensor | None, rows: int, columns: int) -> bool:
    """Whether they make up a branch of a weight [rows, columns]; two times None is none."""
    if down is None or up is None:
        return down is up
    return up.shape[0] == rows and down.shape[1] == columns and up.shape[1] == down.shape[0]


def added(weight: torch.Tensor, params: Any) -> torch.Tensor:
    """A dense weight fp32 [N, K] with its branch, in params.orig_dtype."""
    if params.up is not None:
        weight = weight + params.up.float() @ params.down.float()
    return weight.to(params.orig_dtype)


def joined(params: Any, down: torch.Tensor, up: torch.Tensor) -> dict[str, torch.Tensor]:
    """down [r, K], up [N, r] beside the branch that is there already, as fields of Params."""
    if params.down is not None:
        down = torch.cat((params.down.to(down), down))
        up = torch.cat((params.up.to(up), up), dim=1)
    return {"down": down, "up": up}


def branch(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """x [..., K] -> what the branch adds to the output [..., N]."""
    linear = torch.nn.functional.linear
    return linear(linear(x, down.to(x)), up.to(x))
