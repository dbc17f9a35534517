"""The one reader of trained weights that nodes take as safetensors files."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open


def read_weights(path: str | Path, remedy: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors by key, metadata). ValueError, one sentence with the file's name and the remedy, where it is damaged, no
    safetensors file, or holds numbers that are not finite."""
    path = Path(path)
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged or no safetensors file ({error}); {remedy}.") from error
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{path.name}: {key} holds {str(tensor.dtype)[6:]} and not floating point; {remedy}.")
        if not tensor.isfinite().all():
            raise ValueError(f"{path.name}: {key} {[*tensor.shape]} is not finite; {remedy}.")
    return tensors, metadata
