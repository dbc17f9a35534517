"""One thing to measure."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Run = Callable[[], Any]


@dataclass
class Case:
    name: str  # the stem of the file, or of the operator
    title: str  # sizes in words
    ours: Run
    truth: Run | None  # what ours must agree with; None: its kernel has a row of its own
    tolerance: float  # relative L2
    rivals: dict[str, Run] = field(default_factory=dict)
    bars: dict[str, float] = field(default_factory=dict)  # rival: how many times faster ours must be
    flush: bool = False  # memory bound: the cache is emptied before each call on a GPU
    facts: dict[str, float] = field(default_factory=dict)  # pairs, computed, flops: shares of dense attention's
    outputs: int = 1  # how many outputs are compared with the truth
    same: dict[str, Run] = field(default_factory=dict)  # rivals of the same operation: what they must agree with
    left_out: dict[str, str] = field(default_factory=dict)  # rivals that are not there: why

    def add(self, name: str, run: Run, truth: Run) -> None:
        """A rival that computes the same, perhaps over other lists, and the truth over its own."""
        self.rivals[name], self.same[name] = run, truth
