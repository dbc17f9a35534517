"""What ComfyUI's loader lets pass with a line in the log, or does not see, and what would draw a wrong picture: refused."""

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ..methods.quant.recipe import MARK

SHOWN = 5


class Heard(logging.Handler):
    """Hears which tensors ComfyUI missed and which it left, while its block lasts: it warns, and keeps for weights that it
    missed what memory held."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.names: dict[str, list[str]] = {"missing": [], "unexpected": []}

    def __enter__(self) -> "Heard":
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_: Any) -> None:
        logging.getLogger().removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        found = re.match(r"unet (missing|unexpected): ", record.getMessage())
        if found and record.name == "root":
            self.names[found[1]] = re.findall(r"'([^']+)'", record.getMessage())


def check_config(file: str, metadata: Mapping[str, str] | None, count: int) -> None:
    """ComfyUI takes sizes of some models from the metadata. ValueError for what is no such object, or tells of more layers
    than the file's tensors can fill, which would be built one by one."""
    text = (metadata or {}).get("config")
    if text is None:
        return
    try:
        found = json.loads(text).get("transformer", {})
        layers = {k: v for k, v in found.items() if type(v) is int and re.search("layers|depth|blocks", k)}
    except (ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"{file}: its metadata `config` is no JSON object of a model; the file is damaged.") from error
    for key, value in layers.items():
        if not 0 <= value <= count:
            raise ValueError(f"{file}: its metadata `config` tells of {key} {value} for {count} tensors.")


def check_marks(file: str, tensors: Mapping[str, Any]) -> None:
    """ValueError for a layer with a scale or with codes, of which nothing says what they stand for."""
    for key, tensor in tensors.items():
        layer, _, part = key.rpartition(".")
        codes = part == "weight" and type(tensor) is torch.Tensor and not tensor.is_floating_point()
        if (codes or part == "weight_scale") and f"{layer}{MARK}" not in tensors:
            raise ValueError(
                f"{file}: {key} is {str(tensor.dtype)[6:]} {[*tensor.shape]}, and neither {layer}{MARK} nor the metadata says "
                "how the layer is quantized; the file is damaged or in a format that is not known here."
            )


def check_model(file: str, model: torch.nn.Module, heard: Heard) -> None:
    """ValueError, naming file and tensors, where the model that ComfyUI built is not the one in the file."""
    missed = set(heard.names["missing"])
    lost = [name for name, _ in model.named_parameters() if name in missed]
    if lost:
        raise ValueError(f"{file} lacks the tensors {_shown(lost)}; the file is damaged.")
    modules = dict(model.named_modules())
    left = [name for name in heard.names["unexpected"] if _of_a_block(name, modules)]
    if left:
        raise ValueError(
            f"{file}: the tensors {_shown(left)} are of blocks behind one that is missing; the file is damaged."
        )
    for name, module in modules.items():
        _check_size(file, name, module)


def _shown(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _of_a_block(name: str, modules: Mapping[str, torch.nn.Module]) -> bool:
    """Whether a tensor is of a block that the model's list of blocks does not reach."""
    found = re.match(r"(.*?)\.(\d+)\.", name)
    blocks = modules.get(found[1]) if found else None
    return isinstance(blocks, torch.nn.ModuleList) and int(found[2]) >= len(blocks)  # type: ignore[index]


def _check_size(file: str, name: str, module: torch.nn.Module) -> None:
    """Of a Linear that is not quantized: only its product would meet a wrong one."""
    weight = module._parameters.get("weight")
    wanted = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if weight is None or isinstance(weight, QuantizedTensor) or None in wanted:
        return
    if not weight.is_floating_point() or tuple(weight.shape) != wanted:
        got = f"{str(weight.dtype)[6:]} {[*weight.shape]}"
        raise ValueError(
            f"{file}: {name}.weight is {got} where the model has {[*wanted]}; the file is damaged or of another model."
        )
