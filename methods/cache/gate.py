"""Gates: what decides, evaluation by evaluation, whether the model has to be computed.

A gate sees the first stream of an evaluation's first call, so joined and separate CFG decide alike, and its decision
holds for every call of that evaluation. It is asked at each evaluation, also where warm-up, tail or another rule forces
it to be computed, so that what it remembers never has a gap.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Seen:
    """What a gate may look at. Tensors belong to the run: clone what is kept, as models write into theirs.

    At the level of blocks, [b, N, D] (or as the model lays its image stream out): `before` the first block and `now`,
    after the node's `first_blocks` blocks. At the level of the whole model both are its input, [b, C, (T,) H, W].
    """

    step: int  # of the sampler, from 0
    evaluation: int  # of the run, or since its last restart, from 0
    x: float  # step or sigma, whichever the node extrapolates over
    sigma: float
    before: torch.Tensor | None = None
    now: torch.Tensor | None = None
    modulated: Callable[[], torch.Tensor | None] = lambda: None  # the first block's input under its modulation
    every: torch.Tensor | None = None  # `now` of every stream of the call, where it has an axis for the batch
    axis: int = 0  # of the batch in `now`, -1 where it has none


class Gate:
    """One policy's memory of one run, of one context window. `error` is what it measured last, for the report."""

    error: float | None = None

    def computes(self, seen: Seen, forced: bool) -> bool:
        """Whether this evaluation is computed. `forced`: it is in any case; the gate only takes note."""
        raise NotImplementedError

    def computed(self, seen: Seen, made: torch.Tensor) -> None:
        """A computed evaluation is over: `made` is the output of the stack, or the velocity or noise that the model
        predicted, of the same stream."""

    @property
    def facts(self) -> dict[str, Any]:
        """What the report says of it beside the decisions, JSON-ready."""
        return {}

    @property
    def bytes_held(self) -> int:
        return sum(value.nbytes for value in self.__dict__.values() if isinstance(value, torch.Tensor))


MakeGate = Callable[[], Gate]
Setup = Callable[[Any], MakeGate | None]  # of a run; None where the policy never skips
