"""Why no attention of a run came to a plan: who was in the way, and what the user can do."""

import sys
from typing import Any

import comfy.ldm.modules.attention as core

from .reach import CALLED

OVERRIDABLE = core.attention_pytorch.__code__  # that of every function which asks ComfyUI's override first


def sentence(run: Any, plan: Any) -> str:
    """Which one wins, and the remedy; empty where nobody is known to be in the way."""
    if not run.forwards:
        return ""
    if run.asked:
        return _newer(run, plan)
    if not run.arch.override:
        return f"another node has exchanged the attention of this {run.arch.name} and wins. Remove one of the two."
    name = exchanged(run.network)
    if name is not None:
        return f"another pack has exchanged {CALLED} in {name}, which asks no override, and wins. Switch that one off."
    return (
        "another node after it put its own attention in the place of this one and wins. Put this node after that one; "
        "then both work."
    )


def _newer(run: Any, plan: Any) -> str:
    """Plans that come after this one on the MODEL and left it nothing."""
    from .attention import PlanState

    later = run.acting[run.acting.index(plan) + 1 :]
    states = {f.name: run.states[f] for f in later if isinstance(run.states[f], PlanState)}
    names = [name for name, state in states.items() if state.served]
    return f"{' and '.join(names)} after it served every call and wins. Give them different blocks." if names else ""


def exchanged(diffusion_model: Any) -> str | None:
    """Module of this model family whose attention function another pack has exchanged for one that asks no override."""
    used = {type(module).__module__ for module in diffusion_model.modules()}
    families = tuple({name.rpartition(".")[0] + "." for name in used if name.startswith("comfy.ldm.")})
    for name in sorted(used | {name for name in sys.modules if name.startswith(families)}):
        function = getattr(sys.modules.get(name), CALLED, None)
        if function is not None and getattr(function, "__code__", None) is not OVERRIDABLE:
            return name
    return None
