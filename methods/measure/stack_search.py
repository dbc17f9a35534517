"""Which stack of accelerators is best within a loss, or at a wanted speed-up, found in a few trial runs: one ladder of
each kind, mildest first, climbed on top of the best stack so far."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

GAIN = 1.02  # times faster that a stack must be to be worth its loss
LATER = 2  # trials at most for climbing the first ladder anew on top of the others
Setting = dict[str, Any]


@dataclass(frozen=True)
class Stack:
    """Settings by kind ("cache", "attention", "weights"), each one a JSON object; no settings: the plain MODEL."""

    parts: dict[str, Setting] = field(default_factory=dict)

    def with_part(self, kind: str, setting: Setting) -> "Stack":
        return Stack({**self.parts, kind: setting})

    @property
    def name(self) -> str:
        return " + ".join(part["name"] for part in self.parts.values()) or "plain"


@dataclass(frozen=True)
class Tried:
    """A stack that was run. ratio: times faster than the plain MODEL; loss: 0 equal, 1 nothing alike."""

    stack: Stack
    ratio: float
    loss: float
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Goal:
    """Exactly one is set: the largest loss, under which the fastest stack is wanted, or a speed-up, which is wanted at the
    least loss."""

    loss: float | None = None
    ratio: float | None = None

    def met(self, tried: Tried) -> bool:
        if tried.stack.parts and tried.ratio < GAIN:
            return False  # no faster than the plain MODEL
        return tried.loss <= self.loss if self.loss is not None else tried.ratio >= self.ratio  # type: ignore[operator]

    def harder(self, tried: Tried) -> bool:
        """Whether a stronger setting is to be tried after this one."""
        return tried.loss <= self.loss if self.loss is not None else tried.ratio < self.ratio  # type: ignore[operator]

    def better(self, a: Tried, b: Tried | None) -> bool:
        """Whether a serves the goal better than b."""
        if b is None or self.met(a) != self.met(b):
            return b is None or self.met(a)
        if self.loss is not None:
            return a.ratio > b.ratio * GAIN if self.met(a) else a.loss < b.loss
        return a.loss < b.loss if self.met(a) else a.ratio > b.ratio * GAIN


def front(tried: Sequence[Tried]) -> list[Tried]:
    """Those that nothing beats in both speed and loss, slowest first."""
    return sorted(
        (t for t in tried if not any(_beats(o, t) for o in tried)), key=lambda t: (t.ratio, -t.loss, t.stack.name)
    )


def _beats(a: Tried, b: Tried) -> bool:
    return a.ratio >= b.ratio and a.loss <= b.loss and (a.ratio > b.ratio or a.loss < b.loss)


def best(tried: Sequence[Tried], goal: Goal) -> Tried:
    """The plain run, which comes first, where no stack is faster than it within the loss. A wanted speed-up that none
    reaches gives the fastest one."""
    found = tried[0]
    for t in tried[1:]:
        faster = t.ratio >= GAIN and (goal.loss is None or t.loss <= goal.loss)
        if faster and (not found.stack.parts or goal.better(t, found)):
            found = t
    return found


Search = Generator[Stack, Tried, None]


def search(goal: Goal, ladders: dict[str, Sequence[Sequence[Setting]]]) -> Search:
    """Yields the stacks to run, and is sent what each one gave. ladders: of every kind its settings, mildest first, in
    several ladders where methods exclude each other. The caller ends it when its trials are used up."""
    held: Tried | None = None
    for kind, several in ladders.items():
        base, found = held, held
        for nth, ladder in enumerate(several):
            at = min(1, len(ladder) - 1) if base is None else 0  # beside others the mildest one first
            above = _rung(several[nth - 1], found, kind) if nth else -1  # the ladder before tells where to go on
            low = at = at if above < 0 else min(above + 1, len(ladder) - 1)
            found = yield from _climb(goal, kind, ladder, base, found, at, 0 if above < 0 else low)
        held = found
    kind = next(iter(ladders), "")
    if held is not None and len(held.stack.parts) > 1 and kind in held.stack.parts:
        yield from _neighbours(goal, kind, ladders[kind], held)


def _rung(ladder: Sequence[Setting], found: Tried | None, kind: str) -> int:
    """Of the setting found, in the ladder; -1 where it is not one of its."""
    setting = found.stack.parts.get(kind) if found else None
    return list(ladder).index(setting) if setting is not None and setting in ladder else -1


def _climb(
    goal: Goal, kind: str, ladder: Sequence[Setting], base: Tried | None, found: Tried | None, at: int, low: int
) -> Generator[Stack, Tried, Tried | None]:
    """Halves the ladder above `low`, from rung `at`, until it knows the best; gives the best so far."""
    high = len(ladder) - 1
    while low <= high:
        tried = yield (base.stack if base else Stack()).with_part(kind, ladder[at])
        improved = goal.better(tried, found)
        found = tried if improved else found
        if goal.harder(tried) and (improved or base is None):
            low = at + 1
        elif goal.harder(tried):
            break  # stronger here is not faster there
        else:
            high = at - 1
        at = (low + high + 1) // 2
    return found


def _neighbours(goal: Goal, kind: str, several: Sequence[Sequence[Setting]], held: Tried) -> Search:
    """The rungs beside the one that was held, now that others stand on it."""
    ladder = next((rungs for rungs in several if held.stack.parts[kind] in rungs), ())
    at = _rung(ladder, held, kind)
    way = 1 if goal.harder(held) else -1
    for nth in list(range(at + way, len(ladder) if way > 0 else -1, way))[:LATER]:
        tried = yield held.stack.with_part(kind, ladder[nth])
        if not goal.better(tried, held):
            return
        held = tried
