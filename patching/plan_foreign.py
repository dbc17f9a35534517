"""The rows of everything else on a MODEL in Plan: what core's nodes and other packs have put on it, by the public places
where a ModelPatcher keeps patches. Nothing is called."""

import re
from collections import Counter
from typing import Any

import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from .attention import OVERRIDE
from .plan_words import Row, called, ranges, value_words
from .quant_ops import LAYOUTS
from .rivals import exchanged
from .run import FEATURES, LEDGER, RUN, WRAPPER_KEY

COMPILE, CONTEXT, EASYCACHE = "torch.compile", "context_handler", "easycache"
AROUND = {  # the stage of each kind of wrapper, and whether it stands around the whole run
    WrappersMP.OUTER_SAMPLE: "run", WrappersMP.PREPARE_SAMPLING: "run", WrappersMP.SAMPLER_SAMPLE: "run",
    WrappersMP.PREDICT_NOISE: "step", WrappersMP.CALC_COND_BATCH: "step", WrappersMP.APPLY_MODEL: "call",
    WrappersMP.DIFFUSION_MODEL: "network",
}  # fmt: skip
SINGLE = {  # entries of model_options: their stage, and what they do
    CONTEXT: ("step", "cuts the latent into windows and calls the model for each"),
    "sampler_calc_cond_batch_function": ("step", "makes the predictions of a step in core's place"),
    "multigpu_clones": ("step", "shares the calls of a step out to several GPUs"),
    "model_function_wrapper": ("call", "is called in place of the model, and may call it"),
    "denoise_mask_function": ("step", "changes the mask of inpainting"),
    "sampler_pre_cfg_function": ("guidance", "changes the predictions before guidance"),
    "sampler_cfg_function": ("guidance", "joins the predictions in place of plain guidance"),
    "sampler_post_cfg_function": ("guidance", "changes the guided prediction"),
}
CALLBACKS = {  # the stage of each kind of callback that does not come as weights are loaded or put off
    CallbacksMP.ON_PRE_RUN: "run", CallbacksMP.ON_CLEANUP: "run", CallbacksMP.ON_INJECT_MODEL: "run",
    CallbacksMP.ON_EJECT_MODEL: "run", CallbacksMP.ON_PREPARE_STATE: "step", CallbacksMP.ON_APPLY_HOOKS: "step",
}  # fmt: skip
PLAIN_OPTIONS = {  # entries of model_options that are told elsewhere, or do nothing by themselves
    *SINGLE, "transformer_options", "torch_compile_kwargs", "registered_hooks", "multigpu_thread_pool", "ignore_multigpu",
}  # fmt: skip
BOTH_PROMPTS = "disable_cfg1_optimization"
CACHE_SETTINGS = ("reuse_threshold", "start_percent", "end_percent")
KNOWN = {"patches", "patches_replace", "wrappers", "callbacks", OVERRIDE, FEATURES, LEDGER, RUN}
CODECS = {"table4": "4-bit codes of a table", "table3": "3-bit codes of a table"}  # of our own packed weights
BLOCK_PATCHES = re.compile("(double|single|input|output|middle)_(block|patch)|mlp|noise_refiner")


def rows(model: Any) -> list[Row]:
    """In the order of action inside each stage, as far as core fixes it; stages are mixed."""
    return [*weights(model), *callbacks(model), *around(model), *singles(model), *options_of(model), *insides(model),
            *attention(model)]  # fmt: skip


def weights(model: Any) -> list[Row]:
    return [*packed(model), *adapters(model), *objects(model), *attached(model)]


def packed(model: Any) -> list[Row]:
    """Quantized layers, by format."""
    found: Counter = Counter()
    for module in model.get_model_object("diffusion_model").modules():
        layout = getattr(getattr(module, "weight", None), "_layout_cls", None)
        if layout is not None:
            codec = getattr(getattr(module.weight, "_params", None), "codec", None)
            kind = CODECS.get(codec, codec) or getattr(module, "quant_format", None) or layout
            found[kind, "Tessera" if layout in LAYOUTS or "Tessera" in str(layout) else "ComfyUI"] += 1
    return [
        Row("weights", owner, "Quantized weights", f"{count} layers hold packed weights as {kind}")
        for (kind, owner), count in found.items()
    ]


def adapters(model: Any) -> list[Row]:
    """LoRA and other weight patches: how many layers, at which strengths, how deep they lie on one layer."""
    every = [(patch, key) for key, patches in model.patches.items() for patch in patches]
    made = []
    for kind in dict.fromkeys(adapter_kind(patch[1]) for patch, _ in every):
        mine = [(patch[0], key) for patch, key in every if adapter_kind(patch[1]) == kind]
        strengths = sorted({round(float(strength), 6) for strength, _ in mine})
        deep = max(Counter(key for _, key in mine).values())
        layers = len({key for _, key in mine})
        spread = " and ".join(f"{s:g}" for s in strengths)
        spread = spread if len(strengths) < 4 else f"{strengths[0]:g} to {strengths[-1]:g}"
        stacked = f", up to {deep} on one layer" if deep > 1 else ""
        beside = "; kept beside the packed weights, exactly" if packed(model) else "; added to the weights"
        name = "LoRA" if kind == "lora" else f"Weight patch ({kind})"
        made.append(
            Row(
                "weights", "ComfyUI", name, f"{layers} weight{'s' * (layers > 1)} at strength {spread}{stacked}{beside}"
            )
        )
    hooked = sum(len(keys) for keys in model.hook_patches.values())
    if hooked:
        made.append(Row("weights", "ComfyUI", "LoRA hooks", f"{hooked} weights, switched on and off while sampling"))
    return made


