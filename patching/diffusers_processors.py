"""Attention of diffusers' models in another's hands. A processor's own code runs, with the two functions that it calls for
softmax attention exchanged, so nothing of any processor is repeated here; one that calls neither (Sana's linear
attention) runs as it is."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch.nn import functional

Attend = Callable[..., torch.Tensor | None]  # (q, k, v [B, H, N, D], mask, scale, gqa) -> [B, H, N, D]; None: not mine
PLAIN, DISPATCHED = "scaled_dot_product_attention", "dispatch_attention_fn"


class Functional:
    """torch.nn.functional with another softmax attention, as `F` of a processor."""

    def __init__(self, attend: Attend):
        self._attend = attend

    def __getattr__(self, name: str) -> Any:
        return getattr(functional, name)

    def scaled_dot_product_attention(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ) -> torch.Tensor:
        """query [B, H, N, D], key and value [B, Hkv, M, D] -> [B, H, N, D]."""
        out = None
        if not (dropout_p or is_causal):
            out = self._attend(query, key, value, attn_mask, scale, enable_gqa)
        if out is None:
            out = functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        return out


def dispatched(original: Callable[..., torch.Tensor], attend: Attend) -> Callable[..., torch.Tensor]:
    """Stands in for diffusers' dispatch_attention_fn: tokens before heads, [B, N, H, D]."""

    def dispatch_attention_fn(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *args, **kwargs
    ):
        out = None
        if not (dropout_p or is_causal):
            heads_first = (t.transpose(1, 2) for t in (query, key, value))
            out = attend(*heads_first, attn_mask, scale, enable_gqa)
        if out is None:
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, *args, **kwargs)
        return out.transpose(1, 2)

    return dispatch_attention_fn


def served(processor: Any, attend: Attend) -> Any:
    """A processor of a derived class that asks `attend`; the same one where it calls no softmax attention."""
    kind = type(processor)
    written = kind.__call__
    if not isinstance(written, FunctionType) or not {PLAIN, DISPATCHED} & {*written.__code__.co_names}:
        return processor
    names = {**written.__globals__}
    if names.get("F") is functional:
        names["F"] = Functional(attend)
    if DISPATCHED in names:
        names[DISPATCHED] = dispatched(names[DISPATCHED], attend)
    call = FunctionType(written.__code__, names, written.__name__, written.__defaults__, written.__closure__)
    call.__kwdefaults__ = written.__kwdefaults__
    call.__annotations__ = written.__annotations__
    ours = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__, "plain": processor})
    made = object.__new__(ours)
    made.__dict__.update(processor.__dict__)
    return made


def serve(model: torch.nn.Module, attend: Attend) -> int:
    """Puts served processors on every attention module of a model; how many of them can be asked."""
    count = 0
    for module in model.modules():
        get = getattr(module, "get_processor", None)
        if get is None or getattr(get(), "plain", None) is not None:
            continue
        ours = served(get(), attend)
        if ours is not get():
            module.set_processor(ours)
            count += 1
    return count


def keep_eager(model: torch.nn.Module) -> None:
    """Keeps served processors out of graphs that torch.compile makes: resuming in a function of exchanged names fails."""
    for module in model.modules():
        kind = type(module.get_processor()) if hasattr(module, "get_processor") else None
        if getattr(kind, "plain", None) is not None and not getattr(kind, "eager", False):
            kind.__call__, kind.eager = torch.compiler.disable(kind.__call__), True


def restore(model: torch.nn.Module) -> None:
    """Puts back the processors that `serve` replaced."""
    for module in model.modules():
        plain = getattr(module.get_processor(), "plain", None) if hasattr(module, "get_processor") else None
        if plain is not None:
            module.set_processor(plain)
