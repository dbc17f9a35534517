"""Writes a safetensors file tensor by tensor, so that no more than one of them is in memory, and whole or not at all."""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from types import TracebackType

import torch

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
ALIGN = 8


class SafetensorsWriter:
    """with SafetensorsWriter(path, metadata) as out: out.add(name, tensor). The file appears under its name when the
    block ends without an exception; until then, and after an interrupt, what was there before is untouched."""

    def __init__(self, path: str | Path, metadata: dict[str, str]):
        self.path, self.metadata = Path(path), metadata
        self.entries: dict[str, dict] = {}
        self.bytes = 0

    def __enter__(self) -> "SafetensorsWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, self.body = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.stem}.", suffix=".part")
        self.file = os.fdopen(handle, "wb")
        return self

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Raises ValueError for a name that is there already."""
        if name in self.entries:
            raise ValueError(f"{self.path.name} holds {name} already.")
        raw = tensor.detach().to("cpu").contiguous().reshape(-1)
        start, size = self.bytes, raw.numel() * raw.element_size()
        if size:
            self.file.write(memoryview(raw.view(torch.uint8).numpy()))
        self.bytes += size
        self.entries[name] = {
            "dtype": NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, self.bytes],
        }  # fmt: skip

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.file.close()
        whole = f"{self.body}.whole"
        try:
            if kind is None:
                self._finish(whole)
                os.replace(whole, self.path)
        finally:
            for left in (self.body, whole):
                with contextlib.suppress(OSError):
                    os.remove(left)

    def _finish(self, whole: str) -> None:
        """Header and body in one file: the header's length is known only now."""
        header = json.dumps({"__metadata__": self.metadata, **self.entries}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % ALIGN)
        with open(whole, "wb") as out, open(self.body, "rb") as body:
            out.write(len(header).to_bytes(8, "little") + header)
            while chunk := body.read(1 << 24):
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
