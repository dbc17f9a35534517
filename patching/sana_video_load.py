"""Load SANA-Video: its transformer, from a folder as released or one file, becomes a MODEL."""

import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch

from ..methods.files.header import read_header
from ..networks.sana_layers import Sizes
from .diffusers_files import CONFIG, SUFFIX, beside, choices, read_config, read_json, read_tensors, weight_files
from .diffusers_sampling import noise_of
from .layers import DTYPES, choose_dtype, place, unplaced
from .sana_video import NAME, SanaVideo, SanaVideoModel, family

log = logging.getLogger("tessera")
CLASSES = ("SanaVideoTransformer3DModel", "SanaVideoCausalTransformer3DModel")  # the same tensors
HEAD = 112  # of every released model, where no config tells
MOST = 1 << 17
WEIGHT_DTYPES = {**DTYPES, "fp8_e4m3fn": torch.float8_e4m3fn}
SCHEDULE = {"prediction_type": "flow_prediction", "flow_shift": 8.0}  # of the release at 480p
DEFAULTS: dict[str, Any] = {  # of the class, for entries that a config leaves out
    "in_channels": 16, "num_attention_heads": 20, "attention_head_dim": 112, "num_layers": 20, "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112, "cross_attention_dim": 2240, "caption_channels": 2304, "mlp_ratio": 2.5,
    "patch_size": [1, 2, 2], "attention_bias": False, "qk_norm": "rms_norm_across_heads", "norm_eps": 1e-6,
}  # fmt: skip
ONLY: dict[str, tuple[Any, ...]] = {  # entries with one meaning here
    "guidance_embeds": (False, None),
    "norm_elementwise_affine": (False, None),
    "interpolation_scale": (None,),
    "qk_norm": ("rms_norm_across_heads", None),
}


