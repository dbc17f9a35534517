"""What a run's evaluations were, one after the other: when each began, what was decided, what became of every block.
Floats and letters on the host; no tensor is asked for anything."""

import time
from dataclasses import dataclass, field
from typing import Any

MOST = 512  # evaluations noted of a run
COMPUTED, PASSED, FILLED, MIXED, UNSEEN = b"cpfm."  # a block was run; passed by; filled in; each in some call; none
KINDS = ("full", "partial", "merged", "region", "reuse", "forecast")  # the further behind, the more was left out
ELSEWHERE = "elsewhere"  # another pack's node answered in place of the model


@dataclass
class BlockRows:
    """A letter for each block [count] of each evaluation."""

    rows: dict[int, bytearray] = field(default_factory=dict)

    def note(self, evaluation: int, block: Any, letter: int) -> None:
        if evaluation not in self.rows:
            if evaluation >= MOST:
                return
            self.rows[evaluation] = bytearray([UNSEEN]) * block.count
        self.rows[evaluation][block.number] = letter

    def share(self, evaluation: int, block: Any, pairs: float, dense: float) -> None:
        """Of the attention pairs of a call, as a digit: tenths."""
        self.note(evaluation, block, b"0123456789"[min(9, int(10 * pairs / max(dense, 1.0)))])

    def words(self, start: int, end: int) -> list[str]:
        """One word an evaluation, "" where no block was seen; nothing where that is so of all."""
        words = [self.rows.get(i, b"").decode("ascii") for i in range(start, end)]
        return words if any(words) else []


@dataclass
class Column:
    """One evaluation."""

    step: int
    sigma: float
    began: float  # on the clock of the run
    forwards: int  # of the run when it began
    seconds: float | None = None  # until the next one began
    kind: str = "full"

    def told(self) -> list[Any]:
        seconds = None if self.seconds is None else round(self.seconds, 5)
        return [self.step, round(self.sigma, 5), self.kind, seconds]


@dataclass
class Timeline:
    columns: list[Column] = field(default_factory=list)
    blocks: BlockRows = field(default_factory=BlockRows)
    missed: int = 0  # evaluations beyond MOST
    open: bool = False  # whether the newest column's evaluation goes on

    def begin(self, run: Any) -> None:
        """The run's clock has told a new evaluation, for which core has waited for the one before to end."""
        now = time.perf_counter()
        self.end(run, now)
        if len(self.columns) >= MOST:
            self.missed += 1
            return
        self.columns.append(Column(run.clock.step, run.clock.sigma, now, run.forwards))
        self.open = True

    def end(self, run: Any, now: float) -> None:
        """Closes the newest column."""
        if self.open:
            column, self.open = self.columns[-1], False
            column.seconds = now - column.began
            column.kind = decided(run, len(self.columns) - 1) if run.forwards > column.forwards else ELSEWHERE

    def block(self, evaluation: int, block: Any, letter: int) -> None:
        """What one call made of a block; another call of the same evaluation may have made something else of it."""
        row = self.blocks.rows.get(evaluation)
        before = UNSEEN if row is None else row[block.number]
        self.blocks.note(evaluation, block, letter if before in (UNSEEN, letter) else MIXED)

    def told(self, start: int = 0) -> dict[str, Any]:
        """The columns from `start` on, JSON-ready."""
        columns = self.columns[start:]
        return {
            "from": start,
            "columns": [column.told() for column in columns],
            "blocks": self.blocks.words(start, start + len(columns)),
            "missed": self.missed,
        }


def decided(run: Any, evaluation: int) -> str:
    """What the evaluation that ends was, by the feature that left out the most."""
    kinds = ["full"]
    for feature in run.acting:
        state = run.states.get(feature)
        decisions = getattr(state, "decisions", ())
        if decisions and getattr(state, "evaluation", -1) == evaluation:
            kinds.append(decisions[-1]["kind"])
    return max(kinds, key=lambda kind: KINDS.index(kind) if kind in KINDS else len(KINDS))