def adapter_kind(patch: Any) -> str:
    """ "lora", "loha", "diff"… of an entry of ModelPatcher.patches."""
    name = getattr(patch, "name", None)
    if isinstance(name, str):
        return name
    return str(patch[0]) if isinstance(patch, tuple) and len(patch) == 2 and isinstance(patch[0], str) else "diff"


def objects(model: Any) -> list[Row]:
    """Object patches: those of one kind at numbered places are one row."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for path, thing in model.object_patches.items():
        found.setdefault((*placed(thing), re.sub(r"\d+", "*", path)), []).append(path)
    made = []
    for (owner, name, path), paths in found.items():
        stage = "call" if path == "diffusion_model" else "blocks" if path.startswith("diffusion_model.") else "run"
        made.append(Row(stage, owner, name, f"in place of {path if len(paths) > 1 else paths[0]}{_times(len(paths))}"))
    return made


def placed(thing: Any) -> tuple[str, str]:
    """(owner, name) of what an object patch puts in place."""
    if isinstance(thing, torch.dtype):  # as core's node of the compute type does
        return "ComfyUI", str(thing).removeprefix("torch.")
    return ("torch", COMPILE) if is_compiled(thing) else called(thing)


def is_compiled(thing: Any) -> bool:
    return type(thing).__name__ == "OptimizedModule"


def compiled(model: Any) -> bool:
    """By core's node, or as object patches of modules, as other packs do it."""
    wrapped = COMPILE in model.wrappers.get(WrappersMP.APPLY_MODEL, {})
    return wrapped or any(is_compiled(part) for part in model.object_patches.values())


def attached(model: Any) -> list[Row]:
    """Injections, weight wrappers and models that come along."""
    made = [
        Row("weights", called(parts[0].inject)[0], str(key), f"injects into the modules{_times(len(parts))}")
        for key, parts in model.injections.items()
        if parts
    ]
    for path, functions in model.weight_wrapper_patches.items():
        owner, name = called(functions[0] if isinstance(functions, list | tuple) else functions)
        made.append(Row("weights", owner, name, f"changes {path} at each use"))
    for key, models in model.additional_models.items():
        if models:
            made.append(Row("weights", "ComfyUI", str(key), _along(len(models))))
    made += [Row("run", called(held)[0], str(key), "data kept on the MODEL, which its owner reads")
             for key, held in model.attachments.items()]  # fmt: skip
    return made


def _times(count: int) -> str:
    return f", {count} times" if count > 1 else ""


def _along(count: int) -> str:
    return "another model is loaded with this one" if count == 1 else f"{count} more models are loaded with this one"


def callbacks(model: Any) -> list[Row]:
    """What asked to be called as the MODEL is loaded, is cleaned up, or its steps begin."""
    merged = model.model_options.get("transformer_options", {}).get("callbacks", {})
    held = [(kind, key, f) for part in (merged, model.callbacks) for kind, keyed in part.items()
            for key, functions in keyed.items() for f in functions]  # fmt: skip
    made = [Row(CALLBACKS.get(kind, "weights"), *called(f), f"callback {kind}{_label(key)}") for kind, key, f in held]
    return [row for row in made if row.owner != "Tessera"]


def _label(key: Any) -> str:
    return f' ("{key}")' if key is not None else " (without a key)"


def options_of(model: Any) -> list[Row]:
    """Entries of model_options that core has no place for, but one that makes the work twice as much."""
    made = []
    for key, held in model.model_options.items():
        if key == BOTH_PROMPTS and held:
            made.append(
                Row("step", "ComfyUI", str(key), "at cfg 1 the negative prompt is evaluated too: twice the work there")
            )
        elif key not in PLAIN_OPTIONS and key != BOTH_PROMPTS:
            owner = called(held)[0] if hasattr(held, "__dict__") else "unknown"
            made.append(Row("step", owner, str(key), "an option of the MODEL that its owner reads"))
    return [row for row in made if row.owner != "Tessera"]


def around(model: Any) -> list[Row]:
    """Wrappers of every kind, the outermost first. Those of our runtime are not told: our nodes' rows are."""
    merged = model.model_options.get("transformer_options", {}).get("wrappers", {})
    made = []
    for kind, stage in AROUND.items():
        keyed = {**merged.get(kind, {})}
        for key, functions in model.wrappers.get(kind, {}).items():
            keyed[key] = [*keyed.get(key, ()), *functions]
        for key, functions in keyed.items():
            if key == WRAPPER_KEY or (key == EASYCACHE and kind != WrappersMP.DIFFUSION_MODEL and _plain_cache(model)):
                continue
            made += [_wrapper(model, kind, stage, key, function) for function in functions]
    return made


