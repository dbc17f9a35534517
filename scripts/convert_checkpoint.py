"""Turns a checkpoint of torch.save (.pt, .pth, .ckpt, .bin) into the safetensors file that the loaders take:

    python -m scripts.convert_checkpoint in.pt out.safetensors [--key ema]

Nothing in the file is run (weights_only). Where it holds several sets of weights, --key says which; every entry that is
left out is printed. The output appears whole or not at all."""

import argparse
import collections
import importlib
import importlib.util
import json
import os
import pickle
import struct
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
MOST_PICKLE = 100_000_000  # bytes of the pickle that lists a checkpoint's tensors
MOST_ENTRIES = 200_000  # of an archive
DEPTH = 3  # dictionaries within dictionaries that are searched for weights
TOP = "."  # --key of the outermost dictionary
AGAIN = "download it again"


def pack(module: str):
    """A module of the pack, whatever its folder is called; none of ComfyUI is needed."""
    if "tessera" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "tessera", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        assert spec and spec.loader
        sys.modules["tessera"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["tessera"])
    return importlib.import_module(f"tessera.{module}")


def check_archive(path: Path) -> None:
    """ValueError for everything but an archive of torch.save whose parts, unpacked, are no larger than the file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(64)
    if head[8:9] == b"{" or head.startswith(b"GGUF"):
        raise ValueError(f"{path.name} is no checkpoint of torch.save; the loaders take it as it is.")
    if not head.startswith(b"PK\x03\x04"):
        old = head[:1] == b"\x80"
        told = "is a checkpoint in torch's format from before 1.6" if old else "is no checkpoint of torch.save"
        raise ValueError(f"{path.name} {told}; where you trust its source, load it with torch and save it again.")
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise ValueError(f"{path.name} is an incomplete or damaged archive ({error}); {AGAIN}.") from error
    if len(parts) > MOST_ENTRIES:
        raise ValueError(f"{path.name} has {len(parts):,} parts, at most {MOST_ENTRIES:,} are read.")
    names = [part.filename.partition("/")[2] for part in parts]
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise ValueError(f"{path.name} is a TorchScript program and no checkpoint; take the release's weights.")
    packed = next((part for part in parts if part.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise ValueError(f"{path.name} is compressed ({packed.filename[:80]!r}), as no checkpoint of torch.save is.")
    total = sum(part.file_size for part in parts)
    if total > size:
        raise ValueError(f"{path.name} claims {total:,} bytes of content and has {size:,}; {AGAIN}.")
    pickles = [part for part, name in zip(parts, names, strict=True) if name == "data.pkl"]
    if len(pickles) != 1 or pickles[0].file_size > MOST_PICKLE:
        raise ValueError(f"{path.name} is an archive, but not one of torch.save; {AGAIN}.")


def load(path: Path) -> Any:
    """What the checkpoint holds, tensors mapped. ValueError, one sentence, where reading it would need code."""
    check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        why = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), "")
        raise ValueError(
            f"{path.name} holds more than weights and would need code of its own to be read; nothing was run"
            f"{f' ({why[:160]})' if why else ''}. Save its state_dict alone where you trust its source."
        ) from error
    except Exception as error:  # torch raises many kinds for damaged archives
        first = (str(error).splitlines() or [""])[0][:160]
        raise ValueError(f"{path.name} is damaged ({type(error).__name__}: {first}); {AGAIN}.") from error


def weights(found: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, dict]]:
    """(key, dictionary) of every dictionary with tensors by name, from the outermost inwards."""
    if not isinstance(found, dict):
        return
    if any(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in found.items()):
        yield "/".join(at) or TOP, found
    if len(at) < DEPTH:
        for name, value in found.items():
            if isinstance(name, str) and isinstance(value, dict):
                yield from weights(value, (*at, name))


def choose(file: str, found: Any, key: str | None) -> tuple[str, dict]:
    """(key, dictionary) of the weights to write. ValueError where there are none, or several and no --key."""
    sets = dict(weights(found))
    listed = ", ".join(f"{name} ({len(sets[name]):,} entries)" for name in [*sets][:12])
    if not sets:
        raise ValueError(f"{file} holds no tensors by name, but a {type(found).__name__}.")
    if key is None and len(sets) == 1:
        return next(iter(sets.items()))
    if key is None:
        raise ValueError(f"{file} holds several sets of weights: {listed}. Say which with --key.")
    if key not in sets:
        raise ValueError(f"{file} holds no weights under {key!r}. It holds {listed}.")
    return key, sets[key]


def checked(file: str, chosen: dict, size: int) -> tuple[dict[str, torch.Tensor], list[str]]:
    """(tensors to write, other entries in words). ValueError for tensors that cannot be written, or that unfold to much
    more than the file has."""
    known = set(pack("methods.files.header").DTYPES.values())
    tensors: dict[str, torch.Tensor] = {}
    others, total = [], 0
    for name, value in chosen.items():
        if not isinstance(value, torch.Tensor):
            others.append(f"{str(name)[:80]} ({type(value).__name__})")
            continue
        told = f"{file}: {str(name)[:120]!r} {str(value.dtype)[6:]} {[*value.shape]}"
        if not isinstance(name, str) or name == "__metadata__":
            raise ValueError(f"{told} has a name that safetensors cannot hold.")
        if (
            value.layout != torch.strided
            or value.device.type != "cpu"
            or value.is_quantized
            or value.dtype not in known
        ):
            kind = value.layout if value.layout != torch.strided else value.device.type
            raise ValueError(f"{told} ({kind}) cannot be written as safetensors.")
        needed = value.numel() * value.dtype.itemsize
        if needed > value.untyped_storage().nbytes():
            raise ValueError(f"{told} is unfolded from {value.untyped_storage().nbytes():,} bytes; save it contiguous.")
        tensors[name], total = value.detach(), total + needed
    if total > 2 * size:
        raise ValueError(
            f"{file} has {size:,} bytes and its tensors unfold to {total:,}; that is no honest checkpoint."
        )
    return tensors, others


def write(tensors: dict[str, torch.Tensor], target: Path) -> None:
    """Writes the tensors beside the target and then in its place, one at a time: what shares memory is written twice."""
    header_file = pack("methods.files.header")
    names = {dtype: name for name, dtype in header_file.DTYPES.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        tensor = tensors[name]
        stop = at + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": names[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [at, stop]}
        at = stop
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    handle, part = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            for name in order:
                whole = tensors[name].resolve_conj().resolve_neg().contiguous().reshape(-1)
                file.write(whole.view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        header_file.read_header(part)
        os.replace(part, target)
    except BaseException:  # an interrupt too leaves nothing behind
        Path(part).unlink(missing_ok=True)
        raise


def left_out(found: dict, key: str) -> list[str]:
    """Entries beside the path to the chosen weights, in words."""
    others: list[str] = []
    way = [] if key == TOP else key.split("/")
    for i, step in enumerate(way):
        above = "".join(f"{name}/" for name in way[:i])
        others += [f"{above}{str(name)[:80]} ({type(value).__name__})" for name, value in found.items() if name != step]
        found = found[step]
    return others


def convert(source: Path, target: Path, key: str | None = None) -> list[str]:
    """Writes the target; what was done, in lines. ValueError, one sentence, where it is refused."""
    if target.suffix != ".safetensors":
        raise ValueError(f"{target.name} must end in .safetensors.")
    if target.exists():
        raise ValueError(f"{target.name} exists already; remove it or give another name.")
    if not source.is_file() or not target.parent.is_dir():
        raise ValueError(
            f"There is no {'folder ' + str(target.parent) if source.is_file() else 'file ' + str(source)}."
        )
    found = load(source)
    name, chosen = choose(source.name, found, key)
    tensors, others = checked(source.name, chosen, source.stat().st_size)
    others += left_out(found, name)
    write(tensors, target)
    sample = pack("methods.files.finite").sample
    kinds = collections.Counter(str(tensor.dtype)[6:] for tensor in tensors.values())
    told = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    under = "" if name == TOP else f" under {name}"
    lines = [f"Wrote {target}: {len(tensors):,} tensors{under} ({told}), {target.stat().st_size:,} bytes."]
    lines += [f"Left out: {', '.join(others)}."] if others else []
    bad = [entry for entry, tensor in tensors.items() if not sample(tensor)]
    return lines + ([f"Not finite: {', '.join(bad[:10])}{' ...' if len(bad) > 10 else ''}."] if bad else [])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Turns a checkpoint of torch.save into safetensors; runs nothing in it."
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--key", help=f"which set of weights, as model/ema; {TOP} is the outermost")
    given = parser.parse_args(arguments)
    try:
        print("\n".join(convert(given.source, given.target, given.key)))
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
