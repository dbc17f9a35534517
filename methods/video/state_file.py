"""A clip that can be gone on with, and its file: the finished latent, the memory's tensors, and facts as JSON text."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files.finite import finite
from ..files.header import read_header
from ..files.place import Damaged
from ..files.safetensors_write import SafetensorsWriter

SUFFIX = ".video_state.safetensors"
FORMAT = "1"
LATENT, MEMORY = "latent", "memory."
REMEDY = "save it again with Save Video State"


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

    def told(self) -> str:
        """One line about it."""
        held = sum(t.numel() * t.element_size() for t in self.tensors.values())
        size = " x ".join(map(str, self.latent.shape))
        return (
            f"{self.model}, {self.frames} frames in {len(self.boundaries) - 1} blocks, latent {size}, "
            f"{self.memory} of {held / 2**20:,.1f} MiB"
        )


def save(path: Path, snapshot: Snapshot) -> None:
    """Whole or not at all."""
    about = {name: getattr(snapshot, name) for name in ("boundaries", "model", "memory", "facts")}
    metadata = {"tessera_video_state": FORMAT, "about": json.dumps(about)}
    with SafetensorsWriter(path, metadata, 1 + len(snapshot.tensors)) as out:
        out.add(LATENT, snapshot.latent)
        for name, tensor in snapshot.tensors.items():
            out.add(MEMORY + name, tensor)


def load(path: Path) -> Snapshot:
    """ValueError, one sentence with the file's name, for what Save Video State did not write."""
    try:
        header = read_header(path)
        data = header.map()
        read = {key: data.tensor(e.start, e.stop, e.dtype, e.shape).clone() for key, e in header.tensors.items()}
    except Damaged as error:
        raise ValueError(f"{path.name} is damaged or no safetensors file ({error.why}); {REMEDY}.") from error
    about, latent = _about(header.metadata), read.pop(LATENT, None)
    if about is None or latent is None or latent.ndim != 5 or not all(key.startswith(MEMORY) for key in read):
        raise ValueError(f"{path.name} is no video state; {REMEDY}.")
    boundaries = about["boundaries"]
    if boundaries[-1] != latent.shape[2]:
        raise ValueError(f"{path.name} tells of {boundaries[-1]} frames and holds {latent.shape[2]}; {REMEDY}.")
    for key, tensor in {LATENT: latent, **read}.items():
        if tensor.is_floating_point() and not finite(tensor):
            raise ValueError(f"{path.name}: {key} {[*tensor.shape]} is not finite; {REMEDY}.")
    tensors = {key.removeprefix(MEMORY): tensor for key, tensor in read.items()}
    return Snapshot(latent.float(), boundaries, about["model"], about["memory"], tensors, about["facts"])


def _about(metadata: dict[str, str]) -> dict[str, Any] | None:
    """None where it is not what `save` writes."""
    if metadata.get("tessera_video_state") != FORMAT:
        return None
    try:
        about = json.loads(metadata.get("about", ""))
    except ValueError:
        return None
    kinds = {"boundaries": list, "model": str, "memory": str, "facts": dict}
    if not isinstance(about, dict) or any(not isinstance(about.get(name), kind) for name, kind in kinds.items()):
        return None
    ends = about["boundaries"]
    rising = len(ends) > 1 and all(type(n) is int for n in ends) and ends[0] == 0 and ends == sorted(set(ends))
    return about if rising else None
