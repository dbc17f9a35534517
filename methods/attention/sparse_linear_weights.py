"""Projections of the linear branch of Sparse-Linear Attention as safetensors files. Three key formats are read:

    blocks.{i}.self_attn.attn_op.local_attn.proj_l.{weight,bias}   TurboDiffusion, whole Wan checkpoints (TurboWan)
    blocks.{i}.attn1.attn_impl.proj_l.{weight,bias}                the same models as FastVideo exports them
    blocks.{n}.proj_l.{weight,bias}                                ours, n the number in the whole stack of blocks

Ours carry metadata that says for which model and settings they were fitted; nothing else may stand in such a file."""

import json
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT, VERSION = "tessera_sparse_linear", "1"
OFFICIAL = {"variant": "main", "feature_map": "softmax"}  # what the released models were trained with
FORMATS = (
    r"(?:model\.diffusion_model\.|diffusion_model\.)?blocks\.(\d{1,4})\.self_attn\.attn_op\.local_attn\.proj_l\.(weight|bias)",
    r"(?:model\.diffusion_model\.|diffusion_model\.)?blocks\.(\d{1,4})\.attn1\.attn_impl\.proj_l\.(weight|bias)",
    r"blocks\.(\d{1,4})\.proj_l\.(weight|bias)",
)
TENSORS = 1 << 16  # more than any released checkpoint holds
HEAD = 1024  # features of a head
NOTES = 1 << 16  # characters of our metadata


@dataclass(frozen=True, eq=False)
class Projections:
    """Per block number: weight [D, D] and bias [D], shared by its heads. settings: those of the method that they were
    made for; model: which model, empty for released files."""

    name: str
    blocks: dict[int, tuple[torch.Tensor, torch.Tensor]]
    settings: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


def read(path: str | Path) -> Projections:
    """ValueError, naming the file, for one that is damaged or no such file. Only the projections are read."""
    path = Path(path)
    try:
        with safe_open(str(path), "pt") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            if len(names) > TENSORS:
                raise ValueError(f"{path.name} has {len(names)} tensors; no projection file has so many.")
            found = _named(path.name, names)
            _check_shapes(path.name, {key: file.get_slice(key) for key in found.values()}, found)
            tensors = {place: file.get_tensor(key) for place, key in found.items()}
    except SafetensorError as error:
        raise ValueError(
            f"{path.name} is damaged or no safetensors file ({error}); download or fit it again."
        ) from error
    for (number, part), tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path.name}: the {part} of block {number} is not finite; download or fit it again.")
    numbers = sorted({number for number, _ in tensors})
    blocks = {n: (tensors[n, "weight"], tensors[n, "bias"]) for n in numbers}
    if metadata.get("format") != FORMAT:
        if numbers != list(range(len(numbers))):
            raise ValueError(
                f"{path.name} has projections of blocks {_ranges(numbers)}, not of all; download it again."
            )
        return Projections(path.name, blocks, OFFICIAL)
    if len(names) != len(found):
        extra = sorted(set(names) - set(found.values()))
        raise ValueError(f"{path.name} has {len(extra)} tensors that do not belong there, e.g. {extra[0]!r}.")
    return Projections(path.name, blocks, *_metadata(path.name, metadata))


def _named(file: str, names: list[str]) -> dict[tuple[int, str], str]:
    """(block number, weight or bias) -> key. ValueError where none is there, or not both of each block."""
    for pattern in FORMATS:
        matches = {name: match for name in names if (match := re.fullmatch(pattern, name))}
        if not matches:
            continue
        found = {(int(m[1]), m[2]): name for name, m in matches.items()}
        unknown = sorted(name for name in names if "proj_l." in name and name not in matches)
        if unknown or len(found) != len(matches):
            raise ValueError(f"{file} mixes key formats, e.g. {(unknown or sorted(matches))[0]!r}; download it again.")
        alone = sorted(f"{n}" for n, part in found if (n, {"weight": "bias", "bias": "weight"}[part]) not in found)
        if alone:
            raise ValueError(f"{file} lacks the weight or the bias of blocks {', '.join(alone)}; download it again.")
        return found
    raise ValueError(
        f"{file} holds no projections (…proj_l.weight and …proj_l.bias). Choose a TurboWan checkpoint or a file of "
        "Calibrate Sparse-Linear Attention."
    )


