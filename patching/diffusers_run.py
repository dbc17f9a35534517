"""One run of a diffusers pipeline with our methods: where it stands, which attention calls they serve, and what a cache
forecasts. Everything that is kept lives in Run and Call."""

import inspect
import logging
import math
from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from .. import archs
from ..methods.attention.call import AttentionCall, Decline
from ..methods.cache.cadence import Cadence
from ..methods.cache.taylor import Forecast
from .clock import Clock

log = logging.getLogger("tessera")
current: ContextVar["Call | None"] = ContextVar("tessera_pipeline_call", default=None)


@dataclass(frozen=True)
class Place:
    """A block's place in the residual stack, as attention methods ask for it."""

    spec: archs.Blocks
    index: int
    number: int
    count: int


class Run:
    """One call of a pipeline."""

    def __init__(self, arch: archs.Arch, model: torch.nn.Module, scheduler: Any, plan: Any, cache: Any):
        self.arch, self.model, self.scheduler, self.plan, self.cache = arch, model, scheduler, plan, cache
        self.methods = [(method, method.begin()) for method in plan.methods]
        self.features: tuple[Any, ...] = ()
        self.clock = Clock([1.0, 0.0])
        self.timesteps: list[float] = []
        self.step = -1  # of the newest transformer call
        self.steps_made = 0  # calls of scheduler.step
        self.nth = 0  # transformer calls of this step: pipelines may ask for positive and negative apart
        self.calls = self.computed = self.skipped = self.served = 0
        self.declined: Counter = Counter()
        self.histories: dict[Any, Forecast] = {}
        self.last_full: int | None = None
        self.first: int | None = None  # step of the first call
        self.full = True
        self.kinds: list[str] = []

    def stepped(self) -> None:
        self.steps_made += 1

    def enter(self) -> None:
        """A transformer call begins; the first one of a step decides for all of it."""
        if not self.timesteps:
            begin = getattr(self.scheduler, "begin_index", None) or 0  # image to image starts later
            self.timesteps = [float(t) for t in self.scheduler.timesteps[begin:]]
            self.clock = Clock([*self.timesteps, 0.0])
        self.calls += 1
        if self.step == self.steps_made:
            self.nth += 1
            return
        self.step, self.nth = self.steps_made, 0
        if self.step >= len(self.timesteps):
            raise RuntimeError(
                f"The scheduler made {self.step} steps of {len(self.timesteps)} timesteps, and the transformer is asked again. "
                "Give running() the scheduler that the loop steps."
            )
        self.clock.tick(self.timesteps[self.step])
        self.full = self.cache is None or self._computes()
        if self.full:
            self.last_full = self.step
        self.kinds.append("full" if self.full else "forecast")

    def _computes(self) -> bool:
        if self.cache.interval < 2:
            return True
        self.first = self.step if self.first is None else self.first  # a second transformer takes over in the middle
        since, last = self.step - self.first, None if self.last_full is None else self.last_full - self.first
        cadence = Cadence(self.cache.interval, self.cache.warmup, self.cache.tail_full)
        return cadence.computes(self.step, since, len(self.timesteps), last)

    def history(self, key: Any) -> Forecast:
        """What is kept under a key: the number of the transformer call in its step, what it is called with, the stream."""
        if key not in self.histories:
            scale = float(max(1, len(self.timesteps)))
            self.histories[key] = Forecast(self.cache.order, self.cache.basis, 1, scale)
        return self.histories[key]

    def close(self) -> dict[str, Any]:
        """Drops everything that was kept and tells what happened."""
        if self.calls > 1 and not self.steps_made:
            log.warning(
                "The scheduler was never stepped, so every evaluation counted as the first: nothing was skipped."
            )
        told = {
            "architecture": self.arch.name,
            "steps": self.steps_made,
            "calls": self.calls,
            "forecast": self.kinds.count("forecast"),
            "blocks_computed": self.computed,
            "blocks_skipped": self.skipped,
            "served": self.served,
            "declined": dict(self.declined),
        }
        self.methods.clear()
        self.histories.clear()
        return told


