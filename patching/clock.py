"""Where a sampling run stands. One tick per model evaluation, whatever the sampler: heun and dpm_2 evaluate twice a
step, SDE samplers at sigmas between the schedule's, restarts go back up, a partial denoise starts late."""

from collections.abc import Sequence
from dataclasses import dataclass, field

TOLERANCE = 1e-4  # relative; samplers recompute sigmas in float32
RISE = 1e-3  # relative; a sigma noisier than the last one by more than this is a restart


Expected = tuple[tuple[int, int, int], ...]  # of each evaluation: point of the schedule, step, evaluations of it before


def expected_evaluations(sampler: str, sigmas: Sequence[float]) -> Expected:
    """The evaluations of samplers that look ahead, from the name of their function; empty for all others.

    heun and exp_heun_2_x0 evaluate step i at points i and i + 1; heunpp2 at i + 2 too, and then goes back to i + 1.
    Their last step, or last two, need fewer."""
    reach = {"sample_heun": 1, "sample_exp_heun_2_x0": 1, "sample_exp_heun_2_x0_sde": 1, "sample_heunpp2": 2}
    most = reach.get(sampler, 0)
    last = len(sigmas) - 1
    if not most or last < 1:
        return ()
    # heun saves an evaluation where a step ends at sigma 0, heunpp2 where it ends at the schedule's end, whatever it is
    ends = last if most == 2 or sigmas[-1] == 0 else last + 1
    return tuple((i + k, i, k) for i in range(last) for k in range(most + 1) if k == 0 or i + k < ends)


@dataclass
class Clock:
    """sigmas: the run's schedule, steps + 1 floats. Before the first tick, evaluation is -1. expected: what the sampler
    will ask, where it is known; from the first evaluation that differs on, the sigmas alone tell."""

    sigmas: list[float]
    expected: Expected = ()
    evaluation: int = -1  # model evaluations of this run, from 0
    step: int = 0  # schedule interval, 0..steps-1
    sub: int = 0  # evaluations of this step before this one
    sigma: float = float("inf")
    position: float = 0.0  # step plus the fraction of its interval, 0..steps, monotone but for restarts
    restarts: int = 0  # times the run went back to a noisier sigma
    _order: float = field(init=False)
    _looks_ahead: bool = field(init=False, default=False)

    def __post_init__(self):
        self._order = -1.0 if len(self.sigmas) > 1 and self.sigmas[0] < self.sigmas[-1] else 1.0  # -1: inversion

    @property
    def steps(self) -> int:
        return max(1, len(self.sigmas) - 1)

    @property
    def returns(self) -> bool:
        """Whether the sampler is known to go back to earlier points within its plan: every evaluation of a step is
        then a series of its own."""
        points = [point for point, _, _ in self.expected]
        return any(b < a for a, b in zip(points, points[1:], strict=False))

    @property
    def series(self) -> int:
        """Number of the series that this evaluation continues: sigmas run one way within a series."""
        return self.sub if self.returns else 0

    @property
    def evaluations_a_step(self) -> int:
        """The most that a step is known to have; 1 where nothing is known."""
        return 1 + max((sub for _, _, sub in self.expected), default=0)

    def tick(self, sigma: float) -> None:
        """A new model evaluation at this sigma."""
        number = self.evaluation + 1
        if number < len(self.expected):
            point, step, sub = self.expected[number]
            if abs(sigma - self.sigmas[point]) <= 1e-3 * max(map(abs, self.sigmas)):
                self.evaluation, self.step, self.sub = number, step, sub
                self.position, self.sigma = float(point), sigma
                return
        self.expected = ()
        self._tell(sigma)

    def _tell(self, sigma: float) -> None:
        """Step and sub-evaluation from the sigmas alone.

        heun looks ahead: it evaluates step i at point i, then at point i + 1, where step i + 1 evaluates again. Two
        evaluations at one point give that away; from then on the first one counts for the step that looked ahead."""
        position, first = self._locate(sigma), self.evaluation < 0
        again = not first and abs(position - self.position) < 1e-6
        if not first and (sigma - self.sigma) * self._order > RISE * abs(self.sigma):
            self.restarts += 1
        self._looks_ahead |= again
        step = min(int(position), self.steps - 1)
        ahead = self._looks_ahead and not again and position == int(position) and int(position) == self.step + 1
        step = self.step if ahead else step
        self.sub = self.sub + 1 if not first and step == self.step and not (again and self.sub == 0) else 0
        self.evaluation += 1
        self.step, self.position, self.sigma = step, position, sigma

    def _locate(self, sigma: float) -> float:
        """Where the schedule holds this sigma: at or after the current step if anywhere, for a schedule that restarts
        holds one several times; else the last place before it."""
        places = [float(i) for i, s in enumerate(self.sigmas) if self._same(sigma, s)]
        for i, (s, t) in enumerate(zip(self.sigmas, self.sigmas[1:], strict=False)):
            if min(s, t) < sigma < max(s, t) and not self._same(sigma, s) and not self._same(sigma, t):
                places.append(i + (s - sigma) / (s - t))
        if not places:
            beyond = bool(self.sigmas) and (sigma - self.sigmas[0]) * self._order < 0
            return float(len(self.sigmas) - 1) if beyond else 0.0
        return min((p for p in places if p >= self.step), default=max(places))

    def _same(self, sigma: float, other: float) -> bool:
        scale = max(map(abs, self.sigmas))
        return abs(sigma - other) <= TOLERANCE * max(abs(other), 1e-3 * scale)
