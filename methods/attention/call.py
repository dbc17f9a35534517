"""What an attention method sees and answers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from ...archs import Kind, Layout
from .picture import Picture


class Decline(Exception):
    """Raised by a method that leaves a call to the next plan; the message is the reason that reports count."""


@dataclass(frozen=True)
class AttentionCall:
    """One call. q [B, H, N, D]; k, v [B, Hkv, M, D], grouped heads not expanded; RoPE already applied."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None  # additive or bool, broadcast to [B, H, N, M]
    scale: float
    kind: Kind
    layout: Layout | None  # None where the call is not image self-attention of a known shape
    block: Any  # its place in the residual stack: .number of .count
    forward: Any  # the call of the diffusion model it belongs to: .run.clock, .keys (streams of the batch rows)

    def places(self) -> Layout:
        """The layout. Decline where it is unknown, or queries and keys are not its tokens."""
        if self.layout is None:
            raise Decline("token layout unknown")
        if (self.q.shape[2], self.k.shape[2]) != (self.layout.total, self.layout.total):
            raise Decline("queries and keys are not the same tokens")
        return self.layout

    def key_bias(self) -> torch.Tensor | None:
        """The mask as an additive bias over keys [B, M] fp32. ValueError where it differs between queries or heads."""
        if self.mask is None:
            return None
        mask = self.mask
        if mask.shape[-2] != 1 or mask.shape[1] != 1:
            first = mask[:, :1, :1]
            if not torch.equal(mask, first.expand_as(mask)):
                raise ValueError("attention mask differs between queries")
            mask = first
        bias = mask[:, 0, 0]
        if bias.dtype == torch.bool:
            bias = torch.zeros(bias.shape, device=bias.device).masked_fill(~bias, float("-inf"))
        return bias.float().expand(self.q.shape[0], -1)

    def served_bias(self) -> torch.Tensor | None:
        """key_bias(), Decline where it cannot be told."""
        try:
            return self.key_bias()
        except ValueError as reason:
            raise Decline(str(reason)) from reason


@dataclass(frozen=True)
class Answer:
    """What a method computed: out [B, H, N, D], and query-key pairs summed over rows and heads. picture: draws the mask
    of this call; asked at once or never, and only of few calls."""

    out: torch.Tensor
    pairs: float
    dense_pairs: float
    picture: Callable[[], Picture] | None = None


class AttentionMethod(Protocol):
    """An attention method: immutable settings, state only in what `begin` returns. It may also have check(arch, stack,
    chosen), which raises ValueError for a MODEL of these blocks that it must not serve; held_bytes(elements, head_dim,
    dtype), bytes that one block keeps on the device for elements = B N H D of output; facts(state), numbers for the
    report; line(facts), words for the node; wants_rotation, to find the model's RoPE table in call.forward.rotation;
    typical(state, call), whether this call may stand for the run where it is timed against dense attention.

    spatial: it means nothing where tokens have no places, as in a set of points; such a model is refused."""

    spatial: ClassVar[bool]

    def begin(self) -> Any:
        """What the method keeps during one sampling run."""

    def attend(self, state: Any, call: AttentionCall) -> Answer:
        """Serves the call, or raises Decline."""
