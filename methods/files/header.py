"""Headers of safetensors files, checked whole before a tensor is read: 8 bytes with the header's length, the header as
JSON (tensor: dtype, shape, data_offsets; __metadata__: text by name), then the tensors' bytes without holes.

Every refusal is one sentence with the file's name, and the tensor's where one is at fault. The library safetensors checks
most of this too; its messages name neither, and it takes any number of tensors."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .place import Damaged, Mapped, Stamp, find, foreign, opened, shown

MOST_BYTES = 100_000_000  # of a header, as the format's own library
MOST_TENSORS = 65_536
MOST_VALUES = 4_000_000  # commas and opening brackets in a header: bounds what parsing it allocates
_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "I16": "int16",
    "U16": "uint16", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32",
    "I64": "int64", "U64": "uint64", "F64": "float64", "C64": "complex64",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, kind) for name, kind in _NAMES.items() if hasattr(torch, kind)}
FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; start and stop count bytes from the file's beginning."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    path: Path
    stamp: Stamp
    metadata: dict[str, str]
    tensors: dict[str, Entry]  # in the order of their bytes

    def map(self) -> Mapped:
        """The file's bytes, where it still is the file of this header."""
        return Mapped(self.path, self.stamp)


def read_header(path: str | Path, roots: Iterable[str | Path] = ()) -> Header:
    """The checked header. ValueError (Damaged), one sentence, for everything that is not a whole safetensors file, or that
    lies outside of the roots where some are given."""
    path, stamp = find(path, roots)
    with opened(path) as file:
        head = file.read(64)
        if why := foreign(head, "safetensors"):
            raise Damaged(path.name, why)
        if len(head) < 8:
            raise Damaged(path.name, f"it has {len(head)} bytes, an incomplete download; download it again")
        length = int.from_bytes(head[:8], "little")
        if length > MOST_BYTES:
            raise Damaged(
                path.name,
                f"its header is said to take {length:,} bytes, at most {MOST_BYTES:,} are read: no safetensors file, or "
                "damaged",
            )
        if 8 + length > stamp.size:
            raise Damaged(
                path.name,
                f"its header is said to take {length:,} bytes and the file has {stamp.size:,}: an incomplete download, "
                "or no safetensors file",
            )
        file.seek(8)
        raw = file.read(length)
    parsed = _parse(path.name, raw)
    metadata = _metadata(path.name, parsed.pop("__metadata__", {}))
    if len(parsed) > MOST_TENSORS:
        raise Damaged(path.name, f"it lists {len(parsed):,} tensors, at most {MOST_TENSORS:,} are read")
    entries = {name: _entry(path.name, name, value, 8 + length) for name, value in parsed.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    _cover(path.name, ordered, 8 + length, stamp.size)
    return Header(path, stamp, metadata, ordered)


def _parse(file: str, raw: bytes) -> dict[str, Any]:
    """The header's outermost object."""
    values = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if values > MOST_VALUES:
        raise Damaged(file, f"its header holds {values:,} values, at most {MOST_VALUES:,} are read")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise Damaged(file, f"its header lists {shown(twice)} twice")
        return made

    def none(text: str):
        raise Damaged(file, f"its header holds the number {text[:40]}, and offsets and sizes are whole")

    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_float=none, parse_constant=none)
    except UnicodeDecodeError as error:
        raise Damaged(file, "its header is not UTF-8 text: no safetensors file, or damaged") from error
    except RecursionError as error:
        raise Damaged(file, "its header nests deeper than any safetensors file") from error
    except Damaged:
        raise
    except ValueError as error:  # not JSON, or a number of thousands of digits
        raise Damaged(file, f"its header is not JSON ({str(error)[:80]}): no safetensors file, or damaged") from error
    if not isinstance(parsed, dict):
        raise Damaged(file, f"its header is a {type(parsed).__name__} and not an object")
    return parsed


def _metadata(file: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise Damaged(file, f"its __metadata__ is a {type(value).__name__} and not an object")
    for name, text in value.items():
        if not isinstance(text, str):
            raise Damaged(file, f"its metadata {shown(name)} is a {type(text).__name__} and not text")
    return value


def _sizes(value: Any, count: int | None = None) -> bool:
    """Whether the value is a list of whole numbers below 2^63 and not negative, as many as count where it is given."""
    return (
        isinstance(value, list)
        and count in (None, len(value))
        and all(type(size) is int and 0 <= size < 1 << 63 for size in value)
    )


def _entry(file: str, name: str, value: Any, base: int) -> Entry:
    tensor = f"tensor {shown(name)}"
    if not isinstance(value, dict) or set(value) != FIELDS:
        got = ", ".join(sorted(map(shown, value)))[:120] if isinstance(value, dict) else type(value).__name__
        raise Damaged(file, f"{tensor} needs dtype, shape and data_offsets, and has {got or 'nothing'}")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise Damaged(file, f"{tensor} has the type {ascii(kind)[:40]}; known are {', '.join(DTYPES)}")
    if not _sizes(shape) or len(shape) > 32:
        raise Damaged(file, f"{tensor} has the shape {str(shape)[:80]}, and sizes are whole and not negative")
    if not _sizes(offsets, 2) or offsets[0] > offsets[1]:
        raise Damaged(file, f"{tensor} has the data_offsets {str(offsets)[:80]}, and they need a start and a later end")
    needed = DTYPES[kind].itemsize
    for size in shape:
        needed *= size
    if needed >= 1 << 63:
        raise Damaged(file, f"{tensor} {str(shape)[:80]} is larger than any file")
    if offsets[1] - offsets[0] != needed:
        raise Damaged(file, f"{tensor} {kind} {shape} takes {needed:,} bytes and is given {offsets[1] - offsets[0]:,}")
    return Entry(DTYPES[kind], tuple(shape), base + offsets[0], base + offsets[1])


def _cover(file: str, entries: dict[str, Entry], base: int, size: int) -> None:
    """The tensors, in order, lie end to end from the header to the file's end."""
    reached, last = base, "the header"
    for name, entry in entries.items():
        if entry.start < reached:
            raise Damaged(file, f"tensor {shown(name)} overlaps {last} by {reached - entry.start:,} bytes")
        if entry.start > reached:
            raise Damaged(
                file, f"{entry.start - reached:,} bytes between {last} and tensor {shown(name)} belong to none"
            )
        reached, last = entry.stop, f"tensor {shown(name)}"
        if reached > size:
            raise Damaged(
                file,
                f"{last} ends {reached - size:,} bytes after the end of the file: an incomplete download; download it again",
            )
    if reached < size:
        raise Damaged(file, f"{size - reached:,} bytes follow {last} and belong to no tensor")
