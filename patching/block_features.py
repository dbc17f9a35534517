"""What the Block Video Sampler leaves on a MODEL: the memory of a run, where its sampler finds it."""

from dataclasses import dataclass
from typing import Any

import torch

from ..methods.video import blocks as plan
from .attention_around import PastFeature
from .block_memory import CURRENT, Block, BlockMemory
from .block_window import FRAMES
from .blocks import positions
from .forward import Forward, NetworkFeature, PartFeature
from .key_memory import STORED, KeyMemory
from .memory import grid_of
from .run import RUN, Feature, Run
from .sizes import heads_of

NAME = "Block Video Sampler"
MEMORIES = ("keys", "frames")


@dataclass(frozen=True, eq=False)
class VideoBlocks(Feature):
    """One application of the node. per_block, sink: frames; window: blocks."""

    for_sampler = True
    name: str = NAME
    per_block: int = 3
    window: int = 0
    sink: int = 0

    def conflicts(self, other: Feature) -> str | None:
        if isinstance(other, VideoBlocks):
            return f"{self.name} is on this MODEL already. Take one of them off."
        return None

    def shown(self, noise_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The first block is the largest."""
        if len(noise_shape) != 5:
            return noise_shape
        most = plan.split(noise_shape[FRAMES], self.per_block, self.lead)[1] + self.sink * (self.lead > 0)
        return (*noise_shape[:FRAMES], min(most, noise_shape[FRAMES]), *noise_shape[FRAMES + 1 :])

    @property
    def lead(self) -> int:
        """Frames that the first block has more than the others."""
        return 0

    def memory(self, guider: Any, options: dict[str, Any]) -> BlockMemory:
        """What its SAMPLER asks for at the start of a run."""
        run: Run | None = options.get(RUN)
        found = run.states.get(self) if run is not None else None
        if found is None:
            raise ValueError(
                f"{self.name}: its sampler was given a MODEL that does not come from the same node. Connect the node's model output "
                "to the guider."
            )
        return found

    def facts(self, state: Any) -> dict[str, Any]:
        return {"frames_kept": state.frames, "peak_bytes": state.most}

    def line(self, facts: dict[str, Any]) -> str:
        if not facts or self.inactive:
            return self.inactive
        return f"looks back on {facts['frames_kept']} frames, held {facts['peak_bytes'] / 2**20:,.1f} MiB at most"


@dataclass(frozen=True, eq=False)
class KeyBlocks(VideoBlocks, PastFeature):
    """Memory "keys"."""

    stored: str = "model dtype"
    keep_on: str = "device"

    def check_arch(self, arch, class_name: str) -> None:
        if arch is None or arch.shifts_time is None:
            raise ValueError(
                f"{self.name} with memory keys moves frames to their place in the clip, which {arch.name if arch else class_name} does "
                "not let it do. Use it with Wan 2.1 or 2.2, Wan VACE or Kandinsky 5."
            )

    def conflicts(self, other: Feature) -> str | None:
        if isinstance(other, PartFeature):
            return f"{self.name} keeps the keys of whole frames, and {other.name} computes them in parts. Take one of them off."
        return super().conflicts(other)

    def begin(self, run: Run) -> KeyMemory:
        memory = KeyMemory(self.name, self.window, self.sink, self.stored, "cpu" if self.keep_on == "cpu" else None)
        if run.arch is not None:
            network = run.model.diffusion_model
            memory.sizes = len(positions(run.arch, network)), *heads_of(network)
        return memory

    def prepare(self, run: Run, noise_shape: tuple[int, ...]) -> None:
        if run.arch is not None and run.arch.shifts_time is not None:
            run.states[self].scales = run.arch.shifts_time(run.model.diffusion_model, noise_shape)

    def with_past(self, state: KeyMemory, forward, place, k, v):
        return state.with_past(forward, place, k, v) if CURRENT in forward.options else (k, v)

    def held_bytes(self, run: Run, noise_shape: tuple[int, ...], conds: dict[str, Any]) -> int:
        if len(noise_shape) != 5 or self.keep_on == "cpu":
            return 0
        frames, (heads, width) = noise_shape[FRAMES], heads_of(run.model.diffusion_model)
        if self.window:
            frames = min(frames, self.sink + (self.window + 1) * plan.split(frames, self.per_block)[1])
        grid = grid_of(run, (*noise_shape[:FRAMES], frames, *noise_shape[FRAMES + 1 :]))
        if grid is None:
            return 0
        rows = noise_shape[0] * sum(map(len, conds.values()))
        size = run.dtype.itemsize if STORED[self.stored] == "auto" else 1
        blocks = sum(len(getattr(run.model.diffusion_model, s.path)) for s in run.arch.blocks) if run.arch else 0
        return 2 * rows * blocks * grid[0] * grid[1] * grid[2] * heads * width * size


class FrameMemory(BlockMemory):
    """The last finished frames stay in the sequence, clean: for models that were trained to go on from a clean start.
    lead: of them, and so many more the first block has, so that all sequences are as long; positions begin at 0 in each."""

    commits = False

    def __init__(self, lead: int, sink: int):
        self.lead, self.sink = lead, sink
        self.frames = self.most = 0

    def prefix(self, boundaries: list[int], first: int) -> list[int]:
        return [frame for frame in range(first) if frame >= first - self.lead or frame < self.sink]

    def open(self, options: dict[str, Any], block: Block) -> None:
        self.frames = len(block.prefix)

    def finished(self, block: Block) -> None:
        """Nothing is kept beside the finished frames."""

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return {}, {"lead": self.lead, "sink": self.sink}

    def restore(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any], device: torch.device) -> None:
        """The finished frames are all of it."""

    def held_bytes(self) -> int:
        return 0


@dataclass(frozen=True, eq=False)
class FrameBlocks(VideoBlocks, NetworkFeature):
    """Memory "frames"."""

    def check_arch(self, arch, class_name: str) -> None:
        if arch is None or class_name not in arch.frame_times:
            raise ValueError(
                f"{self.name} with memory frames gives each frame its own time step, which {class_name} does not take. Use it with "
                "Wan 2.1 or 2.2 without VACE or camera."
            )

    def begin(self, run: Run) -> FrameMemory:
        return FrameMemory(self.lead, self.sink)

    @property
    def lead(self) -> int:
        return max(self.window, 1) * self.per_block

    def other_inputs(self, state: FrameMemory, forward: Forward) -> dict[str, Any]:
        """Time step 0 for the finished frames."""
        block, t = forward.options.get(CURRENT), forward.inputs.get("timestep")
        if block is None or not block.prefix or t is None:
            return {}
        frames = len(block.prefix) + block.last - block.first
        t = t.clone() if t.ndim == 2 else t[:, None].repeat(1, frames)
        t[:, : len(block.prefix)] = 0
        return {"timestep": t}


def feature_of(
    memory: str, node: str | None, per_block: int, window: int, sink: int, stored: str, keep_on: str
) -> VideoBlocks:
    """By the node's choice of a memory."""
    plain = {"node": node, "per_block": per_block, "window": window, "sink": sink}
    return KeyBlocks(**plain, stored=stored, keep_on=keep_on) if memory == "keys" else FrameBlocks(**plain)
