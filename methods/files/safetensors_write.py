"""Writes a safetensors file tensor by tensor, so that no more than one of them is in memory, and whole or not at all."""

import contextlib
import json
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
ALIGN = 8
OF_EACH = 320  # bytes of the header for one tensor


class SafetensorsWriter:
    """with SafetensorsWriter(path, metadata, count) as out: out.add(name, tensor). The file appears under its name when the
    block ends without an exception; until then, and after an interrupt, what was there before is untouched. count: of
    tensors at most; the header's place is reserved for so many, and what it does not need stays spaces."""

    def __init__(self, path: str | Path, metadata: dict[str, str], count: int):
        self.path, self.metadata = Path(path), metadata
        self.entries: dict[str, dict[str, Any]] = {}
        room = len(json.dumps(metadata)) + 1024 + count * OF_EACH
        self.room, self.bytes = room + -room % ALIGN, 0

    def __enter__(self) -> "SafetensorsWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.part = self.path.parent / f".{self.path.stem}.{secrets.token_hex(6)}.part"
        self.file = open(self.part, "xb")  # not mkstemp, whose files nobody else may read
        self.file.seek(8 + self.room)
        return self

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Raises ValueError for a name that is there already."""
        if name in self.entries:
            raise ValueError(f"{self.path.name} holds {name} already.")
        raw = tensor.detach().to("cpu").contiguous().reshape(-1)
        start, size = self.bytes, raw.numel() * raw.element_size()
        if size:
            self.file.write(raw.view(torch.uint8).numpy().data)
        self.bytes += size
        self.entries[name] = {
            "dtype": NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, self.bytes],
        }  # fmt: skip

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        try:
            with self.file:
                if kind is None:
                    self._finish()
            if kind is None:
                os.replace(self.part, self.path)
        finally:
            with contextlib.suppress(OSError):
                os.remove(self.part)

    def _finish(self) -> None:
        header = json.dumps({"__metadata__": self.metadata, **self.entries}, separators=(",", ":")).encode()
        if len(header) > self.room:
            raise ValueError(f"{self.path.name} got {len(self.entries)} tensors, more than were told of.")
        self.file.seek(0)
        self.file.write(self.room.to_bytes(8, "little") + header.ljust(self.room))
        self.file.flush()
        os.fsync(self.file.fileno())
