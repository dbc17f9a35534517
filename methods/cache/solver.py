"""The search for a setting whose real error, or speed-up, is the wanted one: few real runs, each at what the replay of
recorded signals and the runs before it say."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .replay import Mask, Measured, Replay, head

NEAR = 0.5  # part of the tolerance that the mean may be off by; the rest is for what differs between seeds
STEADY = 0.6  # part of the tolerance that runs may spread by
WIDE = 6  # candidates whose neighbours are looked at
HOPELESS = 0.25  # by how much (log) an estimate may miss the wanted error and still be worth a real run
UNSURE = 0.03  # what an estimate is worth less (log) for each step that differs from the nearest real run
TRIES = 5  # real runs for one number of steps at the start


@dataclass(frozen=True)
class Goal:
    """error: of the final latent, relative, or None; speedup: in evaluations, where error is None. tolerance: part of
    the wanted error by which other seeds may miss it."""

    error: float | None
    speedup: float
    tolerance: float

    def off(self, found: Measured) -> float:
        """log of what was found over what is wanted."""
        if self.error is not None:
            return math.log(max(found.error, 1e-12) / self.error)
        return math.log(found.total / max(found.full, 1e-9) / self.speedup)

    def met(self, found: Measured) -> bool:
        return abs(self.off(found)) <= math.log1p(self.tolerance * NEAR)

    def steady(self, found: Measured) -> bool:
        """Whether other seeds will give the same; true where one seed is all that is known."""
        return self.error is None or not found.spread > self.tolerance * STEADY

    def risk(self, found: Measured) -> float:
        spread = 0.0 if self.error is None or math.isnan(found.spread) else found.spread
        return math.hypot(self.off(found), spread)


def best(goal: Goal, found: Sequence[tuple[object, Measured]]) -> int:
    """Of what was tried: what meets the goal on every seed with the fewest evaluations, else what comes nearest."""
    sound = [i for i, (_, m) in enumerate(found) if goal.met(m) and goal.steady(m)]
    if sound:
        return min(sound, key=lambda i: (found[i][1].full, goal.risk(found[i][1])))
    return min(range(len(found)), key=lambda i: goal.risk(found[i][1]))


def by_schedule(
    goal: Goal, replay: Replay, masks: Sequence[Mask], run: Callable[[Mask], Measured], rounds: int
) -> list[tuple[Mask, Measured]]:
    """Real runs of masks, at most `rounds`. Skipping early saves most but differs between seeds, so the number of
    computed steps at the start is halved in on: later where a setting that meets the error is not steady, earlier
    where it is or where so few skipped steps cannot reach the error."""
    found: list[tuple[Mask, Measured]] = []
    if goal.error is None:
        wanted = max(1, round(replay.n / goal.speedup))
        counts = sorted({sum(m) for m in masks}, key=lambda c: abs(c - wanted))
        masks = [m for m in masks if sum(m) == counts[0]] if counts else []
        pick = min(masks, key=replay.estimate, default=None)
        return [(pick, run(pick))] if pick is not None else []
    low, high = min(map(head, masks)), max(map(head, masks))
    while len(found) < rounds and low <= high:
        level = (low + high) // 2
        met, short, over = None, False, False
        for _ in range(min(TRIES, rounds - len(found))):
            mask = _nearest(goal, replay, masks, level, [m for m, _ in found])
            if mask is None:
                break
            miss = math.log(max(replay.estimate(mask), 1e-12) / goal.error)
            if found and abs(miss) > HOPELESS:
                short = miss < 0
                break
            found.append((mask, run(mask)))
            replay.learn(found[-1][1])
            if goal.met(found[-1][1]):
                met = found[-1][1]
                break
            short, over = short or goal.off(found[-1][1]) < 0, over or goal.off(found[-1][1]) > 0
        if (met is not None and goal.steady(met)) or (met is None and short and not over):
            high = level - 1
        else:
            low = level + 1
    return found


def _nearest(goal: Goal, replay: Replay, masks: Sequence[Mask], level: int, tried: Sequence[Mask]) -> Mask | None:
    """The untried mask whose estimate is nearest to the wanted error, among those that start like `level` and the
    neighbours of the nearest of them."""
    assert goal.error is not None
    wanted = math.log(goal.error)

    def misses(mask: Mask) -> float:
        off = abs(math.log(max(replay.estimate(mask), 1e-12)) - wanted)
        return off + UNSURE * replay.apart(mask) + 0.01 * abs(head(mask) - level) + 0.002 * sum(mask)

    reach = max(2, replay.n // 6)
    near = sorted((m for m in masks if abs(head(m) - level) <= reach), key=misses)[:WIDE]
    sources = [*near, *(m for m in tried if abs(head(m) - level) <= reach)]
    more = {other: None for mask in sources for other in neighbours(mask) if abs(head(other) - level) <= reach}
    return min((m for m in (*near, *more) if m not in tried), key=misses, default=None)


def neighbours(mask: Mask) -> list[Mask]:
    """The masks that compute one of the later steps more or less, or next to where this one does; their ends are the
    same."""
    first = head(mask)
    found = []
    for i in range(first, len(mask) - 1):
        flipped = (*mask[:i], not mask[i], *mask[i + 1 :])
        found.append(flipped)
        if i + 1 < len(mask) - 1 and mask[i] != mask[i + 1]:
            found.append((*mask[:i], mask[i + 1], mask[i], *mask[i + 2 :]))
    return [m for m in found if not all(m)]


def by_threshold(
    goal: Goal, guess: float, run: Callable[[float], Measured], rounds: int, low: float, high: float
) -> list[tuple[float, Measured]]:
    """Real runs of a threshold within [low, high], at most `rounds`: from the guess outwards until the goal lies between
    two, then within. More threshold means more error and more speed."""
    found: list[tuple[float, Measured]] = []
    below: tuple[float, float] | None = None  # threshold and log of found over wanted
    above: tuple[float, float] | None = None
    at = min(max(guess, low), high)
    while len(found) < rounds:
        found.append((at, run(at)))
        if goal.met(found[-1][1]):
            break
        off = goal.off(found[-1][1])
        if off < 0:
            below = at, off
        else:
            above = at, off
        if below is not None and above is not None:
            if above[0] / below[0] < 1 + 1e-4:
                break
            part = min(max(-below[1] / (above[1] - below[1]), 0.15), 0.85)
            at = math.exp(math.log(below[0]) + part * math.log(above[0] / below[0]))
        elif (off < 0 and at >= high) or (off > 0 and at <= low):
            break
        else:
            at = min(max(at * math.exp(-max(min(off, 1.5), -1.5) - math.copysign(0.1, off)), low), high)
    return found
