"""Cadence: which evaluations of a run are computed and which are forecast (TaylorSeer's `fresh_threshold`).

Pure bookkeeping: no torch, no state. The caller counts, so two streams with the same counters decide alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MULTI_EVAL = ("count_each", "skip_whole_steps")


@dataclass(frozen=True)
class Cadence:
    """One computed evaluation in `interval`, after `warmup` computed ones.

    interval:     evaluations from one computed one to the next; 1 computes all.
    warmup:       evaluations computed at the start of the run. The first is always computed.
    tail_full:    last sampler steps that are always computed.
    multi_eval:   for samplers that call the model several times a step. "count_each" counts and decides per call,
                  "skip_whole_steps" counts and decides per step, so all calls of a step share its decision; there,
                  read "step" for "evaluation" in interval and warmup.
    sigma_window: (start, end), sigmas between which evaluations may be skipped; all others are computed.
    """

    interval: int = 3
    warmup: int = 3
    tail_full: int = 1
    multi_eval: str = "count_each"
    sigma_window: tuple[float, float] = (math.inf, 0.0)

    def __post_init__(self):
        if self.interval < 1 or self.warmup < 0 or self.tail_full < 0:
            raise ValueError(
                f"Cadence needs interval >= 1, warmup >= 0 and tail_full >= 0, "
                f"got {self.interval}, {self.warmup} and {self.tail_full}."
            )
        if self.multi_eval not in MULTI_EVAL:
            raise ValueError(f"Unknown multi_eval {self.multi_eval!r}. Use one of {', '.join(MULTI_EVAL)}.")
        if self.sigma_window[0] < self.sigma_window[1]:
            start, end = self.sigma_window
            raise ValueError(f"The window starts at sigma {start}, below its end {end}. Lower start_percent.")

    @property
    def first_recorded(self) -> int:
        """First evaluation whose feature enters the paper's differences (its code forms none before warmup - 1).

        Storing from here reproduces it for order >= 2; storing from 0 only gives the higher orders earlier.
        """
        return max(self.warmup - 2, 0)

    def unit(self, step: int, eval_no: int) -> int:
        """What `interval` and `warmup` count at this call: the step or the evaluation, by `multi_eval`."""
        return step if self.multi_eval == "skip_whole_steps" else eval_no

    def computes(
        self,
        step: int,
        eval_no: int,
        total_steps: int,
        last_full: int | None,
        total_evals: int | None = None,
        sigma: float | None = None,
        schedule: Sequence[bool] | None = None,
    ) -> bool:
        """Whether this evaluation runs the model (True) or is forecast (False).

        step:        index of the sampler step in this run, of total_steps.
        eval_no:     model evaluations of this stream before this one.
        last_full:   `unit(...)` of the newest computed evaluation, for whatever reason it was; None before the first.
                     Repeating the question for that very unit gives True, so the streams of a step agree.
        total_evals: evaluations of the run where known, else total_steps stands for it.
        sigma:       of this evaluation, of the step's first one under skip_whole_steps; None ignores the window.
        schedule:    one decision a step, True = compute; replaces every other rule but the first evaluation's.
        Raises ValueError when the schedule has another length or skips its first step.
        """
        if schedule is not None:
            return self._scheduled(schedule, step, total_steps) or last_full is None
        unit = self.unit(step, eval_no)
        units = total_steps if self.multi_eval == "skip_whole_steps" else total_evals or total_steps
        if last_full is None or unit < self.warmup or units <= self.warmup + 1:
            return True
        if step >= total_steps - self.tail_full:
            return True
        start, end = self.sigma_window
        if sigma is not None and not end <= sigma <= start:
            return True
        return not 0 < unit - last_full < self.interval

    def plan(
        self,
        total_steps: int,
        evals_per_step: int = 1,
        sigmas: Sequence[float] | None = None,
        schedule: Sequence[bool] | None = None,
    ) -> list[bool]:
        """The decisions of a whole run, one an evaluation. sigmas: one a step; a step's calls are given the same."""
        decisions: list[bool] = []
        last_full = None
        for eval_no in range(total_steps * evals_per_step):
            step = eval_no // evals_per_step
            sigma = None if sigmas is None else sigmas[step]
            full = self.computes(step, eval_no, total_steps, last_full, total_steps * evals_per_step, sigma, schedule)
            if full:
                last_full = self.unit(step, eval_no)
            decisions.append(full)
        return decisions

    @staticmethod
    def _scheduled(schedule: Sequence[bool], step: int, total_steps: int) -> bool:
        if len(schedule) != total_steps:
            raise ValueError(
                f"The schedule decides {len(schedule)} steps but the sampler runs {total_steps}. "
                f"Make the schedule for {total_steps} steps or change the sampler's."
            )
        if not schedule[0]:
            raise ValueError(
                "The schedule skips the first step, where nothing is stored yet. Set its first entry to true."
            )
        return bool(schedule[step])
