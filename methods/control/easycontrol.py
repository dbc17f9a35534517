"""The weights of EasyControl (arXiv 2503.07027; Xiaojiu-z/EasyControl on Hugging Face): LoRA that act on the tokens of a
condition only, under diffusers' names for FLUX.1, N the number of the condition that they were trained for.

    transformer_blocks.I.attn.processor.{q,k,v,proj}_loras.N.{down,up}.weight     double blocks, on the image's projections
    single_transformer_blocks.I.attn.processor.{q,k,v}_loras.N.{down,up}.weight   single blocks

down [r, D], up [D, r]. proj acts on the output of the block's projection y, bias included: y + up(down(y))."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..files.safetensors_write import SafetensorsWriter

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"
PARTS = {DOUBLE: ("q", "k", "v", "proj"), SINGLE: ("q", "k", "v")}
KEY = re.compile(
    r"(transformer_blocks|single_transformer_blocks)\.(\d{1,4})\.attn\.processor\.(q|k|v|proj)_loras\.(\d{1,2})\.(down|up)\.weight"
)
SUBJECTS = ("subject",)  # in the name of a file whose condition is a subject and no layout


@dataclass(frozen=True, eq=False)
class Lora:
    """down [r, D], up [D, r]."""

    down: torch.Tensor
    up: torch.Tensor


Block = Mapping[str, Lora]  # by part: q, k, v, in double blocks proj


@dataclass(frozen=True, eq=False)
class EasyControlWeights:
    """What one condition adds. name: of the file, for messages; subject: whether it was trained on subjects, None where
    nothing says so."""

    double: tuple[Block, ...]
    single: tuple[Block, ...]
    name: str = ""
    subject: bool | None = None

    @property
    def width(self) -> int:
        return self.double[0]["q"].down.shape[1]

    @property
    def ranks(self) -> tuple[int, int]:
        """The smallest and the largest."""
        found = [lora.down.shape[0] for block in (*self.double, *self.single) for lora in block.values()]
        return min(found), max(found)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Under the released names, as condition 0."""
        return {
            f"{path}.{i}.attn.processor.{part}_loras.0.{end}.weight": getattr(lora, end)
            for path, blocks in ((DOUBLE, self.double), (SINGLE, self.single))
            for i, block in enumerate(blocks)
            for part, lora in block.items()
            for end in ("down", "up")
        }


def expected(double: int, single: int, width: int, rank: int, condition: int = 0) -> dict[str, tuple[int, ...]]:
    """Key -> shape for a FLUX with that many blocks of that width."""
    return {
        f"{path}.{i}.attn.processor.{part}_loras.{condition}.{end}.weight": (rank, width) if end == "down" else (width, rank)
        for path, count in ((DOUBLE, double), (SINGLE, single))
        for i in range(count)
        for part in PARTS[path]
        for end in ("down", "up")
    }  # fmt: skip


def read(
    tensors: Mapping[str, torch.Tensor], name: str, metadata: Mapping[str, str], condition: int = 0
) -> EasyControlWeights:
    """The LoRA of one condition of a file. ValueError, one sentence, where a key or a shape does not fit."""
    unknown = sorted(key for key in tensors if not KEY.fullmatch(key))
    if unknown:
        few = ", ".join(unknown[:4]) + (f" and {len(unknown) - 4} more" if len(unknown) > 4 else "")
        raise ValueError(
            f"{name} is no EasyControl file: it also has {few}. Take one of Xiaojiu-Z/EasyControl, or one of Train EasyControl."
        )
    numbers = sorted({int(KEY.fullmatch(key).group(4)) for key in tensors})  # type: ignore[union-attr]
    if condition not in numbers:
        held = f"the conditions {', '.join(map(str, numbers))}" if numbers else "no LoRA at all"
        raise ValueError(f"{name} has no LoRA for condition {condition}: it holds {held}. Choose another condition.")
    found: dict[str, dict[int, dict[str, dict[str, torch.Tensor]]]] = {DOUBLE: {}, SINGLE: {}}
    for key, tensor in tensors.items():
        path, block, part, number, end = KEY.fullmatch(key).groups()  # type: ignore[union-attr]
        if int(number) == condition:
            found[path].setdefault(int(block), {}).setdefault(part, {})[end] = tensor
    double, single = (_blocks(found[path], path, name) for path in (DOUBLE, SINGLE))
    if not double:
        raise ValueError(f"{name} has no LoRA for double blocks, which every EasyControl file has. Download it again.")
    weights = EasyControlWeights(double, single, name, _subject(name, metadata))
    _same_width(weights)
    return weights