def models(roots: Iterable[str], files: Iterable[str]) -> dict[str, Path]:
    """Name as a user sees it -> folder or file: those whose config names SANA-Video, below `roots`, then safetensors
    files of any name that have no config, below `files`; their shards are not offered alone."""
    found = {name: path for name, path in choices(roots).items() if _named(path) in CLASSES}
    alone = {}
    for root in map(Path, files):
        for folder, folders, names in os.walk(root, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            here = Path(folder)
            for name in sorted(names) if CONFIG not in names else ():
                shard = re.search(r"-\d{5}-of-\d{5}\.", name)
                if name.endswith(SUFFIX) and not shard and f"{name.removesuffix(SUFFIX)}.json" not in names:
                    alone.setdefault((here / name).relative_to(root).as_posix(), here / name)
    return {**found, **{name: alone[name] for name in sorted(alone) if name not in found}}


def _named(path: Path) -> Any:
    """The class that a config names; the first of ours where it is damaged, so that choosing it tells why."""
    try:
        return read_json(path / CONFIG if path.is_dir() else path.with_suffix(".json")).get("_class_name")
    except ValueError:
        return CLASSES[0]


def load(path: str, weight_dtype: str = "default", exact: bool = True, disable_dynamic: bool = False):
    """The ModelPatcher of that choice. ValueError, one sentence, where it cannot be."""
    chosen = Path(path)
    files = weight_files(chosen)
    if chosen.is_dir() or chosen.with_suffix(".json").is_file():
        sizes = told(read_config(chosen, CLASSES)[1])
    else:
        sizes = inferred(chosen.name, {key: entry.shape for key, entry in read_header(chosen).tensors.items()})
    schedule = beside(chosen, "scheduler", "scheduler_config.json")
    noise = noise_of(SCHEDULE if schedule is None else schedule, "scheduler/scheduler_config.json")
    if noise.alphas is not None:
        raise ValueError(
            f"{NAME} samples a flow, and scheduler/scheduler_config.json tells of none. Download it again."
        )
    made = family(sizes, noise)
    with unplaced():
        model = SanaVideo(sizes, exact)
    weights = read_tensors(files, {key: value.shape for key, value in model.state_dict().items()})
    device = comfy.model_management.get_torch_device()
    dtype = choose_dtype(made, weights, WEIGHT_DTYPES[weight_dtype], device)
    place(model, weights, dtype, made.manual_cast_dtype or dtype)
    patcher = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patched = patcher(
        SanaVideoModel(made, noise, model),
        load_device=device,
        offload_device=comfy.model_management.unet_offload_device(),
    )
    patched.cached_patcher_init = (load, (path, weight_dtype, exact))
    log.info("Load %s: %d blocks of %d, %s weights", NAME, sizes.layers, sizes.width, str(dtype)[6:])
    return patched


def told(config: Mapping[str, Any]) -> Sizes:
    """From a config. ValueError for entries that no release has."""
    for key, known in ONLY.items():
        if config.get(key, known[0]) not in known:
            raise ValueError(f"{NAME} with {key} {config[key]!r:.40} is not known here, only with {known[0]}.")
    full = {key: config.get(key, default) for key, default in DEFAULTS.items()}
    for key, value in full.items():
        for entry in value if key == "patch_size" and isinstance(value, list) else [value]:
            if type(entry) in (int, float) and not 0 < entry <= MOST:
                raise ValueError(
                    f"config.json says {key} {entry}, which is not above 0 and up to {MOST}. Download it again."
                )
            if type(entry) is not type(DEFAULTS[key]) and key not in ("patch_size", "qk_norm", "mlp_ratio", "norm_eps"):
                raise ValueError(f"config.json says {key} {entry!r:.40}. Download it again.")
    patch = full["patch_size"]
    if not isinstance(patch, list) or len(patch) != 3 or any(type(side) is not int for side in patch):
        raise ValueError(f"config.json says patch_size {patch!r:.40}, which is not three numbers. Download it again.")
    width = full["num_attention_heads"] * full["attention_head_dim"]
    cross = full["num_cross_attention_heads"] * full["cross_attention_head_dim"]
    outside = config.get("out_channels") or full["in_channels"]
    if {cross, full["cross_attention_dim"]} != {width} or outside != full["in_channels"]:
        raise ValueError(
            f"{NAME} has one width and as many channels out as in; this config.json has {width}, {cross} and "
            f"{full['cross_attention_dim']} wide attention, {full['in_channels']} channels in and {outside} out."
        )
    return Sizes(
        full["in_channels"], full["num_attention_heads"], full["attention_head_dim"], full["num_layers"],
        full["num_cross_attention_heads"], full["caption_channels"], int(full["mlp_ratio"] * width), tuple(patch),
        full["attention_bias"], full["qk_norm"] is not None, full["norm_eps"],
    )  # fmt: skip


def inferred(file: str, shapes: Mapping[str, tuple[int, ...]]) -> Sizes:
    """From the shapes in a file without a config. ValueError where they are not those of SANA-Video."""
    keys = ("patch_embedding.weight", "caption_projection.linear_1.weight", "transformer_blocks.0.ff.conv_temp.weight")
    keys += ("transformer_blocks.0.ff.conv_point.weight",)
    wanted = [shapes.get(key, ()) for key in keys]
    if [len(shape) for shape in wanted] != [5, 2, 4, 4]:
        raise ValueError(
            f"{file} is no {NAME}: it lacks {keys[2]} or one like it. Choose the transformer of a SANA-Video release in "
            "diffusers' format."
        )
    first, text, _, point = wanted
    width = first[0]
    if width % HEAD:
        raise ValueError(
            f"{file} is {width} wide, which heads of {HEAD} do not divide. Put its config.json beside it as "
            f"{Path(file).stem}.json."
        )
    layers = 1 + max(int(k.split(".")[1]) for k in shapes if re.match(r"transformer_blocks\.\d{1,4}\.", k))
    heads, one = width // HEAD, "transformer_blocks.0.attn1."
    return Sizes(
        first[1], heads, HEAD, min(layers, len(shapes)), heads, text[1], point[1], (first[2], first[3], first[4]),
        f"{one}to_q.bias" in shapes, f"{one}norm_q.weight" in shapes,
    )  # fmt: skip
