"""Weights of diffusion models as GGUF files, in ComfyUI-GGUF's conventions (city96/ComfyUI-GGUF, loader.py and
tools/convert.py): general.architecture names the family, tensor names are ComfyUI's, with or without
model.diffusion_model., and comfy.gguf.orig_shape.<name> is the shape of a tensor that was reshaped to fill its blocks.

Linear weights stay packed and mapped; nothing is copied."""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from ...kernels.quant.packed import GGUF_BLOCKS, Packed, decode
from .finite import finite, sample, warning
from .gguf_header import GgufEntry, read_gguf_header
from .place import Damaged, Mapped, shown

PREFIX = "model.diffusion_model."
ORIGINAL = "comfy.gguf.orig_shape."
MODELS = ("flux", "sd3", "aura", "hidream", "cosmos", "ltxv", "hyvid", "wan", "lumina2", "qwen_image")
CODED = ("pig", "cow")  # converters that write their own name: the family is told by the keys
UNETS = ("sd1", "sdxl")
TEXTS = ("t5", "t5encoder", "llama", "qwen2vl", "qwen3", "qwen3vl", "clip", "gemma2", "gemma3")
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SCALE_BYTES = {"q4_0": (0, 2), "q8_0": (0, 2), "q4_k": (0, 4), "q5_k": (0, 4), "q6_k": (208, 210)}  # fp16, of a block
CHUNK = 1 << 20  # blocks


class GgufFile(Mapping[str, "Packed | torch.Tensor"]):
    """Weights by ComfyUI's name (without prefix): Packed where a [N, K] weight is quantized, else a tensor. Opening
    checks the header whole and every block's scale; `warnings` are sentences about plain weights that are not finite.
    `architecture` is None where the file does not say; `left_out` are the tensors without the prefix of a file that has
    it (text encoders, VAE). ValueError, one sentence with the file's name, for damaged files
    and those that hold no diffusion transformer."""

    def __init__(self, path: str | Path, roots: Iterable[str | Path] = ()):
        self.header = read_gguf_header(path, roots)
        self.path, self.metadata = self.header.path, self.header.metadata
        if self.metadata.get("split.count", 1) not in (0, 1):
            parts = str(self.metadata["split.count"])[:20]
            raise Damaged(self.path.name, f"it is one of {parts} parts; merge them with llama.cpp's gguf-split")
        self.architecture = _architecture(self.path.name, self.metadata.get("general.architecture"))
        named = self.header.tensors
        self.left_out: list[str] = []
        if any(name.startswith(PREFIX) for name in named):
            self.left_out = [name for name in named if not name.startswith(PREFIX)]
            named = {name.removeprefix(PREFIX): e for name, e in named.items() if name.startswith(PREFIX)}
            self._from = PREFIX
        else:
            self._from = ""
        if not named:
            raise Damaged(self.path.name, "it holds no tensor")
        self._entries = named
        self._shapes = {name: self._shape(name, entry) for name, entry in named.items()}
        self._bytes = Mapped(self.path, self.header.stamp)
        bad = []
        for name, entry in named.items():
            if entry.type in PLAIN:
                if not sample(self[name]):  # type: ignore[arg-type]
                    bad.append(name)
            elif not _scales_are_finite(self._data(entry), entry.type.lower()):
                raise Damaged(
                    self.path.name, f"the scales in tensor {shown(name)} are not all finite; download it again"
                )
        self.warnings = [warning(bad)] if bad else []

    def types(self) -> dict[str, int]:
        """Tensors of each type."""
        kinds = [entry.type for entry in self._entries.values()]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}

    def _shape(self, name: str, entry: GgufEntry) -> tuple[int, ...]:
        """The shape before the tensor was reshaped for its blocks, where the file says so."""
        told = self.metadata.get(f"{ORIGINAL}{self._from}{name}", self.metadata.get(ORIGINAL + name))
        if told is None:
            return entry.shape
        sound = isinstance(told, tuple) and all(type(size) is int and size > 0 for size in told)
        if not sound or math.prod(told) != math.prod(entry.shape):
            raise Damaged(
                self.path.name, f"tensor {shown(name)} {[*entry.shape]} is said to have had the shape {str(told)[:80]}"
            )
        return told

    def _data(self, entry: GgufEntry) -> torch.Tensor:
        return self._bytes.tensor(entry.start, entry.stop, torch.uint8, (entry.stop - entry.start,))

    def __getitem__(self, name: str) -> Packed | torch.Tensor:
        """Packed (bytes [N, bytes of a row], a view of the file) for a quantized weight [N, K]; a view for plain
        tensors, but fp32 where one of one dimension is bf16; quantized tensors of other shapes or names, decoded to
        fp32. Raises ValueError where the file has been replaced since it was opened."""
        entry, shape = self._entries[name], self._shapes[name]
        if entry.type in PLAIN:
            tensor = self._bytes.tensor(entry.start, entry.stop, PLAIN[entry.type], shape)
            return tensor.float() if entry.type == "BF16" and len(shape) < 2 else tensor
        codec, columns = entry.type.lower(), entry.shape[-1]
        data = self._data(entry).view(-1, columns // GGUF_BLOCKS[codec][0] * GGUF_BLOCKS[codec][1])
        packed = Packed(codec, columns, data)
        if len(shape) == 2 and shape == entry.shape and name.endswith("weight"):
            return packed
        return decode(packed).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """As the model has it; nothing is read."""
        return self._shapes[name]


def _architecture(file: str, name: object) -> str | None:
    """The family, None where the file leaves it to the keys."""
    if name is None or name in CODED:
        return None
    if name in MODELS:
        return str(name)
    if name in UNETS:
        raise Damaged(file, f"it is a U-Net ({name}) and no diffusion transformer; load it with ComfyUI-GGUF")
    if isinstance(name, str) and name in TEXTS:
        raise Damaged(file, f"it is a text encoder ({name}) and no diffusion transformer")
    raise Damaged(file, f"its architecture is {ascii(name)[:60]}; known are {', '.join(MODELS)}")


def _scales_are_finite(data: torch.Tensor, codec: str) -> bool:
    """Whether the fp16 scales within the blocks all are; in chunks, so that little is allocated."""
    first, last = SCALE_BYTES[codec]
    blocks = data.view(-1, GGUF_BLOCKS[codec][1])
    return all(finite(part[:, first:last].contiguous().view(torch.float16)) for part in blocks.split(CHUNK))
