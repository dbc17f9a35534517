"""Attention methods and another pack's override, to try the dispatcher with."""

import contextlib
import math

import torch

from tessera import archs
from tessera.methods.attention.call import Answer, Decline
from tessera.patching.attention import OVERRIDE, AttentionFeature
from tessera.patching.run import attach


class Exact:
    """Dense attention as a method, asking for everything that a method may ask for."""

    spatial = False

    def begin(self):
        return []

    def attend(self, state, call):
        assert call.layout.total == call.q.shape[2] == call.k.shape[2]
        assert call.layout.image.stop - call.layout.image.start == math.prod(call.layout.grid)
        assert call.q.shape[0] % len(call.forward.keys) == 0 and call.forward.run.clock.evaluation >= 0
        state.append((call.block.number, call.layout.grid))
        groups = call.q.shape[1] // call.k.shape[1]
        k, v = (t.repeat_interleave(groups, dim=1) for t in (call.k, call.v))
        out = torch.nn.functional.scaled_dot_product_attention(call.q, k, v, call.mask, scale=call.scale)
        pairs = float(call.q.shape[0] * call.q.shape[1] * call.q.shape[2] * k.shape[2])
        return Answer(out, pairs, pairs)


class Nothing:
    """Attention that returns zeros."""

    spatial = False

    def begin(self):
        return None

    def attend(self, state, call):
        return Answer(torch.zeros_like(call.q), 0.0, float(call.q.shape[2]))


class Refuses:
    spatial = False

    def begin(self):
        return None

    def attend(self, state, call):
        raise Decline("not today")


def plan(model, method, name="Plan", **where):
    where = {"min_tokens": 0, **where}
    return attach(model, AttentionFeature("1", name, method=method, **where))


class Foreign:
    """Another pack's override: sees every call, and remembers those over at least the image's tokens inside a block."""

    def __init__(self, model, scale: float = 1.0):
        self.inside, self.calls, self.image, self.scale, self.model = 0, 0, 0, scale, model
        self.tokens = 0

    def __call__(self, func, q, k, v, heads, *args, **kwargs):
        self.calls += 1
        axis = 2 if kwargs.get("skip_reshape") else 1
        self.image += bool(self.inside and q.shape[axis] == k.shape[axis] >= self.tokens)
        return func(q, k, v, heads, *args, **kwargs) * self.scale

    def onto(self, model):
        patched = model.clone()
        patched.model_options["transformer_options"][OVERRIDE] = self
        return patched

    @contextlib.contextmanager
    def counting(self):
        diffusion_model = self.model.model.diffusion_model
        stack = [spec for spec in archs.find(diffusion_model).blocks if spec.stack]
        handles = [diffusion_model.register_forward_pre_hook(self._size, with_kwargs=True)]
        for _, block in (b for spec in stack for b in archs.block_modules(diffusion_model, spec)):
            handles.append(block.register_forward_pre_hook(lambda *_: self._move(1)))
            handles.append(block.register_forward_hook(lambda *_: self._move(-1)))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _move(self, by: int) -> None:
        self.inside += by

    def _size(self, diffusion_model, args, kwargs) -> None:
        x = args[0] if args else kwargs["x"]
        self.tokens = math.prod(archs.find(diffusion_model).grid(diffusion_model, x))
