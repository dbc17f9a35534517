"""Re-ttention (arXiv 2505.22918, section 3): a static pattern of a few per cent of the pairs, whose softmax is repaired
from the last step that computed all of them.

    refresh    rho = e^{lse_M - lse}, the share of each row's softmax that the pattern M holds
               R = softmax(s) v - rho Attn_M, what the other keys add
    reuse n    out = min(1, rho + n lambda) Attn_M + R, n = 0 for the first one after a refresh

R is kept before the output projection; it is the same after it, without the model's weights. Tokens that are not of the
image see all keys and are seen by all: their rho is 1, their R is 0, and lambda is for image rows alone (ours). State is
kept by stream and block, so it follows its rows wherever core puts them.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ...archs import Layout
from ...kernels._triton import gathers
from . import _static
from .call import Answer, AttentionCall, Decline
from .picture import WHOLE_BLOCKS, Picture

UNUSED = 2  # served steps after which a stream that did not come back is forgotten: context windows may move each step


@dataclass(eq=False)
class Kept:
    """What a refresh left for one stream in one block; several streams of one call share the tensors' memory."""

    ratio: torch.Tensor  # fp32 [B, H, N]
    residual: torch.Tensor | None  # [B, H, N, D], on the cache's device, in its dtype
    plan: _static.StaticPlan
    fits: tuple[Any, ...]  # shape, dtype and device of the stream's queries
    step: int  # of the refresh
    used: int  # State.number at the last call
    reuses: int = 0

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.ratio, self.residual) if x is not None)


@dataclass
class State:
    """One sampling run."""

    plans: dict[Any, _static.StaticPlan] = field(default_factory=dict)
    kept: dict[Any, Kept] = field(default_factory=dict)  # by block, call of it, series and stream
    restarts: int = 0
    evaluation: int = -1
    number: int = 0  # evaluations that it was asked in
    refreshed: int = 0
    reused: int = 0
    bytes: int = 0
    peak_bytes: int = 0

    def begin(self, clock: Any, interval: int) -> None:
        """A call of this evaluation; at the first one forgets all after a restart, what is too old to serve, and
        streams that did not come back."""
        if clock.evaluation == self.evaluation:
            return
        self.evaluation, self.number = clock.evaluation, self.number + 1
        oldest = self.number - UNUSED * clock.evaluations_a_step
        for name, entry in list(self.kept.items()):
            if clock.restarts != self.restarts or clock.step - entry.step >= interval or entry.used < oldest:
                self.drop(name)
        self.restarts = clock.restarts

    def drop(self, name: Any) -> None:
        entry = self.kept.pop(name, None)
        self.bytes -= entry.bytes if entry else 0

    def keep(self, name: Any, entry: Kept) -> None:
        self.kept[name] = entry
        self.bytes += entry.bytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)


