"""What Region-Adaptive Sampling knows during one run: the keys and values of every layer, the last prediction of every
stream, and which tokens the running step computes."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ..methods.cache.region import Grid, measure
from .evaluations import Evaluations
from .forward import Forward, StreamKey
from .region_rows import Place

MAP = 16  # rows and columns of the activity map in reports, at most
UNUSED = 2  # steps after which a stream that did not come back is forgotten: context windows may move every step
FP8 = torch.float8_e4m3fn


@dataclass
class Rows:
    """Keys or values of one layer and stream [b, H, N, D], in fp8 with a scale for each row."""

    data: torch.Tensor
    scale: torch.Tensor | None = None  # [b, H, N, 1] fp32

    @classmethod
    def of(cls, rows: torch.Tensor, dtype: torch.dtype | None, device: str | torch.device | None = None) -> "Rows":
        """A copy in this precision, on this device; None: the rows' own."""
        rows = rows if device is None else rows.to(device)
        if dtype is not FP8:
            return cls(rows.to(dtype or rows.dtype, copy=True, memory_format=torch.contiguous_format))
        scale = rows.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / torch.finfo(FP8).max
        return cls((rows.float() / scale).to(FP8), scale)

    def write(self, rows: torch.Tensor, at: torch.Tensor) -> None:
        """rows [b, H, M, D] in the place of those at [b, M]."""
        new, at = Rows.of(rows, self.data.dtype, self.data.device), at.to(self.data.device)
        at = at[:, None, :, None].expand(-1, rows.shape[1], -1, -1)
        held, added = (t.view(torch.uint8) if t.dtype == FP8 else t for t in (self.data, new.data))
        held.scatter_(2, at.expand(-1, -1, -1, rows.shape[-1]), added)
        if self.scale is not None and new.scale is not None:
            self.scale.scatter_(2, at, new.scale)

    def read(self, dtype: torch.dtype, device: str | torch.device | None = None) -> torch.Tensor:
        held = self.data.to(dtype) if self.scale is None else (self.data.float() * self.scale).to(dtype)
        return held if device is None else held.to(device)

    @property
    def held(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.data, self.scale) if t is not None)


@dataclass
class Lane:
    """The tokens of one latent, for all of its prompts; of each context window, if there are any."""

    samples: int
    grid: Grid | None = None
    patch: Grid = (1, 1, 1)
    step: int = -1
    active: torch.Tensor | None = None  # int64 [b, M], of this step; None: all
    left_out: torch.Tensor | None = None  # fp32 [b, N], steps since each was computed
    always: torch.Tensor | None = None  # bool [b, N]
    least: int = 0  # the most of them that a sample has
    measured: dict[StreamKey, tuple[int, torch.Tensor]] = field(default_factory=dict)  # (evaluation, metric [b, N])
    activity: torch.Tensor | None = None  # fp32 [N]: steps that computed each, mean over samples
    steps: int = 0

    def measure(self, key: StreamKey, v, before, metric: str, active, evaluation: int) -> None:
        """Takes note of a stream's prediction v [b, C, ...]; `before` is the one before it."""
        if self.grid is None:
            return
        found = measure(v, before, metric, self.patch)
        if metric == "delta_norm" and active is not None and key in self.measured:
            held = self.measured[key][1]  # a token that was left out has not changed: its last change stands
            found = held.scatter(-1, active, found.gather(-1, active))
        self.measured[key] = evaluation, found


@dataclass
class Call:
    """One call of the model, while it lasts."""

    lane: Lane
    active: torch.Tensor | None
    stores: bool  # whether keys and values of this dense call may be wanted
    started: bool = False
    place: Place | None = None  # in the block being computed
    nth: int = 0  # attention calls of that block so far
    reason: str | None = None  # why its keys and values must not be used
    filled: set[int] = field(default_factory=set)  # blocks whose keys and values were stored
    rows: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def places(self, start: int, total: int, streams: int) -> torch.Tensor:
        """Rows that are computed of a sequence of `total` tokens with the image at `start`: [M'] where the whole batch
        shares them, else [B, M']. `streams` conditions are in the batch."""
        if (start, total) not in self.rows:
            assert self.active is not None and self.lane.left_out is not None
            tokens, b = self.lane.left_out.shape[-1], self.active.shape[0]
            every = torch.arange(total, device=self.active.device).expand(b, -1)
            rows = torch.cat((every[:, :start], self.active + start, every[:, start + tokens :]), -1)
            self.rows[start, total] = rows[0] if b == 1 else rows.repeat(streams, 1)
        return self.rows[start, total]


