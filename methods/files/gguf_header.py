"""Headers of GGUF files, checked whole before a tensor is read.

"GGUF", version 2 or 3, number of tensors, number of metadata entries; the entries (name, type, value); for each tensor
name, dimensions (innermost first), type and offset; then, at a multiple of the alignment, the tensors' bytes, each padded
to the alignment (ggml's docs/gguf.md). Little-endian."""

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .header import MOST_TENSORS
from .place import Damaged, Stamp, find, foreign, opened, shown

MOST_ENTRIES = 65_536  # of metadata
MOST_TEXT = 16 << 20  # bytes of one text
MOST_BYTES = 100_000_000  # of all metadata
MOST_KEPT = 4_096  # elements of an array that is kept; longer ones (vocabularies) are counted and left out
MOST_WALKED = 2_000_000  # elements of arrays that have to be read one by one
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
BOOL, TEXT, ARRAY = 7, 8, 9
TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 8: "Q8_0", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 30: "BF16"}  # that are read
BLOCKS = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q8_0": (32, 34), "Q4_K": (256, 144),
          "Q5_K": (256, 176), "Q6_K": (256, 210)}  # fmt: skip
OTHERS = {
    3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
    18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip


@dataclass(frozen=True)
class GgufEntry:
    """One tensor: its type, its shape in torch's order, and its bytes counted from the file's beginning."""

    type: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class GgufHeader:
    path: Path
    stamp: Stamp
    version: int
    metadata: dict[str, Any]  # numbers, truth values, texts and tuples of them
    left_out: dict[str, int]  # long arrays of metadata: elements
    tensors: dict[str, GgufEntry]  # in the order of their bytes


@dataclass
class _Cursor:
    """Reads on; what would go past the file's end is refused before it is read or allocated."""

    file: BinaryIO
    name: str
    size: int
    at: int = 0
    walked: int = 0

    def need(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise Damaged(
                self.name,
                f"{what} ends after the end of the file of {self.size:,} bytes: an incomplete download, or damaged",
            )

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        self.at += count
        return self.file.read(count)

    def skip(self, count: int, what: str) -> None:
        self.need(count, what)
        self.at += count
        self.file.seek(self.at)

    def number(self, kind: str, what: str) -> Any:
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind), what))[0]

    def text(self, what: str, most: int = MOST_TEXT) -> str:
        length = self.number("Q", what)
        if length > most:
            raise Damaged(self.name, f"{what} is said to have {length:,} bytes, at most {most:,} are read")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise Damaged(self.name, f"{what} is not UTF-8 text") from error