@dataclass(frozen=True)
class Rettention:
    """pattern and density as _static.build takes them; interval: steps from refresh to refresh, 1: always dense."""

    density: float = 0.0625
    pattern: str = "band_per_frame"
    interval: int = 5
    ramp: float = 0.04
    clamp_ratio: bool = True
    residual: bool = True
    reshape: bool = True
    cache_device: str = "gpu"
    cache_dtype: str = "model"
    spatial: ClassVar[bool] = True  # means nothing where tokens have no places
    phases: ClassVar[int] = 2  # a rehearsal meets a refresh, then a reuse

    def __post_init__(self):
        if self.pattern not in _static.PATTERNS:
            raise ValueError(f"Unknown pattern {self.pattern!r}. Use one of {', '.join(_static.PATTERNS)}.")
        if not 0 < self.density <= 1 or self.interval < 1:
            raise ValueError(
                f"Rettention needs a density above 0, at most 1, and interval >= 1, got {self.density} and {self.interval}."
            )

    def begin(self) -> State:
        return State()

    def attend(self, state: State, call: AttentionCall) -> Answer:
        q, keys = call.q, call.forward.keys
        if self.interval == 1:
            raise Decline("interval 1 is dense attention")
        layout = call.places()
        if q.shape[0] % len(keys):
            raise Decline("rows cannot be told apart by prompt")
        bias = call.served_bias()
        plan = self._plan(state, layout, q.device)
        if plan.dense:
            raise Decline("the pattern spans the picture")
        clock, rows = call.forward.run.clock, q.shape[0] * q.shape[1]
        state.begin(clock, self.interval)
        names = _names(call)
        kept = [state.kept[name] for name in names if name in state.kept]
        fits = q.shape[0] // len(keys), *q.shape[1:], q.dtype, q.device
        if len(kept) == len(names) and all(entry.plan is plan and entry.fits == fits for entry in kept):
            out = self._reuse(state, call, plan, kept, bias)
            return Answer(out, rows * plan.computed, rows * plan.dense_pairs, lambda: self.picture(layout))
        out = self._refresh(state, call, plan, dict.fromkeys(names, fits), bias)
        # one pass looks twice at the blocks where the rule decides; two passes look twice at all that is listed
        twice = plan.computed if bias is not None or gathers(q.device) else plan.partly
        pairs = rows * (plan.dense_pairs + twice)
        return Answer(out, pairs, rows * plan.dense_pairs, lambda: self.picture(layout))

    def picture(self, layout: Layout) -> Picture:
        note = f"The pattern of a reuse; a refresh computes all pairs. {WHOLE_BLOCKS}"
        return Picture(lambda: _static.shares(layout, self.pattern, self.density), note=note)

    def typical(self, state: State, call: AttentionCall) -> bool:
        """Whether this call will be a reuse: those are the ones that shall be faster than dense attention."""
        step = call.forward.run.clock.step
        return all(name in state.kept and step - state.kept[name].step < self.interval for name in _names(call))

    def held_bytes(self, elements: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes that one block keeps on the model's device, for elements = B N H D of its attention's output."""
        if self.interval == 1 or self.density >= 1:
            return 0
        size = (dtype if self.cache_dtype == "model" else getattr(torch, self.cache_dtype)).itemsize
        residual = elements * size if self.residual and self.cache_device == "gpu" else 0
        return residual + elements // head_dim * 4

    def facts(self, state: State) -> dict[str, Any]:
        return {"refreshed": state.refreshed, "reused": state.reused, "peak_bytes": state.peak_bytes}

    def line(self, facts: dict[str, Any]) -> str:
        return f"refreshed {facts['refreshed']}, reused {facts['reused']}, held {facts['peak_bytes'] / 2**20:.1f} MiB"

    def _plan(self, state: State, layout: Layout, device: torch.device) -> _static.StaticPlan:
        key = layout.grid, layout.image.start, layout.total, device
        if key not in state.plans:
            state.plans[key] = _static.build(layout, self.pattern, self.density, device=device)
        return state.plans[key]

    def _refresh(self, state: State, call: AttentionCall, plan, names: dict[Any, tuple], bias) -> torch.Tensor:
        for name in names:  # what is replaced is freed before its successor is made
            state.drop(name)
        full, lse_full, part, lse = _static.refresh(plan, call.q, call.k, call.v, call.scale, bias)
        ratio = (lse - lse_full).exp_().nan_to_num_(0.0).float()  # a query that sees nothing: -inf twice
        residual = self._rest(full, part, ratio) if self.residual else None
        shares = ratio.chunk(len(names))
        rests = [None] * len(names) if residual is None else residual.chunk(len(names))
        for (name, fits), share, rest in zip(names.items(), shares, rests, strict=True):
            state.keep(name, Kept(share, rest, plan, fits, call.forward.run.clock.step, state.number))
        state.refreshed += 1
        return full

    def _rest(self, full: torch.Tensor, part: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
        """R [B, H, N, D] as it is kept; formed in fp32."""
        wide = torch.promote_types(full.dtype, torch.float32)
        share = ratio[..., None] if self.reshape else 1.0
        rest = full.to(wide) - part.to(wide) * share
        dtype = full.dtype if self.cache_dtype == "model" else getattr(torch, self.cache_dtype)
        return rest.to(full.device if self.cache_device == "gpu" else self.cache_device, dtype)

    def _reuse(self, state: State, call: AttentionCall, plan, kept: list[Kept], bias) -> torch.Tensor:
        factor = torch.cat([self._ratio(entry, plan) for entry in kept]) if self.reshape else None
        residual = None
        if self.residual:
            residual = _joined([entry.residual for entry in kept if entry.residual is not None]).to(call.q.device)
        for entry in kept:
            entry.used, entry.reuses = state.number, entry.reuses + 1
        state.reused += 1
        return _static.listed(plan, call.q, call.k, call.v, call.scale, bias, factor, residual)

    def _ratio(self, entry: Kept, plan: _static.StaticPlan) -> torch.Tensor:
        """rho of this reuse, fp32 [B, H, N]."""
        ratio = entry.ratio.clone()
        rows = ratio[:, :, plan.layout.image].add_(entry.reuses * self.ramp)
        if self.clamp_ratio:
            rows.clamp_max_(1.0)
        return ratio


def _names(call: AttentionCall) -> list[Any]:
    """Keys of State.kept for the streams of this call."""
    number = call.block.number
    place = number, call.forward.calls.get(number, 0), call.forward.run.clock.series
    return [(*place, key) for key in call.forward.keys]


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Chunks along the batch as one tensor; without a copy where they still lie one after the other in one memory."""
    first, at = parts[0], parts[0].storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or part.storage_offset() != at:
            return torch.cat(parts)
        at += part.shape[0] * part.stride(0)
    return first.as_strided((sum(len(x) for x in parts), *first.shape[1:]), first.stride())