@dataclass
class Call:
    """One call of the transformer, which attention methods see as `forward`."""

    run: Run
    grid: tuple[int, int, int] | None
    shapes: tuple[Any, ...]  # of latent and text: pipelines may drop guidance or change a text within a run
    skips: bool = False
    block: Place | None = None
    rotation: Any = None
    calls: dict[int, int] = field(default_factory=dict)  # attention calls met, by block

    @property
    def keys(self) -> tuple[Any, ...]:
        """All rows as one stream: which of them are positive only the pipeline knows."""
        return (("pipeline", self.run.nth),)

    @property
    def diffusion_model(self) -> torch.nn.Module:
        return self.run.model

    @property
    def kept(self) -> dict[int, Forecast]:
        """Histories of this call by stream."""
        mine = self.run.nth, self.shapes
        return {stream: kept for (*owner, stream), kept in self.run.histories.items() if tuple(owner) == mine}

    @property
    def ready(self) -> bool:
        kept = self.kept
        return bool(kept) and all(history.serves(self.run.step) for history in kept.values())

    def store(self, out: tuple[torch.Tensor | None, ...]) -> None:
        """What the last block, or the transformer, gives."""
        if self.run.cache is None or self.run.cache.interval < 2:
            return
        for stream, made in enumerate(out):
            if made is not None:
                self.run.history((self.run.nth, self.shapes, stream)).update(made, self.run.step)

    def forecast(self) -> tuple[torch.Tensor | None, ...]:
        """The same, forecast; None for a stream that the last block does not return."""
        kept = self.kept
        return tuple(kept[s].predict(self.run.step) if s in kept else None for s in range(max(kept) + 1))


def called(part: Any, plain: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The transformer's forward."""
    run = part.run
    if run is None:
        return plain(*args, **kwargs)
    run.enter()
    given = inspect.signature(type(part.model).forward).bind(part.model, *args, **kwargs).arguments
    texts = (given["hidden_states"], given.get("encoder_hidden_states"))
    call = Call(run, grid_of(part.arch, part.model, given), tuple(None if x is None else tuple(x.shape) for x in texts))
    level = run.cache.level if run.cache is not None else ""
    skips = not run.full and call.ready
    if not skips:
        run.kinds[-1], run.last_full = "full", run.step
    if skips and level == "output":
        run.skipped += len(part.places)
        made = call.forecast()
        return made if given.get("return_dict") is False else SimpleOutput(made[0])
    call.skips = skips
    token = current.set(call)
    try:
        out = plain(*args, **kwargs)
    finally:
        current.reset(token)
    if level == "output":
        call.store((out[0],))
    return out


class SimpleOutput(SimpleNamespace):
    """A forecast in the place of a transformer's output object: by name, and by number."""

    def __init__(self, sample: torch.Tensor):
        super().__init__(sample=sample)

    def __getitem__(self, index):
        return (self.sample,)[index]


def grid_of(arch: archs.Arch, model: torch.nn.Module, given: dict[str, Any]) -> tuple[int, int, int] | None:
    """The token grid (T, H, W), from what the transformer is called with; None where tokens do not fill one."""
    x = given["hidden_states"]
    if given.get("img_ids") is not None:  # Flux: tokens [B, N, C] with places (0, row, column)
        places = given["img_ids"].reshape(-1, 3)[: x.shape[1]]
        grid = (1, *(int(n) + 1 for n in places.amax(0)[1:].tolist()))
        return grid if math.prod(grid) == x.shape[1] else None  # type: ignore[return-value]
    if given.get("num_frames") is not None:  # LTX-Video: tokens and their sizes
        return given["num_frames"], given["height"], given["width"]
    if x.ndim < 4:
        return None
    if "CogVideoX" in arch.name:  # frames before channels
        x = x.transpose(1, 2)
    return arch.grid(model, x)


def attend(q, k, v, mask, scale, gqa) -> torch.Tensor | None:
    """q [B, H, N, D], k, v [B, Hkv, M, D] -> [B, H, N, D], or None: the processor's own attention answers."""
    call = current.get()
    if call is None or call.block is None or not call.run.methods:
        return None
    run, block = call.run, call.block
    nth = call.calls.get(block.number, 0)
    call.calls[block.number] = nth + 1
    kind = block.spec.calls[nth % len(block.spec.calls)]
    if kind not in ("self", "joint"):
        return None
    mask = mask if mask is None or mask.ndim == 4 else mask[None, None] if mask.ndim == 2 else mask[:, None]
    layout = None
    if call.grid is not None:
        layout = archs.layout_of(run.arch, call.grid, kind, q.shape[2], k.shape[2])
    asked = AttentionCall(
        q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else float(scale), kind, layout, block, call
    )
    reason = _declines(run, asked)
    for method, state in reversed(run.methods if reason is None else ()):
        try:
            answer = method.attend(state, asked)
        except Decline as decline:
            reason = str(decline)
        else:
            run.served += 1
            return answer.out
    run.declined[reason or "no method"] += 1
    return None


def _declines(run: Run, call: AttentionCall) -> str | None:
    """Why no method is offered this call."""
    first, last = run.plan.dense_steps
    if not first <= run.step < len(run.timesteps) - last:
        return "outside the chosen steps"
    if run.plan.blocks is not None and call.block.number not in run.plan.blocks:
        return "outside the chosen blocks"
    if call.layout is None:
        return "token layout unknown"
    tokens = call.layout.image.stop - call.layout.image.start
    return f"fewer than {run.plan.min_tokens} image tokens" if tokens < run.plan.min_tokens else None
