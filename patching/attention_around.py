"""Features around attention calls: they see each call of the residual stack before any plan does, and may answer it with
what an earlier one gave. What they let pass goes on to the dispatcher (attention.py)."""

from typing import Any, ClassVar

import torch

from .blocks import BlockPosition, positions
from .convention import NAMES, unpack
from .run import Feature


class AroundAttention(Feature):
    """A feature that may answer in place of attention calls."""

    def around_call(
        self, state: Any, forward: Any, block: BlockPosition, nth: int, q: torch.Tensor, proceed
    ) -> torch.Tensor:
        """Call number nth of a block. q as the model gives it, the batch first; proceed() computes the output as the
        model wants it, the batch first too. Clone what is kept."""
        return proceed()


def arounds(forward) -> list[AroundAttention]:
    return [f for f in forward.run.acting if isinstance(f, AroundAttention)]


def around(forward, feature: AroundAttention, dispatch):
    """The dispatcher with a feature in front of it."""
    stack = stack_of(forward)
    met: dict[int, int] = {}  # calls of each block

    def hook(func, *args, **kwargs):
        proceed = lambda: dispatch(func, *args, **kwargs)  # noqa: E731
        block = None if forward.passed_on else block_of(forward, stack, options_of(kwargs))
        if block is None:
            return proceed()
        nth = met.get(block.number, 0)
        met[block.number] = nth + 1
        forward.calls[block.number] = nth  # the dispatcher counts on from here, also past calls that it never saw
        forward.asked = True
        q = kwargs["q"] if "q" in kwargs else args[NAMES.index("q")]
        return feature.around_call(forward.run.states[feature], forward, block, nth, q, proceed)

    return hook


class KeyFeature(Feature):
    """A feature that may change what the blocks of the stack attend to, before anything else sees the call."""

    def around_keys(self, state: Any, forward: Any, q, k, v, mask) -> tuple[Any, Any, Any] | None:
        """q [B, H, N, D], k, v [B, Hkv, M, D], mask 4-D or None -> other k, v and mask for the same queries; None: as
        they are. Asked for every attention call while forward.block is computed."""
        return None


def keepers(forward) -> list[KeyFeature]:
    return [f for f in forward.run.acting if isinstance(f, KeyFeature)]


def with_keys(forward, keeper: KeyFeature, dispatch):
    """The dispatcher behind a feature that gives it keys, values and a mask."""

    def hook(func, *args, **kwargs):
        if forward.block is None or forward.passed_on:
            return dispatch(func, *args, **kwargs)
        q, k, v, mask, _ = unpack(args, kwargs)
        changed = keeper.around_keys(forward.run.states[keeper], forward, q, k, v, mask)
        if changed is None:
            return dispatch(func, *args, **kwargs)
        given = {**dict(zip(NAMES, args, strict=False)), **kwargs, "mask": changed[2], "skip_reshape": True}
        rest = {name: value for name, value in given.items() if name not in NAMES[:4]}
        return dispatch(func, q, *changed[:2], given["heads"], **rest)

    return hook


class PastFeature(Feature):
    """A feature that keeps keys and values of finished frames, and gives them to the self-attention of later ones."""

    adds_keys: ClassVar[bool] = True

    def with_past(self, state: Any, forward: Any, place: tuple[int, int], k, v) -> tuple[Any, Any]:
        """k, v [B, H, M, D] of the self-attention at that place, (number of the block, call in it) -> with those of
        forward.before finished frames before them. A list of calls' places is the same in every forward."""
        return k, v


def with_past(forward, dispatch):
    """The dispatcher with the keys of finished frames before a call's own."""
    feature = next((f for f in forward.run.acting if isinstance(f, PastFeature)), None)
    if feature is None:
        return dispatch
    stack = stack_of(forward)

    def hook(func, *args, **kwargs):
        block = None if forward.passed_on else block_of(forward, stack, options_of(kwargs))
        if block is None:
            return dispatch(func, *args, **kwargs)
        nth, kinds = forward.calls.get(block.number, 0), block.spec.calls
        try:
            if not kinds or kinds[nth % len(kinds)] != "self":
                return dispatch(func, *args, **kwargs)
            q, k, v, mask, _ = unpack(args, kwargs)
            own = k.shape[2]
            k, v = feature.with_past(forward.run.states[feature], forward, (block.number, nth), k, v)
            if k.shape[2] == own:
                return dispatch(func, *args, **kwargs)
            if mask is not None:
                mask = torch.nn.functional.pad(mask, (k.shape[2] - own, 0), value=mask.dtype == torch.bool)
            given = {**dict(zip(NAMES, args, strict=False)), **kwargs, "mask": mask, "skip_reshape": True}
            rest = {name: value for name, value in given.items() if name not in NAMES[:4]}
            return dispatch(func, q, k, v, given["heads"], **rest)
        finally:
            forward.calls[block.number] = nth + 1  # the dispatcher does not count what it hands on unseen

    return hook


def stack_of(forward) -> dict[tuple[str, int], BlockPosition]:
    """Blocks of the residual stack as calls name them."""
    return {(b.spec.replace or b.spec.path, b.index): b for b in positions(forward.run.arch, forward.diffusion_model)}


def block_of(forward, stack, options) -> BlockPosition | None:
    """The block of the residual stack that makes this call."""
    if not forward.run.arch.indexed:
        return forward.block
    return stack.get((f"{options.get('block_type')}_block", options.get("block_index"))) or forward.block


def options_of(kwargs) -> dict[str, Any]:
    return kwargs.get("transformer_options") or {}
