"""LoRA files as ComfyUI reads them, layer by layer: every key layout and every kind of adapter that its Load LoRA takes."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.model_patcher
import comfy.utils
import comfy.weight_adapter
import torch

from .. import archs
from ..methods.control.lora_gram import Delta, Factors, Piece, features, gram, joined
from ..methods.files.finite import finite
from ..methods.quant.calibration import Statistics
from .blocks import block_path, positions
from .forwards import cleared
from .weights import plain_weight

TEXT = ("lora_te", "text_encoder", "te_", "te1_", "te2_", "conditioner.")  # how keys of text encoders begin
TURNS = (comfy.weight_adapter.OFTAdapter, comfy.weight_adapter.BOFTAdapter)  # not linear in their strength
READS = (*TURNS, comfy.weight_adapter.GLoRAAdapter)  # their delta depends on the weight
Key = str | tuple[Any, ...]  # a tensor of the model, or (tensor, offset, function)


@dataclass(frozen=True)
class Lora:
    """One file against one MODEL."""

    name: str
    patches: Mapping[Key, Any]  # of the diffusion model, as add_patches takes them
    text: Mapping[Key, Any] = field(default_factory=dict)  # of the text encoder that was given
    unused_text: int = 0  # its tensors for text encoders that were not given
    unknown: tuple[str, ...] = ()  # its other keys that fit nothing here


def read(path: str, model: Any, clip: Any = None) -> Lora:
    """ValueError, one sentence, where the file is damaged or made for another base model."""
    name = Path(path).name
    try:
        tensors = comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(path, safe_load=True))
    except Exception as error:  # of safetensors, pickle or the converter, each with its own kinds
        raise ValueError(f"{name} is damaged or no LoRA file ({error}); download it again.") from error
    broken = next((k for k, v in tensors.items() if v.is_floating_point() and not finite(v)), None)
    if broken is not None:
        raise ValueError(f"{name}: {broken} {[*tensors[broken].shape]} is not finite; download it again.")
    patches = _patches(name, tensors, comfy.lora.model_lora_keys_unet(cleared(model), {}))
    text = {} if clip is None else _patches(name, tensors, comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}))
    there = model.model.state_dict().keys()
    patches = {key: patch for key, patch in patches.items() if tensor_of(key) in there}
    used = set().union(*(getattr(p, "loaded_keys", ()) for p in (*patches.values(), *text.values())))
    rest = [key for key in tensors if key not in used]
    of_text = [key for key in rest if key.startswith(TEXT)]
    if not patches and not text:
        kind = archs.class_name(model.model.diffusion_model)
        if rest and len(of_text) == len(rest):
            remedy = "Connect clip to load them" if clip is None else "Take a LoRA of the same base model"
            raise ValueError(f"{name} holds layers of a text encoder alone, such as {rest[0]}. {remedy}.")
        raise ValueError(
            f"{name} fits no layer of this MODEL ({kind}); its keys are like {next(iter(tensors), 'none')}. Take a LoRA of the "
            "same base model."
        )
    for key, patch in patches.items():
        _check(name, model, key, patch)
    plain = any(
        not hasattr(p, "loaded_keys") for p in (*patches.values(), *text.values())
    )  # whose keys core does not tell
    unknown = () if plain else tuple(key for key in rest if not key.startswith(TEXT))
    return Lora(name, patches, text, len(of_text) if clip is None else 0, unknown)


def _patches(name: str, tensors: dict[str, torch.Tensor], keys: dict[str, Key]) -> dict[Key, Any]:
    try:
        return comfy.lora.load_lora(tensors, keys, log_missing=False)
    except KeyError as error:  # core asks for the other half of a pair
        raise ValueError(f"{name} lacks {error.args[0]}; download it again.") from error


def tensor_of(key: Key) -> str:
    return key if isinstance(key, str) else key[0]


def layer_of(key: Key) -> str:
    """The module whose weight or bias it is."""
    return tensor_of(key).removesuffix(".weight").removesuffix(".bias")


def _shape(model: Any, key: Key) -> list[int]:
    """Of what a patch is added to: a tensor or its slice."""
    shape = [*plain_weight(model, tensor_of(key)).shape]
    if not isinstance(key, str) and key[1] is not None:
        shape[key[1][0]] = key[1][2]
    return shape


def _check(name: str, model: Any, key: Key, patch: Any) -> None:
    """Core logs a wrong shape and goes on without that layer."""
    size, shape = _size(patch), _shape(model, key)
    scale = _scale(patch)
    scaled = scale is None or scale.numel() in shape[:2]
    if not scaled or (size is not None and size != math.prod(shape)):
        parts = patch.weights if isinstance(patch, comfy.weight_adapter.WeightAdapterBase) else patch[1]
        held = " x ".join(str([*part.shape]) for part in parts if isinstance(part, torch.Tensor))
        raise ValueError(
            f"{name}: {held} does not fit {tensor_of(key)} {shape}. Take a LoRA of the same base model, undamaged."
        )


def _size(patch: Any) -> int | None:
    """How many numbers it adds to; 0 where its own tensors do not fit each other, None where that is not told by shapes."""
    if not isinstance(patch, comfy.weight_adapter.WeightAdapterBase):
        return patch[1][0].numel() if patch[0] in ("diff", "set") else None
    w = patch.weights
    if patch.name == "lora" and not w[5]:
        if w[3] is not None:  # Tucker's core between the two
            return w[0].shape[0] * w[1].shape[1] * w[3][0, 0].numel() if w[3].ndim == 4 else 0
        return w[0].shape[0] * w[1][0].numel() if w[0].flatten(1).shape[1] == w[1].shape[0] else 0
    if patch.name == "loha" and w[5] is None:
        fits = all(a.shape[1] == b.shape[0] for a, b in ((w[0], w[1]), (w[3], w[4])))
        sizes = {a.shape[0] * b[0].numel() for a, b in ((w[0], w[1]), (w[3], w[4]))}
        return sizes.pop() if fits and len(sizes) == 1 else 0
    if patch.name == "lokr" and w[7] is None:
        parts = [
            one.numel() if one is not None else a.shape[0] * b.shape[1]
            for one, a, b in ((w[0], *w[3:5]), (w[1], *w[5:7]))
        ]
        return math.prod(parts)
    return None


def fixed(patch: Any) -> bool:
    """Whether a layer's strength has to stay: what is added is not linear in it, or changes the weight's shape."""
    if isinstance(patch, comfy.weight_adapter.WeightAdapterBase):
        return isinstance(patch, TURNS) or patch.calculate_shape(None) is not None
    return len(patch) == 2 and patch[0] != "diff"


def factors_of(model: Any, key: Key, patch: Any, device: torch.device) -> Factors | None:
    """Of a plain LoRA; None for other kinds."""
    offset, function = (None, None) if isinstance(key, str) else (*key[1:], None)[:2]
    if not isinstance(patch, comfy.weight_adapter.LoRAAdapter) or function is not None:
        return None
    up, down, alpha, middle, decomposed, reshape = patch.weights
    if middle is not None or decomposed is not None or reshape is not None:
        return None
    scale = 1.0 if alpha is None else alpha / down.shape[0]
    up = up.to(device, torch.float32).flatten(1) * scale
    down = down.to(device, torch.float32).flatten(1)
    if offset is None:
        return Factors(up, down)
    dim, start, length = offset
    whole = plain_weight(model, tensor_of(key)).shape[dim]
    pad = (start, whole - start - length)
    if dim == 0:
        return Factors(torch.nn.functional.pad(up, (0, 0, *pad)), down)
    return Factors(up, torch.nn.functional.pad(down, pad)) if down.shape[1] == length else None


def dense(model: Any, tensor: str, entries: list[tuple[Key, Any]], device: torch.device) -> torch.Tensor:
    """What core adds to that tensor at strength 1, fp32. Adapters that turn or rescale the weight are given it."""
    stacked = [
        (1.0, patch, 1.0, *((None, None) if isinstance(key, str) else (*key[1:], None)[:2])) for key, patch in entries
    ]
    start = _weight(model, tensor, device) if any(_reads(p) for _, p in entries) else None
    if start is None:
        start = torch.zeros(plain_weight(model, tensor).shape, device=device)
    done = comfy.lora.calculate_weight(stacked, start.clone(), tensor)
    if done.shape == start.shape and torch.equal(done, start) and all(_acts(patch) for _, patch in entries):
        raise ValueError(f"A LoRA does not fit {tensor} {[*start.shape]}. Take a LoRA of the same base model.")
    if done.shape != start.shape:  # a LoRA that makes the layer larger
        return done - comfy.weight_adapter.base.pad_tensor_to_shape(start, done.shape)
    return done - start


def _acts(patch: Any) -> bool:
    """Whether none of its tensors is zero, so that a delta of zero means that core could not apply it."""
    held = patch.weights if isinstance(patch, comfy.weight_adapter.WeightAdapterBase) else patch[-1]
    return all(bool(part.any()) for part in held if isinstance(part, torch.Tensor))


def _reads(patch: Any) -> bool:
    if not isinstance(patch, comfy.weight_adapter.WeightAdapterBase):
        return patch[0] == "set"
    return isinstance(patch, READS) or _scale(patch) is not None


def _scale(patch: Any) -> torch.Tensor | None:
    """DoRA's."""
    places = {"lora": 4, "loha": 7, "lokr": 8, "glora": 5}
    return patch.weights[places[patch.name]] if getattr(patch, "name", None) in places else None


