"""Statistics of each quantizable layer's inputs over a real sampling run, and their files.

Of a layer with K input channels: the largest magnitude and the mean square of each channel, the moments of each token's
largest magnitude, and a few rows, drawn uniformly from all that passed: every row gets a random key, the rows of the
largest keys stay. Two collections merge into what one over both runs would be.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..files.header import Entry, read_header
from ..files.place import shown
from ..files.safetensors_write import SafetensorsWriter

FORMAT, VERSION = "tessera_quantization_calibration", "1"
CHUNK = 1 << 24  # numbers at a time: the inputs of a video are large
ROWS = 64  # of a layer, in bf16: some 200 MB for the layers of FLUX
PARTS = ("amax", "square_sum", "tokens", "rows", "keys")
MOST_CHANNELS, MOST_ROWS, MOST_NOTE = 1 << 18, 1 << 13, 1 << 12
MOST_TOKENS = 1 << 53  # whole numbers of fp64
REMEDY = "record it again with Calibrate Quantization"


class LayerStatistics:
    """Takes the inputs [..., K] of one layer. Everything is kept on the CPU; memory is rows * K bf16 numbers and some [K].

    amax [K] fp32; square_sum [K] fp64; tokens fp64 [4]: how many, sum and sum of squares of their largest magnitudes, and
    the largest; rows [r, K] bf16 with their keys [r] fp64."""

    def __init__(self, channels: int, rows: int = ROWS, seed: int = 0):
        if channels < 1 or rows < 0:
            raise ValueError(f"Statistics need at least 1 channel and 0 rows, got {channels} and {rows}.")
        self.channels, self.most = channels, rows
        self.amax = torch.zeros(channels)
        self.square_sum = torch.zeros(channels, dtype=torch.float64)
        self.tokens = torch.zeros(4, dtype=torch.float64)
        self.rows = torch.zeros(0, channels, dtype=torch.bfloat16)
        self.keys = torch.zeros(0, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, x: torch.Tensor) -> None:
        """Inputs [..., K] of one call. ValueError for another width or numbers that are not finite."""
        x = x.detach().reshape(-1, x.shape[-1])
        if x.shape[1] != self.channels:
            raise ValueError(f"A layer of {self.channels} input channels met an input of {x.shape[1]}.")
        if len(x) and not torch.stack(x.aminmax()).isfinite().all():
            raise ValueError(f"An input {[*x.shape]} holds numbers that are not finite; calibrate a run that works.")
        for part in x.split(max(1, CHUNK // self.channels)):
            self._add(part)

    def _add(self, x: torch.Tensor) -> None:
        """Rows [n, K]."""
        if not len(x):
            return
        size = x.abs()
        token = size.amax(1).float().cpu().double()
        self.amax = torch.maximum(self.amax, size.amax(0).float().cpu())
        self.square_sum += x.float().square().sum(0).cpu().double()
        moments = torch.stack((token.new_tensor(len(x)), token.sum(), token.square().sum(), token.max()))
        self.tokens = torch.cat((self.tokens[:3] + moments[:3], torch.maximum(self.tokens[3:], moments[3:])))
        keys = torch.rand(len(x), generator=self._generator, dtype=torch.float64)
        fresh = (keys >= (self.keys.min() if len(self.keys) >= self.most > 0 else 0)).nonzero().squeeze(1)
        fresh = fresh[keys[fresh].argsort(descending=True)[: self.most]]
        self._keep(x.index_select(0, fresh.to(x.device)).to("cpu", torch.bfloat16), keys[fresh])

    def merge(self, other: "LayerStatistics") -> None:
        """Takes what `other` saw as well. Give the two different seeds, or their rows are drawn alike."""
        if other.channels != self.channels:
            raise ValueError(f"Statistics of {self.channels} and {other.channels} channels cannot be merged.")
        self.amax = torch.maximum(self.amax, other.amax)
        self.square_sum += other.square_sum
        self.tokens = torch.cat((self.tokens[:3] + other.tokens[:3], torch.maximum(self.tokens[3:], other.tokens[3:])))
        self._keep(other.rows, other.keys)

    def _keep(self, rows: torch.Tensor, keys: torch.Tensor) -> None:
        rows, keys = torch.cat((self.rows, rows)), torch.cat((self.keys, keys))
        order = keys.argsort(descending=True)[: self.most]
        self.rows, self.keys = rows[order], keys[order]

    @property
    def count(self) -> int:
        """Tokens seen."""
        return int(self.tokens[0])

    @property
    def mean_square(self) -> torch.Tensor:
        """[K] fp32."""
        return (self.square_sum / max(self.count, 1)).float()

    @property
    def fluctuation(self) -> float:
        """Standard deviation of the tokens' largest magnitudes, over their mean."""
        count, total, squares, _ = self.tokens.tolist()
        mean = total / max(count, 1)
        return math.sqrt(max(squares / max(count, 1) - mean * mean, 0.0)) / mean if mean > 0 else 0.0

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """By the names of PARTS."""
        return {name: getattr(self, name).contiguous() for name in PARTS}

    @classmethod
    def from_tensors(cls, parts: Mapping[str, torch.Tensor]) -> "LayerStatistics":
        """ValueError, naming the part, where one is missing, does not fit the others or cannot be."""
        missing = [name for name in PARTS if name not in parts]
        if missing or len(parts) != len(PARTS):
            odd = missing or sorted(set(parts) - set(PARTS))
            raise ValueError(f"{odd[0]} is {'missing' if missing else 'unknown'}")
        k, r = parts["amax"].numel(), parts["keys"].numel()
        wanted = {"amax": (k,), "square_sum": (k,), "tokens": (4,), "rows": (r, k), "keys": (r,)}
        found = cls(max(k, 1), max(r, ROWS))
        for name, shape in wanted.items():
            part, dtype = parts[name], getattr(found, name).dtype
            if tuple(part.shape) != shape or part.dtype != dtype or not k:
                got = f"{str(part.dtype)[6:]} {[*part.shape]}"
                raise ValueError(f"{name} is {got} and should be {str(dtype)[6:]} {[*shape]}")
            if not part.isfinite().all() or (name != "rows" and part.numel() and part.min() < 0):
                raise ValueError(f"{name} holds numbers that are not finite or negative")
            setattr(found, name, part)
        count = float(parts["tokens"][0])
        if count > MOST_TOKENS or count != int(count) or r > count or r > MOST_ROWS:
            raise ValueError(f"it keeps {r} rows of {count:g} tokens")
        if not found.mean_square.isfinite().all():
            raise ValueError("square_sum holds numbers beyond fp32")
        return found


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of a whole model. model: fingerprint of its weights; steps: of the run, of which `sampler` names the function."""

    layers: dict[str, LayerStatistics]
    model: str
    steps: int
    sampler: str
    name: str = field(default="calibration")  # of the file, for messages

    def for_layer(self, layer: str, channels: int) -> LayerStatistics | None:
        """None where the layer never ran. ValueError where it had another width: another model's calibration."""
        found = self.layers.get(layer)
        if found is not None and found.channels != channels:
            raise ValueError(
                f"{self.name} has {found.channels} input channels for {layer}, the model {channels}; choose the "
                "calibration of this model."
            )
        return found


