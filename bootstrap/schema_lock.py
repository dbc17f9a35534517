"""The promise that saved graphs keep working: what of a node's schema (/object_info) may not change, and the sentences
that say what did."""

from typing import Any

KEPT = ("default", "min", "max", "options", "multiselect")
MODEL_FILES = (".json", ".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin", ".onnx")


def slice_of(info: dict[str, Any]) -> dict[str, Any]:
    """The part of a node's entry in /object_info that is locked."""
    return {
        "category": info["category"],
        "inputs": slice_inputs(info["input"]),
        "outputs": [list(pair) for pair in zip(info["output_name"], info["output"], strict=True)],
        "output_node": info["output_node"],
    }


def _options(found: dict[str, Any]) -> dict[str, Any]:
    """Without the wording, and without choices that are files on this machine."""
    kept = {key: found[key] for key in KEPT if key in found}
    options = kept.get("options")
    if options and all(isinstance(o, str) for o in options):
        kept["options"] = [o for o in options if not o.lower().split(" [")[0].endswith(MODEL_FILES)]
        if not kept["options"]:
            del kept["options"]
    elif options and isinstance(options[0], dict):  # conditional inputs: one sub-schema a choice
        kept["options"] = [[o["key"], slice_inputs(o["inputs"])] for o in options]
    return kept


def slice_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """The locked part of the inputs that one choice of a conditional input opens."""
    return {
        name: {"type": kind, "required": group == "required", **_options(rest[0] if rest else {})}
        for group in ("required", "optional")
        for name, (kind, *rest) in inputs.get(group, {}).items()
    }


def broken(locked: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Sentences about what in `current` {node id: slice} breaks graphs saved under `locked`. Empty: nothing does."""
    out = []
    for node, old in locked.items():
        if node not in current:
            out.append(f"{node} is gone; register a replacement and lock again.")
            continue
        new = current[node]
        out += _broken_inputs(node, old["inputs"], new["inputs"])
        if new["outputs"][: len(old["outputs"])] != old["outputs"]:
            out.append(f"{node}: outputs were {old['outputs']}, are {new['outputs']}.")
        for key in ("category", "output_node"):
            if new[key] != old[key]:
                out.append(f"{node}: {key} was {old[key]!r}, is {new[key]!r}.")
    return out


def _broken_inputs(node: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    out = [f"{node}: input {name} is gone." for name in old if name not in new]
    kept = [name for name in new if name in old]
    if not out and list(new)[: len(old)] != kept:
        out.append(f"{node}: new inputs must come after the old ones, was {list(old)}, is {list(new)}.")
    elif not out and kept != list(old):
        out.append(f"{node}: the order of inputs was {list(old)}, is {kept}.")
    out += [f"{node}: new input {n} must be optional." for n in new if n not in old and new[n]["required"]]
    for name in kept:
        out += [f"{node}: input {name}: {what}" for what in _broken_input(old[name], new[name])]
    return out


def _broken_input(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    out = [f"{key} was {old.get(key)!r}, is {new.get(key)!r}."
           for key in ("type", "default", "multiselect") if new.get(key) != old.get(key)]  # fmt: skip
    if new["required"] and not old["required"]:
        out.append("became required.")
    if "min" in new and new["min"] > old.get("min", float("-inf")):
        out.append(f"the smallest value was {old.get('min')}, is {new['min']}.")
    if "max" in new and new["max"] < old.get("max", float("inf")):
        out.append(f"the largest value was {old.get('max')}, is {new['max']}.")
    before, after = old.get("options", []), new.get("options", [])
    if after[: len(before)] != before:
        out.append(f"choices were {before}, are {after}; new ones come last.")
    return out
