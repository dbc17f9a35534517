"""Block-causal linear attention: the tokens of chunk c see all tokens of the chunks c' <= c.

    S_c = S_in + sum_{j in chunks <= c} phi(k_j)^T v_j      z_c = z_in + sum phi(k_j)
    out_i = phi(q_i) S_c / (phi(q_i) z_c + eps)             i in chunk c

This is linear_attention.py with a running state, the constant-memory key/value cache of SANA-Video's long clips (arXiv
2509.24695, section 3.3). The state that comes in stands for everything before the first token. A clip that is cut
between chunks and continued from the state that came out gives the same bits as one pass: a chunk's own sums depend on
that chunk alone, and chunks are added in their order.
"""

import torch

from .._triton import on_gpu
from . import _launch, _reference
from ._passes import backward, check, empty_outputs, forward, state_width


def chunk_bounds(frames: int, size: int, tokens: int = 1) -> list[int]:
    """Bounds in tokens of chunks of `size` frames of `tokens` each; the first chunk takes the remainder, so 43 frames
    in tens are [0, 13, 23, 33, 43]. ValueError for counts below 1."""
    if min(frames, size, tokens) < 1:
        raise ValueError(
            f"Chunks need at least one frame and token, got {frames} frames, {size} a chunk, {tokens} tokens."
        )
    first = frames if frames < size else size + frames % size
    return [0, *(n * tokens for n in range(first, frames + 1, size))]


def _check(q, k, v, bounds, state, q_rot, k_rot, feature_map, normalizer) -> None:
    check(q, k, v, q_rot, k_rot, feature_map, normalizer)
    if normalizer == "mean":
        raise ValueError(
            "A running state does not know how many keys it stands for: use normalizer 'sum' with its eps."
        )
    n = q.shape[2]
    ascending = all(a < b for a, b in zip(bounds, bounds[1:], strict=False))
    if k.shape[2] != n or len(bounds) < 2 or (bounds[0], bounds[-1]) != (0, n) or not ascending:
        raise ValueError(
            f"Chunk bounds {[*bounds]} must ascend from 0 to the {n} queries, of which there are {k.shape[2]} keys."
        )
    width = state_width(q, v, feature_map)
    if state is not None and (state.shape != (*q.shape[:2], width) or state.dtype != _reference.exact(q[:0]).dtype):
        raise ValueError(
            f"The incoming state {[*state.shape]} {state.dtype} must be [{q.shape[0]}, {q.shape[1]}, {width}] "
            f"{_reference.exact(q[:0]).dtype}, as the last chunk's state of an earlier call is."
        )


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: list[int],
    state: torch.Tensor | None = None,
    q_rot: torch.Tensor | None = None,
    k_rot: torch.Tensor | None = None,
    feature_map: str = "relu",
    normalizer: str = "sum",
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k [B, H, N, D], v [B, H, N, E], any strides, one float dtype; q_rot, k_rot like q, k; bounds [0, .., N] of the
    chunks; state fp32 [B, H, F (E + 1)], what came before (None: nothing).

    -> out [B, H, N, E], share [B, H, N] and the states [B, H, C, F (E + 1)] after each chunk; [:, :, -1] of these
    continues the clip. Raises ValueError when shapes, dtypes, bounds or names do not fit.
    """
    _check(q, k, v, bounds, state, q_rot, k_rot, feature_map, normalizer)
    return forward(_reference, q, k, v, q_rot, k_rot, state, bounds, bounds, feature_map, normalizer, eps)


block_causal = torch.library.custom_op("tessera::block_causal", reference, mutates_args=())


@block_causal.register_fake
def _fake(q, k, v, bounds, state=None, q_rot=None, k_rot=None, feature_map="relu", normalizer="sum", eps=1e-6):
    return empty_outputs(q, v, len(bounds) - 1, feature_map)


@on_gpu(block_causal)
def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: list[int],
    state: torch.Tensor | None = None,
    q_rot: torch.Tensor | None = None,
    k_rot: torch.Tensor | None = None,
    feature_map: str = "relu",
    normalizer: str = "sum",
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As reference, which serves fp64 and heads above 256."""
    _check(q, k, v, bounds, state, q_rot, k_rot, feature_map, normalizer)
    on = _launch if _launch.serves(q, v) else _reference
    return forward(on, q, k, v, q_rot, k_rot, state, bounds, bounds, feature_map, normalizer, eps)


def backward_reference(
    grad: torch.Tensor,
    grad_states: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_rot: torch.Tensor | None,
    k_rot: torch.Tensor | None,
    out: torch.Tensor,
    share: torch.Tensor,
    states: torch.Tensor,
    bounds: list[int],
    feature_map: str,
    normalizer: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, q_rot, k_rot (empty where not given) and the incoming state."""
    given = (grad, grad_states, q, k, v, q_rot, k_rot, out, share, states)
    return _backward(_reference, given, bounds, feature_map, normalizer)


def _backward(on, given, bounds, feature_map, normalizer):
    *rows, start = backward(on, *given, bounds, bounds, feature_map, normalizer)
    return *rows, start.contiguous()


block_causal_backward = torch.library.custom_op("tessera::block_causal_backward", backward_reference, mutates_args=())


@block_causal_backward.register_fake
def _fake_backward(grad, grad_states, q, k, v, q_rot, k_rot, out, share, states, *_):
    like = _reference.rows_like
    rotated = [x.new_empty(0) if rot is None else like(x, x.shape[3]) for x, rot in ((q, q_rot), (k, k_rot))]
    start = states.new_empty(*states.shape[:2], states.shape[3])
    return like(q, q.shape[3]), like(k, k.shape[3]), like(k, v.shape[3]), *rotated, start


@on_gpu(block_causal_backward)
def launch_backward(
    grad: torch.Tensor,
    grad_states: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_rot: torch.Tensor | None,
    k_rot: torch.Tensor | None,
    out: torch.Tensor,
    share: torch.Tensor,
    states: torch.Tensor,
    bounds: list[int],
    feature_map: str,
    normalizer: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    on = _launch if _launch.serves(q, v) else _reference
    given = (grad, grad_states, q, k, v, q_rot, k_rot, out, share, states)
    return _backward(on, given, bounds, feature_map, normalizer)


def _save(ctx, inputs, output):
    q, k, v, ctx.bounds, state, q_rot, k_rot, ctx.feature_map, ctx.normalizer, _ = inputs
    ctx.started = state is not None
    ctx.save_for_backward(q, k, v, q_rot, k_rot, *output)


def _gradients(ctx, grad, grad_share, grad_states):
    saved = ctx.saved_tensors
    got = block_causal_backward(grad, grad_states, *saved, ctx.bounds, ctx.feature_map, ctx.normalizer)
    rotated = got[3:5] if saved[3] is not None else (None, None)
    return *got[:3], None, got[5] if ctx.started else None, *rotated, None, None, None


block_causal.register_autograd(_gradients, setup_context=_save)


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """Four chunks of a SANA-Video layer: 20 heads of 112."""
    q, k, v = (torch.randn(1, tokens, 20, 112, device=device).to(dtype).transpose(1, 2) for _ in range(3))
    return q, k, v, chunk_bounds(tokens, max(1, tokens // 4)), None, q.relu(), k.relu(), "relu", "sum", 1e-15
