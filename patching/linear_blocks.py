"""What Block Linear Video Sampler leaves on a MODEL, and its SAMPLER."""

from dataclasses import dataclass
from typing import Any

import torch

from .. import archs
from ..methods.sampling import few_step
from ..methods.video import blocks as plan
from .block_features import VideoBlocks
from .block_sampler import BlockSampler
from .block_window import FRAMES
from .linear_memory import STATE_DTYPES, LinearMemory
from .run import Run
from .sana_video import SanaVideo

NAME = "Block Linear Video Sampler"


@dataclass(frozen=True, eq=False)
class LinearBlocks(VideoBlocks):
    """window: chunks, 0 for all; state_dtype: of STATE_DTYPES."""

    name: str = NAME
    state_dtype: str = "fp32"

    def check_model(self, arch, diffusion_model: Any) -> None:
        if not isinstance(archs.original(diffusion_model), SanaVideo):
            raise ValueError(
                f"{self.name} needs a model whose self-attention is linear, and this MODEL is {archs.class_name(diffusion_model)}. "
                "Connect Load SANA-Video, or use Block Video Sampler."
            )
        if diffusion_model.sizes.patch[0] != 1:
            raise ValueError(
                f"{self.name} needs frames that are tokens of their own; this model joins {diffusion_model.sizes.patch[0]} in one."
            )

    def begin(self, run: Run) -> LinearMemory:
        model, positions = run.model.diffusion_model, dict(run.options.get("rope_options") or {})
        memory = LinearMemory(self.name, len(model.transformer_blocks), self.window, self.state_dtype, positions)
        memory.sizes = model.sizes
        return memory

    def held_bytes(self, run: Run, noise_shape: tuple[int, ...], conds: dict[str, Any]) -> int:
        if len(noise_shape) != 5:
            return 0
        sizes, rows = run.model.diffusion_model.sizes, noise_shape[0] * sum(map(len, conds.values()))
        chunks = len(plan.split(noise_shape[FRAMES], self.per_block)) - 1
        ring = min(self.window, chunks) if self.window else 1
        sums = sizes.heads * sizes.head * (sizes.head + 1)
        _, height, width = (-(-side // part) for side, part in zip(noise_shape[FRAMES:], sizes.patch, strict=True))
        frame = height * width * sizes.width * run.dtype.itemsize
        total = sums * torch.float32.itemsize if self.window else 0  # of a ring
        return rows * sizes.layers * (ring * sums * STATE_DTYPES[self.state_dtype].itemsize + total + frame)

    def line(self, facts: dict[str, Any]) -> str:
        if not facts or self.inactive:
            return self.inactive
        return f"went on from {facts['frames_kept']} frames, held {facts['peak_bytes'] / 2**20:,.1f} MiB at most"


@dataclass
class BlockLinearSampler(BlockSampler):
    """levels: the noise levels of every chunk, whatever the graph's sigmas are."""

    levels: tuple[float, ...] = ()

    def sample(self, model_wrap, sigmas, *args, **kwargs):
        return super().sample(model_wrap, sigmas.new_tensor(self.levels), *args, **kwargs)


def levels_of(steps: str, shift: float) -> torch.Tensor:
    """SIGMAS of time steps of 1000, through the shift of a flow, and a last 0. ValueError where they do not fall."""
    found = few_step.numbers(steps, "denoise_steps", 1000)
    return torch.FloatTensor([*(few_step.shifted(t / 1000, shift) for t in found), 0.0])
