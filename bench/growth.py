"""How the cost of an operation grows with the number of tokens: the slope of log time over log tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timing import rounds


@dataclass
class Growth:
    """make(tokens) gives a call on inputs of that many tokens."""

    name: str
    make: Callable[[int], Callable[[], Any]]
    tokens: tuple[int, ...]  # doublings
    most: float | None  # the slope that is promised not to be exceeded; None: none is


def slope(tokens: list[int], times: list[float]) -> float:
    """Least squares of log time over log tokens: 1 is linear, 2 quadratic."""
    x, y = [math.log(n) for n in tokens], [math.log(t) for t in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    across = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / across


def measure_growth(case: Growth, device: str) -> dict[str, Any]:
    """A row of the report. All sizes are timed in turns; the fastest of each counts, because a disturbance only adds."""
    found = rounds({str(n): case.make(n) for n in case.tokens}, device, False)
    best = [min(found[str(n)]) for n in case.tokens]
    row: dict[str, Any] = {
        "name": case.name,
        "case": f"growth over {case.tokens[0]} to {case.tokens[-1]} tokens",
        "ms": dict(zip(map(str, case.tokens), best, strict=True)),
        "slope": slope(list(case.tokens), best),
        "bar": case.most,
    }
    if case.most is not None and not row["slope"] <= case.most:
        row["failed"] = f"slope {row['slope']:.2f}, promised at most {case.most}"
    return row
