"""Attention that ComfyUI's override cannot reach, because the model does not pass transformer_options on (PixArt,
HunyuanDiT, ERNIE-Image). The attention module runs its own forward, with our dispatcher in the place of the global
function `optimized_attention` that it calls; nothing of the forward is repeated here."""

from types import FunctionType, MethodType
from typing import Any

from .. import archs
from .blocks import block_path, positions
from .forwards import StandIn, exchange, standing
from .run import current_forward

CALLED = "optimized_attention"


class ReachedForward(StandIn):
    """Stands in for the forward of an attention module. Inert outside our runs."""

    def __init__(self, original: MethodType):
        self.original = original

    def around(self, forward: Any) -> Any:
        return forward  # compiled, it calls its own attention: nothing there can be reached

    def __call__(self, *args, **kwargs):
        forward = current_forward.get()
        if forward is None or forward.dispatch is None:
            return self.original(*args, **kwargs)
        written = self.original.__func__
        dense = written.__globals__[CALLED]  # looked up at each call: other packs exchange it
        names = {**written.__globals__, CALLED: lambda *a, **k: forward.dispatch(dense, *a, **k)}
        run = FunctionType(written.__code__, names, written.__name__, written.__defaults__, written.__closure__)
        run.__kwdefaults__ = written.__kwdefaults__
        return MethodType(run, self.original.__self__)(*args, **kwargs)


def wrap_attention(patched) -> None:
    """Object patches for the attention modules of this MODEL that no override reaches; ComfyUI restores them on unload.
    A forward that another pack has exchanged stays as it is: its calls do not come to us."""
    diffusion_model = patched.get_model_object("diffusion_model")
    arch = archs.find(diffusion_model)
    for block in positions(arch, diffusion_model) if arch is not None else ():
        if block.spec.attention:
            path = f"{block_path(diffusion_model, block.spec, block.index)}.{block.spec.attention}"
            current: Any = standing(patched, f"{path}.forward")
            if isinstance(current, MethodType) and CALLED in current.__func__.__code__.co_names:
                exchange(patched, path, lambda forward, _: ReachedForward(forward))
