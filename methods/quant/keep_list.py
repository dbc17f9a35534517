"""Which Linear layers of a model are quantized. Kept as they are: norms, modulation, embeddings, what leads into the blocks
and out of them, and what is too small to matter; names are searched, upper and lower case alike."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

DEFAULT = (
    r"(^|\.)(img_in|txt_in|time_in|vector_in|guidance_in|final_layer|patch_embedding|head)(\.|$)"
    r"|norm|modulation|mod\.lin|adaLN|proj_out|embed"
)
PRESETS = {  # by home package (archs), what else their layers of these kinds are called
    "aura": r"mod(C|X|CX|F)\.|cond_seq_linear|init_x_linear|final_linear",
    "chroma": r"distilled_guidance_layer",
    "chroma_radiance": r"distilled_guidance_layer|nerf",
    "ernie": r"^text_proj|final_linear",
    "genmo": r"mod_[xy]|^t5_",
    "hidream": r"^caption_projection",
    "hunyuan3d": r"^(latent|cond)_in",
    "hydit": r"^(mlp_t5|pooler)",
    "ideogram4": r"^(input_proj|llm_cond_proj)",
    "kandinsky5": r"^out_layer",
    "krea2": r"^(first|last|tmlp|tproj|txtmlp|txtfusion)",
    "lens": r"(img|txt)_mod\.",
    "lightricks": r"patchify_proj|caption_projection|connector",
    "mage_flow": r"(img|txt)_mod\.",
    "pixart": r"^t_block",
    "qwen_image": r"(img|txt)_mod\.",
    "wan": r"^(time_projection|img_emb)",
}
ALIASES = {"ltxv": "lightricks", "ltxav": "lightricks", "lumina2": "lumina", "cogvideox": "cogvideo", "mochi": "genmo",
           "sd3": "modules.diffusionmodules.mmdit", "aura_flow": "aura", "wan2.1": "wan", "pixart_alpha": "pixart",
           "pixart_sigma": "pixart", "hunyuan3d2": "hunyuan3d", "omnigen2": "omnigen"}  # fmt: skip
SMALLEST = 64  # input and output channels
LONGEST = 2000  # characters of a pattern
BLOCK = re.compile(r"(^|\.)\d+\.")  # a numbered part with something below it
SCALES = ("weight_scale", "scale_weight", "comfy_quant", "weight_scale_2", "qweight", "wscales")


@dataclass(frozen=True)
class Selection:
    """chosen: paths of layers to quantize, in the model's order. kept: the others, with the reason."""

    chosen: tuple[str, ...]
    kept: dict[str, str] = field(default_factory=dict)


def select(
    model: torch.nn.Module | Mapping[str, torch.Tensor],
    architecture: str = "",
    pattern: str | None = None,
    smallest: int = SMALLEST,
) -> Selection:
    """model: a diffusion model (its Linear modules), or the state dict of one (all its weights, without a prefix).
    architecture: archs' home package or core's name, "" for none we know. pattern: the user's own, in place of ours.
    ValueError for a pattern that is no regular expression."""
    rules = _rules(architecture, pattern)
    chosen, kept = [], {}
    for path, weight, done in _layers(model):
        reason = _reason(path, weight, done, rules, smallest)
        if reason is None and pattern is None and not BLOCK.search(path):
            reason = "lies outside the blocks"
        if reason is None:
            chosen.append(path)
        else:
            kept[path] = reason
    return Selection(tuple(chosen), kept)


def _rules(architecture: str, pattern: str | None) -> list[re.Pattern[str]]:
    """Patterns whose layers are kept."""
    if pattern is None:
        preset = PRESETS.get(ALIASES.get(architecture, architecture))
        return [re.compile(rule, re.IGNORECASE) for rule in (DEFAULT, preset) if rule]
    if len(pattern) > LONGEST:
        raise ValueError(f"The pattern of layers to keep has {len(pattern)} characters; use at most {LONGEST}.")
    try:
        return [re.compile(pattern, re.IGNORECASE)] if pattern else []
    except re.error as error:
        raise ValueError(
            f"The pattern of layers to keep is no regular expression ({error}); write names with | between them."
        ) from error


def _layers(model: torch.nn.Module | Mapping[str, torch.Tensor]):
    """(path, weight, whether it is quantized already) of all candidates."""
    if isinstance(model, torch.nn.Module):
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                yield path, module.weight, False
        return
    for key, weight in model.items():
        path, _, name = key.rpartition(".")
        if name == "weight" and path:
            yield path, weight, any(f"{path}.{scale}" in model for scale in SCALES)


def _reason(path: str, weight: torch.Tensor, done: bool, rules: list[re.Pattern[str]], smallest: int) -> str | None:
    """Why a layer is kept, None for one that is not."""
    if weight.ndim != 2:
        return f"is no matrix but {[*weight.shape]}"
    if done or not weight.is_floating_point() or weight.element_size() == 1:
        return "is quantized already"
    if min(weight.shape) < smallest:
        return f"is small, {[*weight.shape]}"
    for rule in rules:
        if found := rule.search(path):
            return f"its name matches {found.group().strip('.')!r}"
    return None
