"""Which layer of a Nunchaku checkpoint is which Linear of ComfyUI: FLUX.1 and Qwen-Image, int4.

Releases of FLUX name layers as deepcompressor's converter does (qkv_proj, lora_down, smooth); nunchaku's v2 modules and the
releases of Qwen-Image name them after diffusers (attn.to_qkv, proj_down, smooth_factor). Both are read. Sources: nunchaku
3a3cc3d models/transformers/transformer_flux_v2.py (convert_flux_state_dict), transformer_qwenimage.py, models/linear.py;
deepcompressor 69f3473 backend/nunchaku/convert.py; tests/golden/keys/nunchaku_*.json holds the tables."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from .nunchaku_layout import AwqLinear, SvdLinear, unpack_awq, unpack_svd

RENAMED = {
    "lora_down": "proj_down",
    "lora_up": "proj_up",
    "smooth": "smooth_factor",
    "smooth_orig": "smooth_factor_orig",
}
SVD = {"qweight", "wscales", "smooth_factor"}  # needed
SVD_MORE = {"bias", "proj_down", "proj_up", "smooth_factor_orig"}
AWQ, AWQ_MORE = {"qweight", "wscales", "wzeros"}, {"bias"}
NVFP4 = {"wcscales", "wtscale"}

Layers = tuple[tuple[tuple[str, ...], bool], ...]  # names of a layer, and whether its activations are unsigned
# ComfyUI's Linear: (axis, layers)
FLUX_DOUBLE: dict[str, tuple[str, Layers]] = {
    "img_attn.qkv": ("rows", ((("qkv_proj", "attn.to_qkv"), False),)),
    "txt_attn.qkv": ("rows", ((("qkv_proj_context", "attn.add_qkv_proj"), False),)),
    "img_attn.proj": ("rows", ((("out_proj", "attn.to_out.0"), False),)),
    "txt_attn.proj": ("rows", ((("out_proj_context", "attn.to_add_out"), False),)),
    "img_mlp.0": ("rows", ((("mlp_fc1", "ff.net.0.proj"), False),)),
    "img_mlp.2": ("rows", ((("mlp_fc2", "ff.net.2"), True),)),
    "txt_mlp.0": ("rows", ((("mlp_context_fc1", "ff_context.net.0.proj"), False),)),
    "txt_mlp.2": ("rows", ((("mlp_context_fc2", "ff_context.net.2"), True),)),
}
FLUX_SINGLE: dict[str, tuple[str, Layers]] = {
    "linear1": ("rows", ((("qkv_proj", "attn.to_qkv"), False), (("mlp_fc1",), False))),
    "linear2": ("columns", ((("out_proj", "attn.to_out"), False), (("mlp_fc2",), True))),
}
FLUX_MODULATION = {"img_mod.lin": ("norm1.linear", 6), "txt_mod.lin": ("norm1_context.linear", 6)}
FLUX_NORMS = {
    "img_attn.norm.query_norm": ("norm_q", "attn.norm_q"),
    "img_attn.norm.key_norm": ("norm_k", "attn.norm_k"),
    "txt_attn.norm.query_norm": ("norm_added_q", "attn.norm_added_q"),
    "txt_attn.norm.key_norm": ("norm_added_k", "attn.norm_added_k"),
}
FLUX_SINGLE_NORMS = {"norm.query_norm": ("norm_q", "attn.norm_q"), "norm.key_norm": ("norm_k", "attn.norm_k")}
FLUX_PLAIN = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
SWAPPED = "final_layer.adaLN_modulation.1"  # diffusers: scale, shift; ComfyUI's FLUX: shift, scale
QWEN_SPLIT = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
QWEN_LINEAR = {
    "attn.to_out.0": False, "attn.to_add_out": False, "img_mlp.net.0.proj": False, "img_mlp.net.2": True,
    "txt_mlp.net.0.proj": False, "txt_mlp.net.2": True,
}  # fmt: skip
QWEN_MODULATION = {"img_mod.1": 6, "txt_mod.1": 6}
QWEN_NORMS = ("attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k")
QWEN_PLAIN = ("img_in", "txt_in", "time_text_embed.timestep_embedder.linear_1",
              "time_text_embed.timestep_embedder.linear_2", "norm_out.linear", "proj_out")  # fmt: skip
QWEN_OPTIONAL = "time_text_embed.addition_t_embedding.weight"  # Qwen-Image-Layered


@dataclass(frozen=True)
class Source:
    """A layer of the file, or a share of its outputs."""

    module: str
    unsigned: bool = False
    share: tuple[int, int] = (0, 1)  # outputs: which part, of how many
    splits: int = 0  # of a modulation (AWQ); 0: SVDQuant


@dataclass(frozen=True)
class Target:
    """A Linear of ComfyUI: its parts side by side, outputs ("rows") or inputs ("columns", their outputs are added)."""

    axis: str
    parts: tuple[Source, ...]


@dataclass(frozen=True)
class Plan:
    """How a file becomes a model. `plain`: ComfyUI's key -> the file's key; the halves of SWAPPED change places."""

    family: str
    linears: dict[str, Target]
    plain: dict[str, str]
    keys: dict[str, dict[str, str]] = field(repr=False)  # layer: {name as in v2: key in the file}

    def read(self, target: Target, tensors: Mapping[str, torch.Tensor]) -> list[SvdLinear | AwqLinear]:
        """The parts of one Linear, unpacked. ValueError, with the layer's name, where tensors do not fit each other."""
        return [self._part(source, tensors) for source in target.parts]

    def _part(self, source: Source, tensors: Mapping[str, torch.Tensor]) -> SvdLinear | AwqLinear:
        found = {suffix: tensors[key] for suffix, key in self.keys[source.module].items()}
        if source.splits:
            return unpack_awq(source.module, found, source.splits)
        layer = unpack_svd(source.module, found, source.unsigned)
        part, of = source.share
        rows = layer.qweight.shape[0]
        if rows % of:
            raise ValueError(f"{source.module} has {rows} outputs, which do not divide into {of} equal parts.")
        return layer if of == 1 else layer.rows(rows // of * part, rows // of * (part + 1))

    def tensor(self, key: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One plain tensor under ComfyUI's key."""
        found = tensors[self.plain[key]]
        if not key.startswith(SWAPPED):
            return found
        scale, shift = found.chunk(2)
        return torch.cat((shift, scale))


def is_nunchaku(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a Nunchaku checkpoint."""
    ends = {key.rpartition(".")[2] for key in keys}
    return {"qweight", "wscales"} <= ends and not {"qzeros", "scales"} & ends


def plan(keys: Iterable[str], file: str = "The file") -> Plan:
    """What is made of these keys. ValueError, one sentence, for other models, NVFP4 weights, and keys that are missing or
    unknown."""
    layers: dict[str, dict[str, str]] = {}
    singles = []
    for key in keys:
        module, _, suffix = key.rpartition(".")
        suffix = RENAMED.get(suffix, suffix)
        if suffix in SVD | SVD_MORE | AWQ | NVFP4:
            if suffix in layers.setdefault(module, {}):
                raise ValueError(f"{file} holds {module}.{suffix} under two names.")
            layers[module][suffix] = key
        else:
            singles.append(key)
    for module, found in [*layers.items()]:
        if found.keys() & NVFP4:
            raise ValueError(
                f"{file} holds NVFP4 weights ({module}), which are not read; take the int4 release of the same model."
            )
        if "qweight" not in found:  # the bias of a plain layer
            singles += layers.pop(module).values()
    if any(".img_mod." in module for module in layers):
        made = _qwen(layers, singles)
    elif any(module.startswith("single_transformer_blocks.") for module in layers):
        made = _flux(layers, singles)
    else:
        raise ValueError(
            f"{file} is a Nunchaku checkpoint of no model that is read (layers like {min(layers, default='none')}); FLUX.1 and "
            "Qwen-Image are, in int4."
        )
    _complete(file, made, layers, singles)
    return made


def _blocks(names: Iterable[str], stem: str) -> list[int]:
    found = {int(m[1]) for name in names if (m := re.match(rf"{stem}\.(\d{{1,4}})\.", name))}
    return [*range(max(found, default=-1) + 1)]


def _named(known: Iterable[str], prefix: str, names: tuple[str, ...]) -> str:
    """prefix + the first of the names that is known, or the first."""
    return next((prefix + name for name in names if prefix + name in known), prefix + names[0])


def _flux(layers: dict[str, dict[str, str]], singles: list[str]) -> Plan:
    linears: dict[str, Target] = {}
    plain = {
        f"{ours}.{end}": f"{theirs}.{end}"
        for theirs, ours in FLUX_PLAIN.items()
        for end in ("weight", "bias")
        if "guidance" not in theirs or f"{theirs}.{end}" in singles
    }
    for stem, ours, table, modulation, norms in (
        ("transformer_blocks", "double_blocks", FLUX_DOUBLE, FLUX_MODULATION, FLUX_NORMS),
        (
            "single_transformer_blocks",
            "single_blocks",
            FLUX_SINGLE,
            {"modulation.lin": ("norm.linear", 3)},
            FLUX_SINGLE_NORMS,
        ),
    ):
        for i in _blocks(layers, stem):
            theirs = f"{stem}.{i}."
            for name, (axis, parts) in table.items():
                sources = tuple(Source(_named(layers, theirs, names), unsigned) for names, unsigned in parts)
                linears[f"{ours}.{i}.{name}"] = Target(axis, sources)
            for name, (module, splits) in modulation.items():
                linears[f"{ours}.{i}.{name}"] = Target("rows", (Source(theirs + module, splits=splits),))
            for name, names in norms.items():
                plain[f"{ours}.{i}.{name}.weight"] = _named(singles, theirs, tuple(f"{name}.weight" for name in names))
    return Plan("FLUX.1", linears, plain, layers)


def _qwen(layers: dict[str, dict[str, str]], singles: list[str]) -> Plan:
    linears: dict[str, Target] = {}
    plain = {"txt_norm.weight", *(f"{name}.{end}" for name in QWEN_PLAIN for end in ("weight", "bias"))}
    plain |= {QWEN_OPTIONAL} & set(singles)
    for i in _blocks(layers, "transformer_blocks"):
        block = f"transformer_blocks.{i}."
        for module, names in QWEN_SPLIT.items():
            for part, name in enumerate(names):
                linears[block + name] = Target("rows", (Source(block + module, share=(part, len(names))),))
        for module, unsigned in QWEN_LINEAR.items():
            linears[block + module] = Target("rows", (Source(block + module, unsigned),))
        for module, splits in QWEN_MODULATION.items():
            linears[block + module] = Target("rows", (Source(block + module, splits=splits),))
        plain |= {f"{block}{name}.weight" for name in QWEN_NORMS}
    return Plan("Qwen-Image", linears, {key: key for key in plain}, layers)


def _complete(file: str, made: Plan, layers: dict[str, dict[str, str]], singles: list[str]) -> None:
    """Every key of the file has its place, and nothing that the model needs is missing."""
    sources = {source.module: source for target in made.linears.values() for source in target.parts}
    missing = sorted(set(made.plain.values()) - set(singles))
    unknown = sorted(set(singles) - set(made.plain.values()))
    for module, source in sources.items():
        needed = AWQ if source.splits else SVD
        missing += [f"{module}.{suffix}" for suffix in sorted(needed - layers.get(module, {}).keys())]
    for module, found in layers.items():
        allowed = (AWQ | AWQ_MORE if sources[module].splits else SVD | SVD_MORE) if module in sources else set()
        unknown += [key for suffix, key in found.items() if suffix not in allowed]
    remedy = "; download it again, and merge a release in two files (nunchaku.merge_safetensors) into one"
    for what, names, then in (("lacks", missing, remedy), ("holds unknown tensors:", unknown, "")):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise ValueError(
                f"{file} is a Nunchaku checkpoint of {made.family} and {what} {', '.join(names[:4])}{more}{then}."
            )
