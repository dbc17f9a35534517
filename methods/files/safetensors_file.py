"""Tensors of a safetensors file, read when they are asked for: views of the mapped file, nothing is copied."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from .finite import check_scales, is_scale, sample, warning
from .header import read_header


class SafetensorsFile(Mapping[str, torch.Tensor]):
    """The tensors by name. Opening checks the header whole, and that all scales are finite; `warnings` are sentences
    about weights that are not, found by sample. ValueError, one sentence with the file's name, for a damaged file."""

    def __init__(self, path: str | Path, roots: Iterable[str | Path] = ()):
        self.header = read_header(path, roots)
        self.path, self.metadata = self.header.path, self.header.metadata
        self._bytes = self.header.map()
        bad = []
        for name, entry in self.header.tensors.items():
            if not entry.dtype.is_floating_point:
                continue
            if is_scale(name):
                check_scales(self.path.name, name, self[name])
            elif not sample(self[name]):
                bad.append(name)
        self.warnings = [warning(bad)] if bad else []

    def __getitem__(self, name: str) -> torch.Tensor:
        """A view of the file. Raises ValueError where the file has been replaced since it was opened."""
        entry = self.header.tensors[name]
        return self._bytes.tensor(entry.start, entry.stop, entry.dtype, entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.header.tensors)

    def __len__(self) -> int:
        return len(self.header.tensors)
