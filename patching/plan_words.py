"""What Plan tells of a MODEL: one row for each thing that will act, and the words for its settings and its owner."""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from types import MethodType
from typing import Any

import torch

STAGES = {  # in order of action; when each of them acts
    "weights": "once, as the weights are loaded",
    "run": "around a run of the sampler",
    "step": "at every step",
    "call": "at every call of the model",
    "network": "at every call, as the network is entered",
    "blocks": "at every block",
    "attention": "at every attention call",
    "guidance": "after the calls of a step, on their predictions",
}
TOLD_APART = (
    "node",
    "name",
    "unsupported",
    "inactive",
    "blocks",
    "percents",
    "sigma_percent",
    "end_percent",
    "given",
    "profile",
)
MOST = 12  # numbers of one setting
LONG = 160  # letters of one setting
OURS = __name__.partition(".patching")[0] + "."
CORE = ("comfy", "comfy_api", "comfy_extras", "comfy_execution", "nodes")


@dataclass
class Row:
    """One thing that will act. state: "acts", "off" by its own settings, or "inactive" on this MODEL."""

    stage: str
    owner: str
    name: str
    does: str
    node: str | None = None
    blocks: str | None = None  # of the residual stack, like "2-18,25"
    of: int | None = None
    percent: list[float] | None = None  # part of the noise schedule
    sigma: list[float] | None = None  # the same as noise levels of this MODEL
    state: str = "acts"
    why: str = ""


def settings(thing: Any, skip: Iterable[str] = TOLD_APART) -> str:
    """ "interval 3, order 1": the fields of a dataclass, or the attributes of an object, that are set and can be said."""
    names = [f.name for f in fields(thing)] if is_dataclass(thing) else sorted(getattr(thing, "__dict__", {}))
    said = [(name, value_words(getattr(thing, name))) for name in names if name not in skip and name[0] != "_"]
    return ", ".join(f"{name} {words}".replace("_", " ").strip() for name, words in said if words is not None)


def feature_words(feature: Any) -> str:
    """The settings of a Feature; of an attention plan its method, and the calls that it leaves dense."""
    return attention_words(feature) if hasattr(feature, "dense_steps") else settings(feature)


def attention_words(plan: Any) -> str:
    (first, last), scope = plan.dense_steps, plan.scope
    said = [
        settings(plan.method) or type(plan.method).__name__,
        f"from {plan.min_tokens:,} image tokens on" if plan.min_tokens else "",
        f"dense in the first {first} steps" if first else "",
        f"dense in the last {last} steps" if last else "",
        f"{scope} attention only" if scope != "all" else "",
    ]
    return "; ".join(filter(None, said))


def value_words(value: Any) -> str | None:
    """A setting in a few words; None for what is not set, and for what has no words."""
    if value is None or value is False or value == "":
        return None
    if value is True:
        return ""
    if isinstance(value, int | str):
        return str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, torch.Tensor):
        return str([*value.shape])
    if isinstance(value, frozenset | set) and value and all(isinstance(n, int) for n in value):
        return ranges(sorted(value))
    if isinstance(value, tuple) and any(value) and all(isinstance(n, int | float | str) for n in value[: MOST + 1]):
        return " ".join(str(n) for n in value) if len(value) <= MOST else f"of {len(value)}"
    inside = settings(value) if is_dataclass(value) and not isinstance(value, type) else ""
    return f"({inside})" if 0 < len(inside) <= LONG else None  # weights and tables have no words


def ranges(numbers: Iterable[int]) -> str:
    """Ascending block numbers as the attention nodes take them: "2-18,25"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def called(thing: Any) -> tuple[str, str]:
    """(owner, name) of a function or an object that somebody put on a MODEL."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    if isinstance(thing, MethodType):  # its object's, or that of who bound a function of theirs to the object
        own = getattr(type(thing.__self__), thing.__name__, None) is thing.__func__ or isinstance(thing.__self__, type)
        thing = thing.__self__ if own else thing.__func__
    elif not isinstance(thing, type):
        thing = getattr(thing, "__self__", None) or thing
    described = thing if isinstance(thing, type) or hasattr(thing, "__qualname__") else type(thing)
    name = getattr(described, "__qualname__", "") or type(thing).__name__
    return owner_of(getattr(described, "__module__", "") or ""), name.replace(".<locals>", "")


def owner_of(module: str) -> str:
    """Whose code a module is: "Tessera", "ComfyUI", or the folder of another pack."""
    if f"{module}.".startswith(OURS):
        return "Tessera"
    pack = re.search(r"custom_nodes[./\\]([^/\\.]+)", module)
    if pack:
        return pack[1].replace("_x_", ".")  # how ComfyUI writes a folder's dots
    first = module.partition(".")[0]
    return "ComfyUI" if first in CORE else first or "unknown"
