"""A cache schedule: which sampler steps are computed, bound to the sigmas that it was made for."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

FORMAT = "tessera-schedule/1"
SLACK = 1e-3  # relative; a step no noisier than the run's first by more than this belongs to the run


@dataclass(frozen=True)
class Schedule:
    """mask: one decision a step, True is computed; the first always is. sigmas: where each step starts, as many."""

    mask: tuple[bool, ...]
    sigmas: tuple[float, ...]

    def __post_init__(self):
        if not self.mask or len(self.mask) != len(self.sigmas):
            raise ValueError(
                f"A cache schedule needs one sigma a decision, got {len(self.mask)} decisions and {len(self.sigmas)} sigmas."
            )

    @property
    def full(self) -> int:
        """Steps that are computed."""
        return sum(self.mask)

    def for_run(self, sigmas: Sequence[float]) -> list[bool]:
        """Decisions for a run whose steps start at these sigmas [steps].

        Each computed step of the schedule is given to the step of the run that starts nearest to it: the same list where
        the sigmas are the same, as many computed steps or fewer on another step count, the tail of it on a partial
        denoise. The first step of a run is always computed."""
        made = [False] * len(sigmas)
        made[0] = True
        falls = sigmas[0] >= sigmas[-1]
        for computed, at in zip(self.mask, self.sigmas, strict=True):
            inside = at <= sigmas[0] * (1 + SLACK) if falls else at >= sigmas[0] * (1 - SLACK)
            if computed and inside:
                made[min(range(len(sigmas)), key=lambda i: abs(sigmas[i] - at))] = True
        return made

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "mask": [int(m) for m in self.mask], "sigmas": list(self.sigmas)})

    @classmethod
    def from_json(cls, text: str) -> "Schedule":
        """ValueError where the text is no schedule."""
        try:
            found = json.loads(text)
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']!r}")
            return cls(tuple(bool(m) for m in found["mask"]), tuple(float(s) for s in found["sigmas"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"This is no cache schedule ({error}). Make one with Cache Schedule.") from error