def _plain_cache(model: Any) -> bool:
    """Core's EasyCache has wrappers of three kinds; one row is enough."""
    return type(model.model_options["transformer_options"].get(EASYCACHE)).__name__ == "EasyCacheHolder"


def _wrapper(model: Any, kind: str, stage: str, key: Any, function: Any) -> Row:
    owner, name = called(function)
    if key == COMPILE:
        kwargs = model.model_options.get("torch_compile_kwargs", {})
        words = ", ".join(f"{k} {v}" for k, v in kwargs.items() if v)
        return Row(stage, owner, COMPILE, f"the model runs compiled: {words}")
    if key == EASYCACHE:
        held = model.model_options["transformer_options"].get(EASYCACHE)
        said = ((name, value_words(getattr(held, name, None))) for name in CACHE_SETTINGS)
        words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in said if value is not None)
        return Row(
            stage, owner, getattr(held, "name", "EasyCache"), f"skips steps by how much the input changed: {words}"
        )
    return Row(stage, owner, name, f"wraps {kind}{_label(key)}")


def singles(model: Any) -> list[Row]:
    """Functions in model_options, of which some places have room for one only."""
    made = []
    for entry, (stage, does) in SINGLE.items():
        held = model.model_options.get(entry)
        for function in held if isinstance(held, list) else [held] * (held is not None):
            owner, name = called(function)
            if entry == CONTEXT:
                schedule = getattr(getattr(function, "context_schedule", None), "name", "")
                sizes = [f"{n} {getattr(function, f'context_{n}')}" for n in ("length", "overlap", "stride")
                         if hasattr(function, f"context_{n}")]  # fmt: skip
                does = f"{SINGLE[CONTEXT][1]}: {', '.join([*sizes, schedule])}".rstrip(", :")
                name = "Context windows"
            made.append(Row(stage, owner, name, f"{entry}: {does}"))
    return made


def insides(model: Any) -> list[Row]:
    """Patches inside the network: in lists by name, and in place of blocks. Ours are told with our nodes."""
    options = model.model_options.get("transformer_options", {})
    made = []
    for name, patches in options.get("patches", {}).items():
        stage = "attention" if name.startswith("attn") else "blocks" if BLOCK_PATCHES.match(name) else "network"
        made += [Row(stage, *called(patch), f"patch {name}") for patch in patches]
    for where, hooks in options.get("patches_replace", {}).items():
        grouped: dict[tuple[str, str, str], list[int]] = {}
        for key, hook in hooks.items():
            kind, number = (key[0], key[1]) if isinstance(key, tuple) and len(key) > 1 else (str(key), -1)
            grouped.setdefault((*called(hook), str(kind)), []).append(number if isinstance(number, int) else -1)
        for (owner, name, kind), numbers in grouped.items():
            stage = "attention" if where.startswith("attn") else "blocks"
            made.append(Row(stage, owner, name, f"in place of {kind} {ranges(sorted(numbers))} ({where})"))
    rest = [key for key in options if key not in KNOWN and key != EASYCACHE]
    made += [Row("network", called(options[key])[0] if hasattr(options[key], "__dict__") else "unknown", str(key),
                 "an option that its owner reads while the model runs") for key in rest]  # fmt: skip
    return [row for row in made if row.owner != "Tessera"]


def attention(model: Any) -> list[Row]:
    """The override, which our dispatcher asks for what no plan of ours serves, and exchanged functions."""
    made = []
    held = model.model_options.get("transformer_options", {}).get(OVERRIDE)
    if held is not None:
        made.append(Row("attention", *called(held), "overrides every attention call that reaches it"))
    module = exchanged(model.get_model_object("diffusion_model"))
    if module is not None:
        made.append(
            Row("attention", "another pack", "optimized_attention", f"was exchanged in {module}: asks no override")
        )
    return made


def conflicts(model: Any, features: Any) -> list[str]:
    """What of others gets in the way of ours, or of each other, in sentences."""
    options = model.model_options.get("transformer_options", {})
    made = []
    if compiled(model) and model.model_options.get("model_function_wrapper") is not None:
        made.append("torch.compile beside a model_function_wrapper: where it changes shapes, the model compiles again")
    if compiled(model) and EASYCACHE in options:
        made.append(
            "torch.compile beside core's EasyCache: its decision breaks the compiled graph, and may skip nothing"
        )
    if features and exchanged(model.get_model_object("diffusion_model")) is not None:
        made.append("another pack's attention function asks no override: Tessera's attention nodes are not asked")
    taken = [path for path, thing in model.object_patches.items()
             if path == "diffusion_model.forward" and called(thing)[0] != "Tessera"]  # fmt: skip
    if taken and features:
        owner = called(model.object_patches[taken[0]])[0]
        made.append(f"{owner} put its own forward in place of the model's: what that does not call cannot be served")
    return made