def save(path: str | Path, statistics: Statistics) -> None:
    """Writes a safetensors file, whole or not at all."""
    metadata = {"format": FORMAT, "version": VERSION, "model": statistics.model, "sampler": statistics.sampler}
    metadata["steps"] = str(statistics.steps)
    with SafetensorsWriter(path, metadata, len(PARTS) * len(statistics.layers)) as out:
        for layer, found in statistics.layers.items():
            for part, tensor in found.to_tensors().items():
                out.add(f"{layer}:{part}", tensor)


def load(path: str | Path) -> Statistics:
    """ValueError, one sentence with the file and where it applies the layer, for a file that is damaged or no calibration.
    Sizes are checked before anything is read; nothing stays mapped, so that the file may be written again."""
    header = read_header(path)
    file = header.path.name
    steps = _check_metadata(file, header.metadata)
    names = _check_sizes(file, header.tensors)
    bytes_ = header.map()
    layers = {}
    for layer, parts in names.items():
        entries = {part: header.tensors[f"{layer}:{part}"] for part in parts}
        tensors = {n: bytes_.tensor(e.start, e.stop, e.dtype, e.shape).clone() for n, e in entries.items()}
        layers[layer] = _read_layer(file, layer, tensors)
    return Statistics(layers, header.metadata["model"], steps, header.metadata["sampler"], file)


def _check_metadata(file: str, notes: dict[str, str]) -> int:
    """How many steps."""
    if notes.get("format") != FORMAT:
        raise ValueError(f"{file} is no calibration of quantization; {REMEDY}.")
    if notes.get("version") != VERSION:
        raise ValueError(f"{file} has version {notes.get('version')!r:.20} and this pack reads {VERSION}; {REMEDY}.")
    if any(name not in notes or len(notes[name]) > MOST_NOTE for name in ("model", "sampler", "steps")):
        raise ValueError(f"{file} does not say which model, sampler and steps it is of; {REMEDY}.")
    if not notes["steps"].isascii() or not notes["steps"].isdigit() or len(notes["steps"]) > 6:
        raise ValueError(f"{file} says {notes['steps']!r:.20} steps, which is no number; {REMEDY}.")
    return int(notes["steps"])


def _check_sizes(file: str, entries: Mapping[str, Entry]) -> dict[str, list[str]]:
    """The parts of each layer."""
    names: dict[str, list[str]] = {}
    for key, entry in entries.items():
        layer, _, part = key.rpartition(":")
        shape = entry.shape
        wide = bool(shape) and shape[-1] > MOST_CHANNELS
        if not layer or len(shape) > 2 or wide or (len(shape) == 2 and shape[0] > MOST_ROWS):
            raise ValueError(f"{file}: {shown(key)} {[*shape]} is no part of a layer's statistics; {REMEDY}.")
        names.setdefault(layer, []).append(part)
    if not names:
        raise ValueError(f"{file} has no layer; {REMEDY}.")
    return names


def _read_layer(file: str, layer: str, parts: dict[str, torch.Tensor]) -> LayerStatistics:
    try:
        return LayerStatistics.from_tensors(parts)
    except ValueError as error:
        raise ValueError(f"{file}: {shown(layer)}: {error}; {REMEDY}.") from error
