"""Linear attention without a causal mask, in time and memory that grow with N, not with N^2.

    S = sum_j phi(k_j)^T v_j      z = sum_j phi(k_j)      out_i = phi(q_i) S / (phi(q_i) z + eps)

phi: relu (LiT, arXiv 2501.12976; SANA, arXiv 2410.10629), elu1 = elu + 1 (LinFusion, arXiv 2409.02097), softmax over D
(SLA, arXiv 2509.24006), hedgehog = (softmax(u), softmax(-u)) of projected rows u (LinVideo, arXiv 2510.08318; see
`projected`), identity. The normaliser is `sum` as above, `mean`, where eps counts against the mean over the keys
(LinFusion), `rms`, which divides phi(q) S by its root mean square instead (TransNormer, arXiv 2210.10340, section 4), or
`none`. With q_rot, k_rot, features that RoPE has rotated, those stand in the numerator and phi(q), phi(k) only in the
denominator, which stays positive (SANA-Video, arXiv 2509.24695, section 3.1).

Sums and states are fp32. A query whose denominator is exactly 0 gives 0.
"""

import torch

from .._triton import on_gpu
from . import _launch, _reference
from ._passes import backward, check, empty_outputs, forward


def _eps(normalizer: str, eps: float, keys: int) -> float:
    return eps * keys if normalizer == "mean" else eps


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_rot: torch.Tensor | None = None,
    k_rot: torch.Tensor | None = None,
    feature_map: str = "relu",
    normalizer: str = "sum",
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [B, H, Nq, D], k [B, H, Nk, D], v [B, H, Nk, E], any strides, one float dtype; q_rot, k_rot like q, k.

    -> out [B, H, Nq, E] (token-major memory if q's is); share [B, H, Nq], the factor that each query's phi(q) S was
    multiplied by; the state [B, H, 1, F (E + 1)], F rows of E sums, then z; both fp32 (fp64 for fp64). Gradients flow
    through out and the state. Raises ValueError when shapes, dtypes or names do not fit.
    """
    check(q, k, v, q_rot, k_rot, feature_map, normalizer)
    return _forward(_reference, q, k, v, q_rot, k_rot, feature_map, normalizer, eps)


def _forward(on, q, k, v, q_rot, k_rot, feature_map, normalizer, eps):
    keys = k.shape[2]
    bounds = (0, q.shape[2]), (0, keys)
    return forward(on, q, k, v, q_rot, k_rot, None, *bounds, feature_map, normalizer, _eps(normalizer, eps, keys))


linear_attention = torch.library.custom_op("tessera::linear_attention", reference, mutates_args=())


@linear_attention.register_fake
def _fake(q, k, v, q_rot=None, k_rot=None, feature_map="relu", normalizer="sum", eps=1e-6):
    return empty_outputs(q, v, 1, feature_map)


@on_gpu(linear_attention)
def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_rot: torch.Tensor | None = None,
    k_rot: torch.Tensor | None = None,
    feature_map: str = "relu",
    normalizer: str = "sum",
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As reference, which serves fp64 and heads above 256."""
    check(q, k, v, q_rot, k_rot, feature_map, normalizer)
    on = _launch if _launch.serves(q, v) else _reference
    return _forward(on, q, k, v, q_rot, k_rot, feature_map, normalizer, eps)


def backward_reference(
    grad: torch.Tensor,
    grad_state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_rot: torch.Tensor | None,
    k_rot: torch.Tensor | None,
    out: torch.Tensor,
    share: torch.Tensor,
    state: torch.Tensor,
    feature_map: str,
    normalizer: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, q_rot and k_rot (empty where not given) from those of out and the state."""
    return _backward(_reference, grad, grad_state, q, k, v, q_rot, k_rot, out, share, state, feature_map, normalizer)


def _backward(on, grad, grad_state, q, k, v, q_rot, k_rot, out, share, state, feature_map, normalizer):
    bounds = (0, q.shape[2]), (0, k.shape[2])
    return backward(on, grad, grad_state, q, k, v, q_rot, k_rot, out, share, state, *bounds, feature_map, normalizer)[
        :5
    ]


linear_attention_backward = torch.library.custom_op(
    "tessera::linear_attention_backward", backward_reference, mutates_args=()
)


@linear_attention_backward.register_fake
def _fake_backward(grad, grad_state, q, k, v, q_rot, k_rot, *_):
    rotated = [
        x.new_empty(0) if rot is None else _reference.rows_like(x, x.shape[3]) for x, rot in ((q, q_rot), (k, k_rot))
    ]
    return *(_reference.rows_like(x, x.shape[3]) for x in (q, k)), _reference.rows_like(k, v.shape[3]), *rotated


@on_gpu(linear_attention_backward)
def launch_backward(
    grad: torch.Tensor,
    grad_state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_rot: torch.Tensor | None,
    k_rot: torch.Tensor | None,
    out: torch.Tensor,
    share: torch.Tensor,
    state: torch.Tensor,
    feature_map: str,
    normalizer: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    on = _launch if _launch.serves(q, v) else _reference
    return _backward(on, grad, grad_state, q, k, v, q_rot, k_rot, out, share, state, feature_map, normalizer)


def _save(ctx, inputs, output):
    q, k, v, q_rot, k_rot, ctx.feature_map, ctx.normalizer, _ = inputs
    ctx.save_for_backward(q, k, v, q_rot, k_rot, *output)


def _gradients(ctx, grad, grad_share, grad_state):
    got = linear_attention_backward(grad, grad_state, *ctx.saved_tensors, ctx.feature_map, ctx.normalizer)
    dual = ctx.saved_tensors[3] is not None
    return *got[:3], *(got[3:] if dual else (None, None)), None, None, None


linear_attention.register_autograd(_gradients, setup_context=_save)


def projected(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """u = x W for hedgehog features; x [B, H, N, D], weight [H, D, D'] -> [B, H, N, D']."""
    if weight.ndim != 3 or weight.shape[:2] != (x.shape[1], x.shape[3]):
        raise ValueError(
            f"Projection {[*weight.shape]} must be [{x.shape[1]}, {x.shape[3]}, D'] for rows {[*x.shape]}."
        )
    return x @ weight.to(x.dtype)


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """One layer of SANA-Video: 20 heads of 112, rotated numerator."""
    q, k, v = (torch.randn(1, tokens, 20, 112, device=device).to(dtype).transpose(1, 2) for _ in range(3))
    return q, k, v, q.relu().roll(1, -1), k.relu().roll(1, -1), "relu", "sum", 1e-15
