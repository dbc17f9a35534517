"""What every cache notes of a run: one entry an evaluation, and where restarts begin."""

from dataclasses import dataclass, field
from typing import Any

from .run import Run


@dataclass(kw_only=True)
class Evaluations:
    evaluation: int = -1  # of the newest entry of decisions
    restarts: int = 0
    decisions: list[dict[str, Any]] = field(default_factory=list)

    def begins(self, run: Run) -> bool:
        """Whether this is the first call of a new evaluation; then its entry is made, as a computed one."""
        clock = run.clock
        if self.evaluation == clock.evaluation:
            return False
        self.evaluation = clock.evaluation
        if clock.restarts != self.restarts:
            self.restarts = clock.restarts
            self.restarted(run)
        self.decisions.append({"step": clock.step, "sigma": round(clock.sigma, 6), "kind": "full"})
        return True

    def restarted(self, run: Run) -> None:
        """The run went back to a noisier sigma: what was kept serves no more."""
        raise NotImplementedError