def _check_shapes(file: str, slices: dict[str, Any], found: dict[tuple[int, str], str]) -> None:
    """ValueError where a tensor's type or shape does not fit, before it is read."""
    width = slices[next(iter(found.values()))].get_shape()[-1:]
    for (_, part), key in found.items():
        shape, kind = slices[key].get_shape(), slices[key].get_dtype()
        want = width * 2 if part == "weight" else width
        if shape != want or not shape or not 1 <= shape[0] <= HEAD or kind not in ("F32", "F16", "BF16", "F64"):
            raise ValueError(
                f"{file}: {key} is {kind} {shape}, which is no {part} of a projection of one head (float, "
                f"{'[D, D]' if part == 'weight' else '[D]'}, the same D for all blocks)."
            )


def _metadata(file: str, metadata: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings, model) of a file of ours."""
    parts: list[dict[str, Any]] = []
    for name in ("settings", "model"):
        text = metadata.get(name, "")
        try:
            part = json.loads(text) if len(text) <= NOTES else None
        except (ValueError, RecursionError):
            part = None
        plain = isinstance(part, dict) and all(isinstance(x, str | int | float) for x in part.values())
        if not isinstance(part, dict) or not plain or metadata.get("version") != VERSION:
            raise ValueError(f"{file}: its metadata {name!r} cannot be read (version {VERSION}); fit it again.")
        parts.append(part)
    return parts[0], parts[1]


def write(path: str | Path, projections: Projections) -> None:
    """Writes our format beside `path`, then renames: a reader never sees half a file."""
    path = Path(path)
    tensors = {
        f"blocks.{n}.proj_l.{part}": x.float().contiguous().cpu()
        for n, pair in projections.blocks.items()
        for part, x in zip(("weight", "bias"), pair, strict=True)
    }
    metadata = {"format": FORMAT, "version": VERSION}
    metadata |= {name: json.dumps(getattr(projections, name), sort_keys=True) for name in ("settings", "model")}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def fits(projections: Projections, settings: dict[str, Any], model: dict[str, Any]) -> list[str]:
    """What differs between the settings and model of a node and those that the projections were made for, in warnings;
    ValueError where the linear branch would be another operator, or the model another one."""
    name = projections.name
    for key in ("variant", "feature_map"):
        if projections.settings.get(key, settings[key]) != settings[key]:
            raise ValueError(
                f"{name} was made for {key} {projections.settings[key]}, the node says {settings[key]}. "
                f"Set {key} to {projections.settings[key]}, or choose another file."
            )
    for key in ("architecture", "blocks"):
        if projections.model.get(key, model[key]) != model[key]:
            raise ValueError(
                f"{name} was fitted on {projections.model.get('architecture')} with "
                f"{projections.model.get('blocks')} blocks, this is {model['architecture']} with {model['blocks']}. "
                "Choose weights that were made for this model."
            )
    beyond = sorted(n for n in projections.blocks if n >= model["blocks"])
    if beyond or (not projections.model and len(projections.blocks) != model["blocks"]):
        raise ValueError(
            f"{name} has projections of blocks {_ranges(sorted(projections.blocks))}, this {model['architecture']} has "
            f"{model['blocks']} blocks. Choose weights that were made for this model."
        )
    told = [f"{key} {projections.settings[key]} (now {settings[key]})" for key in settings
            if projections.settings.get(key, settings[key]) != settings[key]]  # fmt: skip
    if projections.model.get("shapes", model["shapes"]) != model["shapes"]:
        told.append("a model whose tensors have other names or shapes")
    return told


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    out: list[list[int]] = []
    for n in numbers:
        if out and n == out[-1][1] + 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in out)
