"""Load Diffusers Model: a transformer of diffusers from a folder or a file on this disk becomes a MODEL."""

import inspect
import logging
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher

from .. import archs
from .diffusers_blocks import offer
from .diffusers_files import beside, read_config, read_tensors, weight_files
from .diffusers_latents import latents_of
from .diffusers_model import Bridge, BridgedModel, settings
from .diffusers_sampling import noise_of
from .diffusers_table import TABLE, Row
from .layers import DTYPES, choose_dtype, place, unplaced

log = logging.getLogger("tessera")
NODE = "Load Diffusers Model"
MOST_LAYERS, MOST_SIZE = 1000, 1 << 17  # more than any model has


def load(path: str, weight_dtype: str = "default", disable_dynamic: bool = False):
    """The ModelPatcher of that choice. ValueError, one sentence, where it cannot be."""
    chosen = Path(path)
    name, config = read_config(chosen, TABLE)
    row, kind = TABLE[name], class_named(name)
    model = build(kind, row, config)
    config = dict(model.config)  # with the defaults of what the file leaves out
    latents = latents_of(name, row, config, beside(chosen, "vae", "config.json"))
    told = beside(chosen, "scheduler", "scheduler_config.json")
    noise = noise_of(row.schedule(config) if told is None else told, "scheduler/scheduler_config.json")

    shapes = {key: value.shape for key, value in model.state_dict().items()}
    ignored = getattr(kind, "_keys_to_ignore_on_load_unexpected", None) or ()
    weights = read_tensors(weight_files(chosen), shapes, ignored)
    family = settings(row, config, noise, latents)
    device = comfy.model_management.get_torch_device()
    dtype = choose_dtype(family, weights, DTYPES[weight_dtype], device)
    place(model, weights, dtype, family.manual_cast_dtype or dtype)
    offer(model, archs.find(model))
    patcher = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    made = patcher(
        BridgedModel(family, noise, model),
        load_device=device,
        offload_device=comfy.model_management.unet_offload_device(),
    )
    made.cached_patcher_init = (load, (path, weight_dtype))
    log.info("%s: %s, %s weights", NODE, name, str(dtype)[6:])
    return made


def class_named(name: str) -> type:
    """The class of diffusers. ValueError where diffusers is missing or too old."""
    try:
        import diffusers

        return getattr(diffusers, name)
    except ImportError as error:
        raise ValueError(
            f"{NODE} needs the Python packages diffusers and transformers ({error}). Install them where ComfyUI runs."
        ) from error
    except (AttributeError, RuntimeError) as error:
        raise ValueError(f"{NODE}: the installed diffusers has no {name} ({error}). Update it.") from error


def build(kind: type, row: Row, config: dict[str, Any]) -> Any:
    """The model without weights: parameters on no device, tables of its own computed. ValueError for what its row does
    not take."""
    names = inspect.signature(kind.__init__).parameters
    given = {key: value for key, value in config.items() if key in names and not key.startswith("_")}
    for key, value in given.items():
        _check(kind.__name__, key, value, isinstance(names[key].default, tuple | list))
    derived = type(kind.__name__, (Bridge, kind), {"bridged": kind, "row": row, "__module__": __name__})
    try:
        with unplaced():
            model = derived(**given)
    except Exception as error:  # whatever a constructor of diffusers meets in a foreign config
        raise ValueError(
            f"{kind.__name__} cannot be made from this config ({_line(error)}). Download config.json again."
        ) from error
    full = model.config
    for key, value in row.refuses.items():
        if full[key] != value:
            raise ValueError(f"{kind.__name__} with {key} {full[key]} is not bridged, only with {value}.")
    inside, outside = full["in_channels"], full["out_channels"] or full["in_channels"]
    if outside != inside and not (row.learned and outside == 2 * inside):
        raise ValueError(
            f"{kind.__name__} with {inside} channels in and {outside} out wants an image or a mask beside the latent, which is "
            "not bridged. Load the model that starts from text alone."
        )
    return model


def _check(name: str, key: str, value: Any, several: bool) -> None:
    """ValueError for entries with which building would fail late, take all memory or never end."""
    if isinstance(value, dict) or (isinstance(value, list) and not several):
        raise ValueError(f"{name} takes one value for {key}, and config.json has {value!r:.80}. Download it again.")
    most = MOST_LAYERS if "layers" in key else MOST_SIZE
    for entry in value if isinstance(value, list) else [value]:
        if type(entry) in (int, float) and not abs(entry) <= most:
            raise ValueError(f"{name}: config.json says {key} {entry}, beyond {most}. Download it again.")


def _line(error: BaseException) -> str:
    """The first line of what an error says, not too long."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
