"""How strongly a LoRA acts, measured over its strength, and the strength that acts as asked (after LiON-LoRA's linear
amplitude, arXiv 2507.05678, without training): s' = m^-1(m(0) + u (m(1) - m(0))), m the response.

Measured responses are made monotone by pooling neighbours that are out of order (isotonic regression), and joined by a
cubic that keeps them so (Fritsch and Carlson 1980, with harmonic mean slopes)."""

import bisect
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

DEFAULT = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
MEASURES = ("difference", "motion")
HALVINGS = 60


def isotonic(values: Sequence[float]) -> list[float]:
    """The nearest sequence that never falls, in least squares."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while pools and pools[-1][0] > mean:
            before, held = pools.pop()
            mean, count = (mean * count + before * held) / (count + held), count + held
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def slopes(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """Of a monotone cubic through the points, at each of them."""
    h = [b - a for a, b in zip(x, x[1:], strict=False)]
    d = [(b - a) / w for a, b, w in zip(y, y[1:], h, strict=False)]
    if len(d) == 1:
        return [d[0], d[0]]
    inside = [
        3 * (h[i] + h[i + 1]) / ((2 * h[i + 1] + h[i]) / d[i] + (h[i + 1] + 2 * h[i]) / d[i + 1])
        if d[i] * d[i + 1] > 0
        else 0.0
        for i in range(len(d) - 1)
    ]
    return [_end(h[0], h[1], d[0], d[1]), *inside, _end(h[-1], h[-2], d[-1], d[-2])]


def _end(h0: float, h1: float, d0: float, d1: float) -> float:
    """Slope at an end, from the parabola through three points, kept from turning round."""
    slope = ((2 * h0 + h1) * d0 - h0 * d1) / (h0 + h1)
    if slope * d0 <= 0:
        return 0.0
    return 3 * d0 if d0 * d1 <= 0 and abs(slope) > 3 * abs(d0) else slope


@dataclass(frozen=True)
class Curve:
    """strengths rise; responses are as measured at them."""

    lora: str  # name of the file
    measure: str
    strengths: tuple[float, ...]
    responses: tuple[float, ...]

    def __post_init__(self):
        numbers = (*self.strengths, *self.responses)
        if not all(isinstance(v, int | float) and math.isfinite(v) for v in numbers):
            raise ValueError("A response curve needs finite strengths and responses; measure it again.")
        rising = all(a < b for a, b in zip(self.strengths, self.strengths[1:], strict=False))
        if not rising or len(self.strengths) != len(self.responses) or not {0.0, 1.0} <= set(self.strengths):
            raise ValueError(
                f"A response curve needs rising strengths with 0 and 1 among them and a response at each, got "
                f"{len(self.responses)} responses at {[*self.strengths]}."
            )
        if self.at(1.0) == self.at(0.0):
            raise ValueError(
                f"{self.lora} does not change this job between strength 0 and 1, so its response cannot be calibrated."
            )

    @cached_property
    def signed(self) -> list[float]:
        """The responses; a difference counts as negative at negative strengths, where it is one the other way."""
        away = self.measure == "difference"
        return [-v if away and s < 0 else v for s, v in zip(self.strengths, self.responses, strict=True)]

    @cached_property
    def fitted(self) -> list[float]:
        """The signed responses, made monotone in the direction from strength 0 to 1."""
        first, one = (self.responses[self.strengths.index(s)] for s in (0.0, 1.0))
        sign = 1.0 if one >= first else -1.0
        return [sign * v for v in isotonic([sign * v for v in self.signed])]

    @cached_property
    def _slopes(self) -> list[float]:
        return slopes(self.strengths, self.fitted)

    def at(self, strength: float) -> float:
        """The response at a strength between the first and the last measured one."""
        x, y, m = self.strengths, self.fitted, self._slopes
        i = min(max(bisect.bisect_right(x, strength) - 1, 0), len(x) - 2)
        h = x[i + 1] - x[i]
        t = min(max((strength - x[i]) / h, 0.0), 1.0)
        a, b = (1 + 2 * t) * (1 - t) ** 2, t * (1 - t) ** 2
        c, d = t * t * (3 - 2 * t), t * t * (t - 1)
        return a * y[i] + b * h * m[i] + c * y[i + 1] + d * h * m[i + 1]

    def amount(self, strength: float) -> float:
        """The response as a part of what strength 1 adds to strength 0."""
        zero, one = self.at(0.0), self.at(1.0)
        return (self.at(strength) - zero) / (one - zero)

    @property
    def most(self) -> float:
        """The largest amount that was measured."""
        return self.amount(self.strengths[-1])

    def strength(self, amount: float) -> float:
        """The least strength from 0 whose response is that amount; the last measured one where none is. 0 and 1 are their
        own."""
        low, high = 0.0, self.strengths[-1]
        if amount <= 0.0 or amount == 1.0:
            return max(0.0, amount)
        if amount > self.most:
            return high
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.amount(middle) >= amount else (middle, high)
        return high

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def from_json(text: str) -> Curve:
    """ValueError, one sentence, for what Calibrate LoRA Strength did not write."""
    try:
        held = json.loads(text)
        return Curve(held["lora"], held["measure"], tuple(held["strengths"]), tuple(held["responses"]))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError("This is no curve of Calibrate LoRA Strength; paste the text of its json output.") from error


def strengths_of(text: str) -> tuple[float, ...]:
    """Numbers with commas between them, sorted, 0 and 1 among them. ValueError for others."""
    try:
        found = sorted({float(part) for part in text.split(",") if part.strip()})
    except ValueError as error:
        raise ValueError(f"strengths {text!r} must be numbers with commas between them, such as 0, 0.5, 1.") from error
    if not all(math.isfinite(v) and abs(v) <= 100 for v in found):
        raise ValueError(f"strengths {text!r} must lie between -100 and 100.")
    if not {0.0, 1.0} <= set(found):
        raise ValueError(f"strengths {text!r} must have 0 and 1 among them: amounts are measured between the two.")
    return tuple(found)