def _weight(model: Any, tensor: str, device: torch.device) -> torch.Tensor:
    """fp32, with the patches that the MODEL has already."""
    _, _, convert = comfy.model_patcher.get_key_weight(model.model, tensor)
    weight = plain_weight(model, tensor).detach().to(device)
    weight = (weight if convert is None else convert(weight, inplace=False)).float().clone()
    return comfy.lora.calculate_weight(model.patches[tensor], weight, tensor) if tensor in model.patches else weight


def delta(model: Any, entries: list[tuple[Key, Any]], device: torch.device) -> Delta:
    """Of one LoRA at one layer, at strength 1."""
    tensors: dict[str, list[tuple[Key, Any]]] = {}
    for key, patch in entries:
        tensors.setdefault(tensor_of(key), []).append((key, patch))
    made: dict[str, Piece] = {}
    for tensor, held in tensors.items():
        parts = [factors_of(model, key, patch, device) for key, patch in held]
        low = [part for part in parts if part is not None]
        made[tensor] = joined(low) if len(low) == len(held) else dense(model, tensor, held, device)
    return made


@dataclass(frozen=True)
class Layer:
    """One layer that LoRA change."""

    path: str  # of its module below the BaseModel
    block: int | None  # its place in the residual stack; None outside of it
    blocks: int  # in that stack
    products: torch.Tensor  # fp64 [k, k], the Gram matrix at strength 1
    there: tuple[bool, ...]  # which of the LoRA patch it
    fixed: tuple[bool, ...]  # which keep their strength
    of_features: bool = False  # whether products are of what the deltas do to recorded inputs

    @property
    def name(self) -> str:
        return self.path.removeprefix("diffusion_model.")

    def shallow(self, fraction: float) -> bool:
        return self.block is not None and self.block < math.ceil(fraction * self.blocks)