def read_gguf_header(path: str | Path, roots: Iterable[str | Path] = ()) -> GgufHeader:
    """The checked header. ValueError (Damaged), one sentence, for everything that is not a whole GGUF file of known types,
    or that lies outside of the roots where some are given."""
    path, stamp = find(path, roots)
    with opened(path) as file:
        cursor = _Cursor(file, path.name, stamp.size)
        version = _begin(cursor)
        tensors, entries = cursor.number("Q", "its header"), cursor.number("Q", "its header")
        # the shortest tensor takes 24 bytes of header, the shortest entry 13
        for count, least, most, what in (
            (tensors, 24, MOST_TENSORS, "tensors"),
            (entries, 13, MOST_ENTRIES, "entries of metadata"),
        ):
            if count > most or count * least > stamp.size:
                raise Damaged(
                    path.name,
                    f"it is said to hold {count:,} {what}, at most {most:,} are read, in its {stamp.size:,} bytes",
                )
        metadata, left_out = _metadata(cursor, entries)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise Damaged(path.name, f"its alignment is {str(alignment)[:40]} and not a power of two up to 1,048,576")
        infos = [_tensor(cursor) for _ in range(tensors)]
        base = -(-cursor.at // alignment) * alignment
    found = _places(path.name, infos, base, alignment, stamp.size)
    return GgufHeader(path, stamp, version, metadata, left_out, found)


def _begin(cursor: _Cursor) -> int:
    """Magic and version."""
    head = cursor.file.read(64)
    cursor.file.seek(0)
    if why := foreign(head, "GGUF"):
        raise Damaged(cursor.name, why)
    if cursor.take(4, "its header") != b"GGUF":
        raise Damaged(cursor.name, "it does not begin with GGUF: no GGUF file, or damaged")
    version = cursor.number("I", "its header")
    if version in (2 << 24, 3 << 24):
        raise Damaged(cursor.name, "it is big-endian, and only little-endian GGUF files are read; convert it again")
    if version not in (2, 3):
        raise Damaged(cursor.name, f"it is GGUF version {version}, and versions 2 and 3 are read; convert it again")
    return version


def _metadata(cursor: _Cursor, count: int) -> tuple[dict[str, Any], dict[str, int]]:
    """(entries by name, elements of the arrays that were left out)."""
    kept: dict[str, Any] = {}
    left_out: dict[str, int] = {}
    for _ in range(count):
        if cursor.at > MOST_BYTES:
            raise Damaged(cursor.name, f"its metadata takes more than {MOST_BYTES:,} bytes")
        name = cursor.text("a name in its metadata", 65_535)
        if name in kept or name in left_out:
            raise Damaged(cursor.name, f"its metadata lists {shown(name)} twice")
        what = f"its metadata {shown(name)}"
        kind = cursor.number("I", what)
        if kind != ARRAY:
            kept[name] = _value(cursor, kind, what)
            continue
        kind, length = cursor.number("I", what), cursor.number("Q", what)
        if kind not in SCALARS and kind != TEXT:
            raise Damaged(cursor.name, f"{what} is an array of type {kind}; numbers and texts are read")
        cursor.need(length * (8 if kind == TEXT else struct.calcsize("<" + SCALARS[kind])), what)
        if length > MOST_KEPT and kind != TEXT:
            cursor.skip(length * struct.calcsize("<" + SCALARS[kind]), what)
            left_out[name] = length
            continue
        cursor.walked += length
        if cursor.walked > MOST_WALKED:
            raise Damaged(cursor.name, f"{what} is the last of arrays with more than {MOST_WALKED:,} elements in all")
        if length <= MOST_KEPT:
            kept[name] = tuple(_value(cursor, kind, what) for _ in range(length))
            continue
        left_out[name] = length
        for _ in range(length):
            cursor.skip(cursor.number("Q", what), what)
    return kept, left_out


def _value(cursor: _Cursor, kind: int, what: str) -> Any:
    if kind == TEXT:
        return cursor.text(what)
    if kind not in SCALARS:
        raise Damaged(cursor.name, f"{what} has the type {kind}, which GGUF does not have")
    value = cursor.number(SCALARS[kind], what)
    if kind == BOOL:
        if value > 1:
            raise Damaged(cursor.name, f"{what} is the truth value {value}")
        return bool(value)
    return value


def _tensor(cursor: _Cursor) -> tuple[str, str, tuple[int, ...], int]:
    """(name, type, shape in torch's order, offset in the data)."""
    name = cursor.text("a tensor's name", 65_535)
    what = f"tensor {shown(name)}"
    dims = cursor.number("I", what)
    if dims > 8:
        raise Damaged(cursor.name, f"{what} is said to have {dims} dimensions, at most 8 are read")
    shape = tuple(cursor.number("Q", what) for _ in range(dims))[::-1]
    kind, offset = cursor.number("I", what), cursor.number("Q", what)
    if any(size == 0 or size >= 1 << 63 for size in shape) or math.prod(shape) >= 1 << 60:
        raise Damaged(cursor.name, f"{what} has the shape {[*shape]}; sizes are at least 1 and fit into a file")
    if kind not in TYPES:
        other = OTHERS.get(kind, f"number {kind}")
        raise Damaged(
            cursor.name, f"{what} has the type {other}; read are {', '.join(BLOCKS)}. Take a file of those types"
        )
    block = BLOCKS[TYPES[kind]][0]
    if (shape[-1] if shape else 1) % block:
        raise Damaged(cursor.name, f"{what} {TYPES[kind]} {[*shape]} does not divide into blocks of {block} columns")
    return name, TYPES[kind], shape, offset


def _places(file: str, infos: list, base: int, alignment: int, size: int) -> dict[str, GgufEntry]:
    """Tensors in the order of their bytes: each begins where the one before, padded, ends."""
    found: dict[str, GgufEntry] = {}
    reached, last = base, "the header"
    for name, kind, shape, offset in sorted(infos, key=lambda info: info[3]):
        what = f"tensor {shown(name)}"
        if name in found:
            raise Damaged(file, f"it lists {what} twice")
        block, of_block = BLOCKS[kind]
        start, stop = base + offset, base + offset + math.prod(shape) // block * of_block
        if offset % alignment:
            raise Damaged(file, f"{what} begins at {offset:,}, and its data is aligned to {alignment}")
        if start < reached:
            raise Damaged(file, f"{what} overlaps {last} by {reached - start:,} bytes")
        if start > reached:
            raise Damaged(file, f"{start - reached:,} bytes between {last} and {what} belong to none")
        if stop > size:
            raise Damaged(
                file,
                f"{what} ends {stop - size:,} bytes after the end of the file: an incomplete download; download it again",
            )
        found[name] = GgufEntry(kind, shape, start, stop)
        reached, last = -(-stop // alignment) * alignment, what
    if size > reached:
        raise Damaged(file, f"{size - reached:,} bytes follow {last} and belong to no tensor")
    return found
