"""Launch parameters by GPU: kernels/configs/<architecture>.json holds {operation: {bits of the dtype: {width: entry}}}.
A width is what the kernel pads to (a head size, a channel count); an entry is that kernel's own (tile, warps, stages).
bench/aot.py compiles what each named table gives and refuses spills and too much shared memory; default.json serves
every other GPU, with tiles small enough for 64 KiB.

scripts/tune_kernels.py measures on the user's own GPU and writes a user table, which comes first while the sources of
the kernels are those that were measured."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
FAMILY = {"sm87": "sm86", "sm101": "sm100", "sm103": "sm100", "sm110": "sm100", "sm121": "sm120"}
FAMILY |= dict.fromkeys(("gfx940", "gfx941", "gfx950"), "gfx942")

Key = tuple[str, int, int]  # operation, bits of the dtype, width
_forced: dict[Key, dict[str, Any]] = {}  # of the whole process: a backward pass looks up in threads of its own
_asked: list[set[Key]] = []


@cache
def architecture(device: torch.device) -> str:
    """ "sm90", "gfx942" and so on; "default" for anything that is no CUDA or ROCm device."""
    if device.type != "cuda":
        return "default"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm{properties.major}{properties.minor}"


@cache
def _table(name: str) -> dict[str, Any]:
    path = HERE / "configs" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


@cache
def sources() -> str:
    """A hash of every kernel source: numbers measured with other sources are not used."""
    found = hashlib.sha256()
    for path in sorted(HERE.rglob("*.py")):
        found.update(path.relative_to(HERE).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]


HEADS = (64, 72, 128)  # of the models most in use: each is compiled at every run of the tests


def user_table(device: torch.device) -> Path:
    """Where the measurements of this GPU and this Triton lie: below $TESSERA_TABLES or ~/.tessera/tables."""
    import triton

    folder = Path(os.environ.get("TESSERA_TABLES") or Path.home() / ".tessera" / "tables")
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return folder / f"{name}-triton-{triton.__version__}.json"


def read_user_table(path: Path) -> dict[str, Any]:
    """{operation: {bits: {width: entry}}}; empty where there is none, or it was measured with other sources."""
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return held.get("entries", {}) if held.get("sources") == sources() else {}


@cache
def _measured(device: torch.device) -> dict[str, Any]:
    return read_user_table(user_table(device)) if device.type == "cuda" else {}


def _fit(table: dict[str, Any], key: Key) -> dict[str, Any] | None:
    """The entry of the smallest listed width that holds the wanted one."""
    rows = table.get(key[0], {}).get(str(key[1]), {})
    fits = [int(w) for w in rows if int(w) >= key[2]]
    return rows[str(min(fits))] if fits else None


def entry(operation: str, name: str, bits: int, width: int) -> dict[str, Any]:
    """Parameters of `operation` on the architecture `name`: its own table, its family's, at last default.json; there
    the smallest listed width that holds `width`. KeyError when none does."""
    for table in (name, FAMILY.get(name, name), "default"):
        found = _fit(_table(table), (operation, bits, width))
        if found:
            return found
    raise KeyError(f"kernels/configs has no entry of {operation} for {bits}-bit inputs of width {width}.")


def lookup(operation: str, x: torch.Tensor, width: int) -> dict[str, Any]:
    """What a launcher takes for the device and dtype of x: a forced entry, the user's own measurement, or entry()."""
    key = operation, 8 * x.element_size(), width
    for asked in _asked:
        asked.add(key)
    measured = _measured(x.device).get(operation, {}).get(str(key[1]), {}).get(str(width))
    return _forced.get(key) or measured or entry(operation, architecture(x.device), *key[1:])


@contextmanager
def forced(entries: dict[Key, dict[str, Any]]) -> Iterator[None]:
    """Within it, lookups of these keys give these entries."""
    before = dict(_forced)
    _forced.update(entries)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextmanager
def recorded() -> Iterator[set[Key]]:
    """Gives the set of keys that are looked up within it."""
    asked: set[Key] = set()
    _asked.append(asked)
    try:
        yield asked
    finally:
        _asked.remove(asked)


def tables() -> list[str]:
    """Architectures that have a table of their own."""
    return sorted(path.stem for path in (HERE / "configs").glob("*.json") if path.stem != "default")


def left_out(d: int, count: int) -> bool | tuple[str, ...]:
    """The architectures on which heads of d are compiled by `bench/aot.py --all` only (True: on all). Every run compiles
    `count` of the sizes in HEADS on each of them, in turn, so that every size is compiled somewhere."""
    if d not in HEADS:
        return True
    return tuple(name for i, name in enumerate(tables()) if (HEADS.index(d) - i) % len(HEADS) >= count)