def _blocks(found: Mapping[int, Mapping[str, Mapping[str, torch.Tensor]]], path: str, name: str) -> tuple[Block, ...]:
    """The blocks of one list in order, none of them or of their parts missing."""
    for i in range(max(found, default=-1) + 1):
        for part in PARTS[path]:
            for end in ("down", "up"):
                if end not in found.get(i, {}).get(part, {}):
                    raise ValueError(
                        f"{name} lacks {path}.{i}.attn.processor.{part}_loras.….{end}.weight. Download it again."
                    )
    for i, block in found.items():
        extra = sorted(set(block) - set(PARTS[path]))
        if extra:
            raise ValueError(f"{name} has a {extra[0]}_loras in {path}.{i}, where EasyControl has none.")
    return tuple({p: Lora(found[i][p]["down"], found[i][p]["up"]) for p in PARTS[path]} for i in range(len(found)))


def _same_width(weights: EasyControlWeights) -> None:
    width = weights.width
    for key, tensor in weights.tensors().items():
        rank = tensor.shape[0 if ".down." in key else -1]
        if tensor.ndim != 2 or tensor.shape[1 if ".down." in key else 0] != width:
            raise ValueError(
                f"{weights.name}: {key} is {[*tensor.shape]}, but the first block has width {width}: a down is [rank, {width}], "
                f"an up [{width}, rank]."
            )
        if not rank:
            raise ValueError(f"{weights.name}: {key} is {[*tensor.shape]}, of rank 0.")
    for path, blocks in ((DOUBLE, weights.double), (SINGLE, weights.single)):
        for i, block in enumerate(blocks):
            for part, lora in block.items():
                if lora.down.shape[0] != lora.up.shape[1]:
                    raise ValueError(
                        f"{weights.name}: {path}.{i} {part}_loras has a down of rank {lora.down.shape[0]} and an up of rank "
                        f"{lora.up.shape[1]}; they must be the same."
                    )


def _subject(name: str, metadata: Mapping[str, str]) -> bool | None:
    told = metadata.get("tessera_mode")
    if told in ("spatial", "subject"):
        return told == "subject"
    return True if any(word in name.lower() for word in SUBJECTS) else None


def fits(weights: EasyControlWeights, double: int, single: int, width: int) -> None:
    """ValueError where the file was made for a FLUX of another size."""
    mine, theirs = (len(weights.double), len(weights.single), weights.width), (double, single, width)
    if mine != theirs:
        words = "{} + {} blocks of width {}"
        raise ValueError(
            f"{weights.name or 'This EasyControl'} was made for a FLUX with {words.format(*mine)}, but this MODEL has "
            f"{words.format(*theirs)}. Load the model that it was trained on (FLUX.1-dev for the released files)."
        )


def fresh(double: int, single: int, width: int, rank: int, generator: torch.Generator) -> EasyControlWeights:
    """LoRA that change nothing yet: down normal / rank, as the official trainer begins, up zero. fp32."""

    def pair() -> Lora:
        down = torch.randn(rank, width, generator=generator) / rank
        return Lora(down, torch.zeros(width, rank))

    doubles = tuple({part: pair() for part in PARTS[DOUBLE]} for _ in range(double))
    return EasyControlWeights(doubles, tuple({part: pair() for part in PARTS[SINGLE]} for _ in range(single)))


def write(path: str | Path, weights: EasyControlWeights, metadata: Mapping[str, str]) -> None:
    """A file in the released layout; metadata "tessera_mode": spatial or subject."""
    tensors = weights.tensors()
    with SafetensorsWriter(path, dict(metadata), len(tensors)) as out:
        for key, tensor in tensors.items():
            out.add(key, tensor)
