"""Where a file of weights lies and what it is, before a byte of it is believed."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

CONVERTER = "convert it with `python -m scripts.convert_checkpoint`"


class Damaged(ValueError):
    """A file that is not read. `why` goes on after its name and names the tensor where one is at fault."""

    def __init__(self, file: str, why: str):
        super().__init__(f"{file} cannot be read: {why}.")
        self.file, self.why = file, why


@dataclass(frozen=True)
class Stamp:
    """What tells a file from another one that has taken its place."""

    size: int
    modified: int  # ns
    inode: int


def shown(name: str) -> str:
    """A tensor's name as a sentence can hold it."""
    return name if name.isprintable() and len(name) <= 120 else ascii(name[:120])


def stamp(path: Path) -> Stamp:
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise Damaged(path.name, getattr(error, "strerror", None) or str(error)) from error
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ino)


def opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise Damaged(path.name, error.strerror or str(error)) from error


def find(path: str | Path, roots: Iterable[str | Path] = ()) -> tuple[Path, Stamp]:
    """(path, stamp) of an ordinary file; one that lies outside of all roots, also through a link, is refused where roots
    are given."""
    path, roots = Path(path), [os.path.realpath(root) for root in roots]
    found = stamp(path)
    if not path.is_file():
        raise Damaged(path.name, "it is no ordinary file")
    real = os.path.realpath(path)
    if roots and not any(real.startswith(os.path.join(root, "")) for root in roots):
        raise Damaged(path.name, "it lies outside of ComfyUI's model folders; move it there or add its folder to them")
    return path, found


def foreign(head: bytes, wanted: str) -> str | None:
    """What a file's first bytes say it is, with the remedy, where that is not the kind wanted (safetensors or GGUF)."""
    if head.startswith(b"PK\x03\x04"):
        return f"it is a zip archive (a checkpoint of torch.save under another name); {CONVERTER}"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and head[2:8].strip(b"\0"):
        return f"it is a pickle (an old checkpoint under another name); {CONVERTER}"
    if head.lstrip()[:14].lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page in place of the file; download it again"
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS in place of the file; fetch the file itself (git lfs pull)"
    if head.startswith(b"GGUF") and wanted != "GGUF":
        return "it is a GGUF file; give it the ending .gguf"
    if head[8:9] == b"{" and wanted == "GGUF":
        return "it is a safetensors file; give it the ending .safetensors"
    return None


class Mapped:
    """The bytes of one file, mapped and not copied; who writes into them changes his copy of a page, never the file. A
    file that another program cuts short while it is mapped ends the process at the next look beyond its new end: that
    is why every tensor asks first whether it still is the same file."""

    def __init__(self, path: Path, known: Stamp):
        self.path, self.stamp = path, known
        self.same()
        try:
            storage = torch.UntypedStorage.from_file(str(path), False, known.size)
        except (RuntimeError, OSError) as error:
            raise Damaged(path.name, f"it cannot be mapped into memory ({str(error).splitlines()[0]})") from error
        self.same()
        self.all = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]

    def same(self) -> None:
        """Raises where the file has been replaced or written since its header was read."""
        if stamp(self.path) != self.stamp:
            raise Damaged(self.path.name, "it was replaced or written while it was being loaded; load it again")

    def tensor(self, start: int, stop: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """Bytes start..stop as a tensor; a copy only where they do not lie on a multiple of the dtype's size."""
        self.same()
        data = self.all[start:stop]
        if dtype == torch.bool:
            return (data != 0).view(shape)  # bytes other than 0 and 1 are no truth values
        if start % dtype.itemsize:
            data = data.clone()
        return data.view(dtype).view(shape)
