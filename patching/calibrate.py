"""One plain sampling run, of which every step's first evaluation is recorded for Calibrate Cache."""

from dataclasses import dataclass
from typing import Any

import torch

from ..methods.cache.calibration import Calibration, Recorder
from .blocks import BlockFeature, BlockPosition, Streams
from .cache import CacheFeature
from .forward import Forward, ModelFeature
from .run import Feature, Run, attach
from .sampling import Job, Progress, sample
from .sizes import fingerprint

NAME = "Calibrate Cache"


class Recording:
    """What the steps of one run showed, while it lasts and after it."""

    def __init__(self, seed: int):
        self.recorder = Recorder(seed)
        self.steps: list[int] = []  # recorded so far
        self.before: torch.Tensor | None = None  # of the evaluation being recorded
        self.signal: torch.Tensor | None = None
        self.source = "modulated"
        self.level = "last_block"
        self.window: tuple[int, ...] | None = None
        self.call = -1  # the call being recorded
        self.count = 0  # tokens of one picture as they entered the stack
        self.about: tuple[str, str, list[float], str] | None = None  # model, sampler, sigmas of the steps, variable

    def wants(self, forward: Forward) -> bool:
        """Whether this call is the first of a step that is not recorded yet, of the first context window met."""
        key = forward.keys[0]
        if not self.steps and self.before is None:
            self.window = key.window
        return forward.run.clock.step not in self.steps and key.window == self.window

    def begin(self, before: torch.Tensor, signal: torch.Tensor | None) -> None:
        """before: tokens [n, D] that enter the stack; signal: the same under the first block's modulation."""
        self.before = self.recorder.keep(before)
        if signal is None or (self.steps and self.source == "input"):
            self.source, self.signal = "input", self.before
        else:
            self.signal = self.recorder.keep_signal(signal)

    def end(self, forward: Forward, after: torch.Tensor) -> None:
        if self.before is None or self.signal is None:
            return
        self.recorder.add(self.before, self.signal, after)
        self.steps.append(forward.run.clock.step)
        self.before = self.signal = None

    def calibration(self) -> Calibration:
        """ValueError where a step was not met."""
        if self.about is None or not self.steps:
            raise ValueError(f"{NAME} met no evaluation of the model; check the sampler and the schedule.")
        model, sampler, sigmas, variable = self.about
        missed = sorted({*range(len(sigmas))} - {*self.steps})
        if missed or self.steps != sorted(self.steps):
            raise ValueError(
                f"{NAME} did not meet every step in its order (missed {missed}); it needs a sampler that evaluates each "
                "step, without restarts, and context windows that stay where they are."
            )
        return self.recorder.finish(model, sampler, sigmas, variable, self.level, self.source)


@dataclass(frozen=True, eq=False)
class CalibrateFeature(BlockFeature, ModelFeature):
    """Looks at one run. recording outlives it; the MODEL that carries this feature is not given out."""

    name: str = NAME
    recording: Recording | None = None

    def begin(self, run: Run) -> Recording:
        assert self.recording is not None
        clock = run.clock
        known = run.arch is not None and "blocks" not in run.arch.limits
        self.recording.level = "last_block" if known else "output"
        sigmas = clock.sigmas[:-1] or clock.sigmas
        self.recording.about = fingerprint(run.patcher), run.sampler, sigmas, "step"
        return self.recording

    def conflicts(self, other: Feature) -> str | None:
        if isinstance(other, CacheFeature) and not other.off:
            return f"{NAME} records a plain run, but {other.name} is on this MODEL. Connect the MODEL from before it."
        return None

    def around_block(self, state: Recording, forward: Forward, block: BlockPosition, streams: Streams, proceed):
        if state.level != "last_block":
            return proceed(streams)
        number = id(forward)
        if block.number == 0 and state.wants(forward):
            signal = forward.modulated()
            tokens = tokens_of(forward, block, streams[0])
            state.begin(_flat(tokens), None if signal is None else _flat(signal))
            state.call, state.count = number, tokens.shape[1]
        out = proceed(streams)
        if block.last and state.call == number:
            state.end(forward, _flat(tokens_of(forward, block, out[0], state.count)))
            state.call = -1
        return out

    def around_model(self, state: Recording, forward: Forward, x: torch.Tensor, sigma: torch.Tensor, proceed):
        if state.level != "output" or not state.wants(forward):
            return proceed()
        rows = x.shape[0] // len(forward.keys)
        state.begin(_pixels(x[:rows]), None)
        denoised = proceed()
        level = sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        state.end(forward, _pixels(((x - denoised) / level)[:rows]))
        return denoised


def tokens_of(forward: Forward, block: BlockPosition, stream: Any, count: int = 0) -> torch.Tensor:
    """The first condition's tokens [b, n, D] of a block's first stream; of a tuple of streams its first.

    count: how many of a picture's tokens are wanted, where text may have joined them since; 0 takes all."""
    leaf = stream if torch.is_tensor(stream) else stream[0]
    axis = block.spec.axes.find("B")
    if axis < 0:
        return leaf.reshape(1, -1, leaf.shape[-1])
    if leaf.shape[axis] % len(forward.keys) == 0:
        leaf = leaf.chunk(len(forward.keys), axis)[0]
    tokens = leaf.movedim(axis, 0).flatten(1, -2)
    if 0 < count < tokens.shape[1]:
        tokens = tokens[:, -count:] if forward.run.arch.place == "prefix" else tokens[:, :count]
    return tokens


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """[b, C, ...] -> [n, C]."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def calibrate(model: Any, job: Job, seed: int = 0, node: str | None = None) -> tuple[Calibration, Any]:
    """(the calibration, the latent that the plain run made). The MODEL keeps nothing."""
    steps = len(job.sigmas) - 1
    if steps < 2:
        raise ValueError(f"{NAME} needs a schedule of at least 2 steps, got {max(steps, 0)}; raise the steps.")
    recording = Recording(seed)
    outcome = sample(attach(model, CalibrateFeature(node, NAME, recording=recording)), job, Progress(steps).step)
    return recording.calibration(), outcome.samples


def lines_of(found: Calibration) -> list[str]:
    """What people want to know of a calibration."""
    last = found.steps - 1
    reuse = [found.rel_l1[i][i + 1] for i in range(last)]
    forecasts = [found.forecast_error((i - 1, i - 2), i) for i in range(2, found.steps)]
    lines = [f"{found.steps} steps: the output changes by {min(reuse):.3g} to {max(reuse):.3g} from a step to the next"]
    if forecasts:
        lines.append(f"order-1 forecasts of the next step are off by {min(forecasts):.3g} to {max(forecasts):.3g}")
    if found.mag_ratios[1:]:
        low, high = min(found.mag_ratios[1:]), max(found.mag_ratios[1:])
        lines.append(f"MagCache ratios {low:.4f} to {high:.4f}")
    if found.tea_coefficients:
        told = ", ".join(f"{c:.6g}" for c in found.tea_coefficients)
        lines.append(f"TeaCache polynomial of the {found.signal} signal: [{told}]")
    else:
        lines.append("too few different steps for a TeaCache polynomial: it takes 6 or more")
    return lines
