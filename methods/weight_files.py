"""The one reader of trained weights that nodes take as safetensors files."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from .files.finite import finite
from .files.header import read_header
from .files.place import Damaged

Chosen = Callable[[Mapping[str, tuple[int, ...]]], Iterable[str]]


def read_weights(
    path: str | Path, remedy: str, chosen: Chosen | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors by key, metadata), held in memory. chosen: sees the shape of every tensor, and gives the keys of those to
    read. ValueError, one sentence with the file's name and the remedy, where it is damaged, no safetensors file, or what
    is read holds numbers that are not finite."""
    path = Path(path)
    try:
        header = read_header(path)
        data = header.map()
        entries = header.tensors
        if chosen is not None:
            entries = {key: entries[key] for key in chosen({key: e.shape for key, e in entries.items()})}
        tensors = {key: data.tensor(e.start, e.stop, e.dtype, e.shape).clone() for key, e in entries.items()}
    except Damaged as error:
        raise ValueError(f"{path.name} is damaged or no safetensors file ({error.why}); {remedy}.") from error
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{path.name}: {key} holds {str(tensor.dtype)[6:]} and not floating point; {remedy}.")
        if not finite(tensor):
            raise ValueError(f"{path.name}: {key} {[*tensor.shape]} is not finite; {remedy}.")
    return tensors, header.metadata