def layers(
    model: Any, loras: list[Lora], statistics: Statistics | None = None, measured: bool = False
) -> Iterator[Layer]:
    """In running order. One layer's deltas are held at a time; with measured also of those that keep their strength. With
    statistics, deltas count by what they do to the inputs that were recorded, where those of a layer were."""
    device = model.load_device
    entries: dict[str, list[list[tuple[Key, Any]]]] = {}
    for i, lora in enumerate(loras):
        for key, patch in lora.patches.items():
            entries.setdefault(layer_of(key), [[] for _ in loras])[i].append((key, patch))
    places = stack(model)
    order = {key.removesuffix(".weight").removesuffix(".bias"): n for n, key in enumerate(model.model.state_dict())}
    found = {name: _block(name, places) for name in entries}
    for name in sorted(entries, key=lambda n: (-1 if found[n] is None else found[n], order.get(n, len(order)))):
        kept = tuple(any(fixed(patch) for _, patch in held) for held in entries[name])
        deltas = [
            {} if keep and not measured else delta(model, held, device)
            for held, keep in zip(entries[name], kept, strict=True)
        ]
        there = tuple(bool(held) for held in entries[name])
        rows = _inputs(model, name, statistics)
        deltas = _alike(deltas)
        if rows is not None:
            deltas = [features(one, rows.to(device)) for one in deltas]
        yield Layer(name, found[name], len(places), gram(deltas), there, kept, rows is not None)


def _inputs(model: Any, layer: str, statistics: Statistics | None) -> torch.Tensor | None:
    """Recorded rows [n, K] of a layer. ValueError where they are another model's."""
    held = None if statistics is None else statistics.layers.get(layer.removeprefix("diffusion_model."))
    if statistics is None or held is None or not len(held.rows):
        return None
    shape = [*plain_weight(model, f"{layer}.weight").shape]
    if len(shape) != 2 or shape[1] != held.channels:
        raise ValueError(
            f"{statistics.name} recorded inputs of {held.channels} channels at {layer}, whose weight is {shape} here. Calibrate "
            "this MODEL."
        )
    return held.rows


def _alike(deltas: list[Delta]) -> list[Delta]:
    """The deltas, without tensors that one of them makes larger than another does: those have no common product."""
    shapes: dict[str, set[int]] = {}
    for held in deltas:
        for tensor, piece in held.items():
            size = piece.up.shape[0] * piece.down.shape[1] if isinstance(piece, Factors) else piece.numel()
            shapes.setdefault(tensor, set()).add(size)
    return [{t: p for t, p in held.items() if len(shapes[t]) == 1} for held in deltas]


def stack(model: Any) -> list[str]:
    """Paths of the blocks in running order; by their names for a model that the pack does not know."""
    diffusion_model = model.model.diffusion_model
    arch = archs.find(diffusion_model)
    if arch is not None:
        return [block_path(diffusion_model, p.spec, p.index) for p in positions(arch, diffusion_model)]
    lists = [(name, held) for name, held in diffusion_model.named_children() if isinstance(held, torch.nn.ModuleList)]
    return [f"diffusion_model.{name}.{i}" for name, held in lists for i in range(len(held))]


def _block(layer: str, places: list[str]) -> int | None:
    return next((n for n, place in enumerate(places) if layer == place or layer.startswith(place + ".")), None)
