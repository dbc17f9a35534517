"""VIDEO_STATE: what a block sampler needs to go on with a clip, on the CPU."""

from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io

VideoStateSocket = io.Custom("TESSERA_VIDEO_STATE")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A clip up to its newest finished block. latent [B, C, frames, H, W] fp32 as the model sees it; tensors and facts are
    the memory's own."""

    latent: torch.Tensor
    boundaries: list[int]  # 0 .. frames
    model: str  # class of the diffusion model
    memory: str  # class of the memory
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]

    @property
    def frames(self) -> int:
        return self.boundaries[-1]


class VideoState:
    """What goes from node to node: filled by the run of the sampler that it came with, empty before."""

    def __init__(self, snapshot: Snapshot | None = None):
        self.snapshot = snapshot

    def taken(self, what: str) -> Snapshot:
        """ValueError where nothing was kept."""
        if self.snapshot is None:
            raise ValueError(
                f"{what} got an empty video state: its sampler has not run, or keep_state is off. Switch keep_state on and connect "
                "the sampler's latent."
            )
        return self.snapshot
