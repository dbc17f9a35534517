"""Folders and files of diffusers' models on this disk: which there are, their configs and their weights. Nothing is taken
from a hub and nothing is run. A refusal is one sentence with the file's name."""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..methods.files.finite import sample
from ..methods.files.header import read_header
from ..methods.files.place import shown

log = logging.getLogger("tessera")
CONFIG, INDEX = "config.json", ".safetensors.index.json"
SUFFIX = ".safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
MOST_JSON = 16 << 20  # bytes; the largest index of a released model has 1 MiB
OLD_NAME = "Transformer2DModel"  # one class for several models, before they had their own
OLD = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}


def choices(roots: Iterable[str]) -> dict[str, Path]:
    """Name as a user sees it, below its root -> folder with a config, or safetensors file with a JSON of its name. Of
    equal names the first root's counts."""
    found: dict[str, Path] = {}
    for root in map(Path, roots):
        for folder, folders, files in os.walk(root, followlinks=True):
            folders.sort()
            folders[:] = [name for name in folders if not name.startswith(".")]
            here = Path(folder)
            if CONFIG in files and _transformer(here / CONFIG) and here != root:
                found.setdefault(here.relative_to(root).as_posix(), here)
            for name in sorted(files):
                beside = here / f"{name.removesuffix(SUFFIX)}.json"
                if name.endswith(SUFFIX) and beside.name in files and _transformer(beside):
                    found.setdefault((here / name).relative_to(root).as_posix(), here / name)
    return dict(sorted(found.items()))


def _transformer(path: Path) -> bool:
    """Whether this JSON is the config of some transformer of diffusers, bridged or not."""
    try:
        told = read_json(path).get("_class_name")
    except ValueError:
        return True  # damaged: listed, so that choosing it tells why
    return isinstance(told, str) and "Transformer" in told


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        if path.stat().st_size > MOST_JSON:
            raise ValueError(
                f"{_told(path)} has {path.stat().st_size} bytes, too many for a config. Download it again."
            )
        made = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{_told(path)} is missing. Download it with the model.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{_told(path)} cannot be read as JSON ({error}). Download it again.") from error
    if not isinstance(made, dict):
        raise ValueError(f"{_told(path)} holds a {type(made).__name__} and not an object. Download it again.")
    return made


def _told(path: Path) -> str:
    """A file with its folder, which alone tells configs apart."""
    return f"{path.parent.name}/{path.name}"


def read_config(chosen: Path, known: Iterable[str]) -> tuple[str, dict[str, Any]]:
    """(class name, its config) of a choice. ValueError for classes that are not `known`, and for a config that asks for
    code or for a quantizer of its own."""
    path = chosen / CONFIG if chosen.is_dir() else chosen.with_suffix(".json")
    config = read_json(path)
    if "auto_map" in config:
        raise ValueError(f"{_told(path)} names code to be run (auto_map), which no loader of Tessera runs.")
    if config.get("quantization_config"):
        raise ValueError(f"{_told(path)} asks for a quantizer (quantization_config). Download the model in bf16.")
    name = config.get("_class_name")
    if name == OLD_NAME:
        name = OLD.get(str(config.get("norm_type")), name)
    if name not in tuple(known):
        raise ValueError(f"{_told(path)} is for {name}, which is not bridged. Bridged are {', '.join(sorted(known))}.")
    return str(name), config


def beside(chosen: Path, folder: str, name: str) -> dict[str, Any] | None:
    """A config of the pipeline that a model folder is part of, e.g. scheduler/scheduler_config.json; None where there is
    none."""
    parents = (chosen, chosen.parent) if chosen.is_dir() else (chosen.parent,)
    paths = (parent / folder / name for parent in parents)
    return next((read_json(path) for path in paths if path.is_file()), None)


def weight_files(chosen: Path) -> list[Path]:
    """The safetensors files of a choice."""
    if chosen.is_file():
        return [chosen]
    indexes = sorted(chosen.glob(f"*{INDEX}"))
    if indexes:
        return _shards(min(indexes, key=lambda path: len(path.name)))
    files = sorted(chosen.glob(f"*{SUFFIX}"))
    plain = [path for path in files if path.name == f"diffusion_pytorch_model{SUFFIX}"]
    if plain or len(files) == 1:
        return plain or files
    if files:
        raise ValueError(f"{chosen.name} holds {len(files)} safetensors files and no index. Keep the one to be loaded.")
    pickled = [path.name for path in sorted(chosen.iterdir()) if path.suffix in PICKLED]
    if pickled:
        raise ValueError(
            f"{chosen.name}/{pickled[0]} is pickled, and a pickle can run code: nothing but safetensors is loaded. Convert "
            f"it with python -m scripts.convert_checkpoint."
        )
    raise ValueError(f"{chosen.name} holds a config and no weights. Download its safetensors files.")


def _shards(index: Path) -> list[Path]:
    """The files that an index names."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{_told(index)} has no weight_map. Download it again.")
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(SUFFIX):
            raise ValueError(f"{_told(index)} names {name!r}, which is no safetensors file of this folder.")
        if not (index.parent / name).is_file():
            raise ValueError(
                f"{_told(index.parent / name)} is missing, one of {len(names)} files of this model. Download it."
            )
    return [index.parent / name for name in names]


def read_tensors(
    files: list[Path], wanted: Mapping[str, torch.Size], ignored: Iterable[str] = ()
) -> dict[str, torch.Tensor]:
    """Tensors of these keys and shapes from all files together, mapped and not copied. ValueError where a key is missing,
    unknown, doubled, of another shape or no floating point, before a tensor is touched; keys with a part among `ignored`
    are left out."""
    headers, places = [read_header(path) for path in files], {}
    for header in headers:
        for key, entry in header.tensors.items():
            if key not in wanted and any(part in key for part in ignored):
                continue
            if key not in wanted or key in places:
                why = "a second time" if key in places else "and this class has no such weight"
                raise ValueError(f"{_told(header.path)} holds {shown(key)} {why}. Download it with its own config.")
            if entry.shape != tuple(wanted[key]):
                made = [*wanted[key]]
                raise ValueError(f"{_told(header.path)}: {key} is {[*entry.shape]}, but its config makes it {made}.")
            if not entry.dtype.is_floating_point:
                kind = str(entry.dtype)[6:]
                raise ValueError(
                    f"{_told(header.path)}: {key} holds {kind} and not floating point. Download it in bf16."
                )
            places[key] = header
    lost = sorted(wanted.keys() - places.keys())
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise ValueError(f"{_told(files[-1])} lacks {lost[0]}{more}. Download it again.")
    found = {}
    for header in headers:
        data = header.map()
        for key, entry in header.tensors.items():
            if places.get(key) is header:
                found[key] = data.tensor(entry.start, entry.stop, entry.dtype, entry.shape)
                if not sample(found[key]):
                    log.warning("%s: %s holds numbers that are not finite.", _told(header.path), key)
    return found
