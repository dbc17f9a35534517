"""The blocks and attention of a bridged diffusers model as ComfyUI's own models offer theirs: hooks of
patches_replace["dit"] around every block, block_index and block_type in transformer_options, attention through
optimized_attention and its override."""

import inspect
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from comfy.ldm.modules import attention as core

from .. import archs
from .diffusers_processors import serve
from .diffusers_streams import OURS, RETURNS, THEIRS

running: ContextVar[dict[str, Any] | None] = ContextVar("tessera_bridged", default=None)  # transformer_options


def offer(model: torch.nn.Module, arch: archs.Arch) -> None:
    """Puts the hooks on the blocks and attention modules of a model of that family, for good. Inert outside `running`."""
    for spec in arch.blocks:
        found = archs.block_modules(model, spec)
        for index, (_, block) in enumerate(found):
            if spec.replace is not None:
                block.forward = MethodType(_offered(type(block), spec, index, len(found)), block)
    serve(model, attend)


def attend(q, k, v, mask, scale, gqa) -> torch.Tensor | None:
    """q [B, H, N, D], k, v [B, Hkv, M, D] -> [B, H, N, D], by whatever attention ComfyUI has set up."""
    options = running.get()
    if options is None:
        return None
    more = {} if scale is None else {"scale": scale}
    if gqa:
        more["enable_gqa"] = True
    return core.optimized_attention(
        q, k, v, q.shape[1], mask=mask, skip_reshape=True, skip_output_reshape=True, transformer_options=options, **more
    )


def _offered(kind: type, spec: archs.Blocks, index: int, count: int):
    """The forward of one block of that class: its own, or the hook that a MODEL has for it. It holds no block, so that
    a copy of the model runs the copy's."""
    written, returns = kind.forward, RETURNS[kind.__name__]
    signature = inspect.signature(written)
    place = {"block_index": index, "block_type": (spec.replace or "").removesuffix("_block"), "total_blocks": count}

    def forward(block, *args, **kwargs):
        options = running.get()
        if options is None:
            return written(block, *args, **kwargs)
        hook = options.get("patches_replace", {}).get("dit", {}).get((spec.replace, index))
        before = {name: options.get(name) for name in place}
        options.update(place)
        try:
            if hook is None:
                return written(block, *args, **kwargs)
            given = {**signature.bind(block, *args, **kwargs).arguments}
            owner = next(iter(given))
            call = {OURS.get(name, name): value for name, value in given.items() if name != owner}

            def original_block(changed: dict[str, Any]) -> dict[str, Any]:
                told = {THEIRS.get(name, name): value for name, value in changed.items()}
                out = written(block, **{name: value for name, value in told.items() if name in signature.parameters})
                return dict(zip(returns, out if isinstance(out, tuple) else (out,), strict=True))

            out = hook({**call, "transformer_options": options}, {"original_block": original_block})
        finally:
            options.update(before)
        made = tuple(out.get(name, call[name]) for name in returns)
        return made[0] if len(made) == 1 else made

    return forward
