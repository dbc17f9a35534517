"""Writes GGUF files from the format's description, right or wrong on purpose; knows nothing of the reader."""

import struct
from dataclasses import dataclass, field
from pathlib import Path

TYPE = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "BF16": 30}
PACK = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def value(kind: int, content) -> bytes:
    """A metadata value; kind 9 takes (element type, list)."""
    if kind == 8:
        return text(content)
    if kind == 9:
        of, items = content
        return struct.pack("<IQ", of, len(items)) + b"".join(value(of, item) for item in items)
    return struct.pack("<" + PACK[kind], content)


@dataclass
class Made:
    """A GGUF file in the making; every count and offset can be set wrong."""

    metadata: list = field(default_factory=list)  # (name, kind, content)
    tensors: list = field(default_factory=list)  # (name, shape in torch's order, type, bytes)
    alignment: int = 32
    version: int = 3
    magic: bytes = b"GGUF"
    counts: tuple[int | None, int | None] = (None, None)
    offsets: dict = field(default_factory=dict)  # tensor: offset in place of the right one
    dims: dict = field(default_factory=dict)  # tensor: dimensions in place of the right ones
    types: dict = field(default_factory=dict)
    padded: bool = True

    def bytes(self) -> bytes:
        head = self.magic + struct.pack("<I", self.version)
        head += struct.pack("<Q", len(self.tensors) if self.counts[0] is None else self.counts[0])
        head += struct.pack("<Q", len(self.metadata) if self.counts[1] is None else self.counts[1])
        for name, kind, content in self.metadata:
            head += text(name) + struct.pack("<I", kind) + value(kind, content)
        body = b""
        for i, (name, shape, kind, data) in enumerate(self.tensors):
            dims = self.dims.get(name, tuple(reversed(shape)))
            number = self.types.get(name, TYPE.get(kind))
            head += text(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
            head += struct.pack("<IQ", number, self.offsets.get(name, len(body)))
            last = i == len(self.tensors) - 1
            body += data + b"\0" * (-len(data) % self.alignment if self.padded or not last else 0)
        return head + b"\0" * (-len(head) % self.alignment) + body

    def write(self, path: Path) -> Path:
        path.write_bytes(self.bytes())
        return path