@dataclass
class RegionState(Evaluations):
    """One run."""

    sparse: list[bool]  # whether each step may leave tokens out
    lanes: dict[Any, Lane] = field(default_factory=dict)
    kept: dict[StreamKey, dict[tuple[int, int], tuple[Rows, Rows]]] = field(default_factory=dict)  # by block, nth call
    velocity: dict[StreamKey, torch.Tensor] = field(default_factory=dict)
    used: dict[StreamKey, int] = field(default_factory=dict)  # evaluation of each stream's newest prediction
    filled: set[StreamKey] = field(default_factory=set)  # streams of which every layer is kept
    calls: dict[int, Call] = field(default_factory=dict)  # by forward, while it lasts
    computed: int = 0  # image tokens, over rows and calls
    tokens: int = 0
    peak_bytes: int = 0
    reasons: dict[str, int] = field(default_factory=dict)  # why calls were computed in full

    def open(self, run) -> None:
        """The entry of a new evaluation."""
        if self.begins(run):
            self._forget(self.evaluation - UNUSED * run.clock.evaluations_a_step)

    def restarted(self, run) -> None:
        self.lanes.clear()
        self._forget(run.clock.evaluation + 1)

    def _forget(self, before: int) -> None:
        for key in [k for k, at in self.used.items() if at < before]:
            for held in (self.used, self.velocity, self.kept):
                held.pop(key, None)
            self.filled.discard(key)
            for lane in self.lanes.values():
                lane.measured.pop(key, None)

    def lane(self, forward: Forward) -> Lane:
        key = forward.keys[0]
        return self.lanes.setdefault((key.window, key.shape, key.device), Lane(key.shape[0]))

    def ready(self, forward: Forward) -> bool:
        """Whether every stream of this call has a prediction and all keys and values."""
        return all(key in self.filled and key in self.velocity for key in forward.keys)

    def keep(self, key: StreamKey, at: tuple[int, int], k, v, dtype: torch.dtype | None, device=None) -> None:
        self.kept.setdefault(key, {})[at] = Rows.of(k, dtype, device), Rows.of(v, dtype, device)

    def full(self, keys: tuple[StreamKey, ...], of, rows: torch.Tensor, image: slice, total: int, active: torch.Tensor):
        """Keys or values [B, H, M', D] of computed tokens, of (block, nth call) and which of the two -> those of all
        [B, H, total, D], the kept ones brought up to date."""
        at, which = of
        count, end = len(keys), image.start + active.shape[-1]
        full = rows.new_empty(*rows.shape[:2], total, rows.shape[3])
        full[:, :, : image.start], full[:, :, image.stop :] = rows[:, :, : image.start], rows[:, :, end:]
        computed = rows[:, :, image.start : end].chunk(count)
        for key, new, out in zip(keys, computed, full.chunk(count), strict=True):
            kept = self.kept[key][at][which]
            kept.write(new, active)
            out[:, :, image] = kept.read(rows.dtype, rows.device)
        return full

    def settled(self, forward: Forward, call: Call, blocks: int) -> None:
        """After a dense call: its keys and values may be used if every block told them."""
        if call.reason is None and call.stores and len(call.filled) < blocks:
            call.reason = "the attention of some blocks could not be reached"
        for key in forward.keys:
            if call.stores and call.reason is None:
                self.filled.add(key)
            else:
                self.filled.discard(key)
                self.kept.pop(key, None)
        if call.reason is not None:
            self.reasons[call.reason] = self.reasons.get(call.reason, 0) + 1
        self.peak_bytes = max(self.peak_bytes, self.bytes_held)

    @property
    def bytes_held(self) -> int:
        return sum(r.held for layers in self.kept.values() for pair in layers.values() for r in pair)


def activity_map(state: RegionState) -> list[list[float]]:
    """Share of steps that computed each region of the largest picture, mean over frames and samples: rows of 0 to 1."""
    lanes = [lane for lane in state.lanes.values() if lane.grid is not None and lane.steps]
    if not lanes:
        return []
    lane = max(lanes, key=lambda found: math.prod(found.grid))
    picture = (lane.activity / lane.steps).unflatten(0, lane.grid).mean(0)[None]
    size = [min(MAP, n) for n in picture.shape[-2:]]
    small = torch.nn.functional.adaptive_avg_pool2d(picture, size)[0]
    return [[round(value, 2) for value in row] for row in small.tolist()]
