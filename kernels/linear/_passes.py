"""Forward and backward of linear attention out of the four steps of _reference.py or _launch.py, called `on` here.

With a_j the key features (rotated ones, if given), b_i those of the queries, S = sum a_j^T v_j, z = sum phi(k_j), and
out_i = r_i b_i S, the gradients are again such sums. For g = d out, h_i = g_i (rms: g_i - out_i mean(g_i out_i)) and
u_i = -r_i g_i . out_i (only if r_i = 1 / (phi(q_i) z + eps), else 0):

    dS = sum b_i^T r_i h_i     dz = sum u_i phi(q_i)     db_i = r_i h_i S^T     dphi(q_i) = u_i z
    da_j = v_j dS^T            dphi(k_j) = dz            dv_j = a_j dS

With chunks, dS of a key is the total over its own and all later chunks.
"""

import torch

from ._kernels import MAPS, NORMS
from ._reference import rows_like


def check(q, k, v, q_rot, k_rot, feature_map: str, normalizer: str) -> None:
    """ValueError with the sizes where the tensors or names do not fit."""
    if feature_map not in MAPS or normalizer not in NORMS:
        raise ValueError(
            f"Unknown feature map {feature_map!r} or normalizer {normalizer!r}; choose from {[*MAPS]} and {[*NORMS]}."
        )
    if q.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"Queries {[*q.shape]} do not fit keys {[*k.shape]} and values {[*v.shape]}: [B, H, N, D] each, as many "
            "heads in all; repeat grouped heads first."
        )
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        raise ValueError(f"Queries {[*q.shape]}, keys {[*k.shape]} and values {[*v.shape]} must not be empty.")
    if (q_rot is None) != (k_rot is None):
        raise ValueError("Rotated queries and rotated keys belong together; give both or none.")
    if q_rot is not None and (q_rot.shape != q.shape or k_rot.shape != k.shape or feature_map == "hedgehog"):
        raise ValueError(
            f"Rotated features {[*q_rot.shape]}, {[*k_rot.shape]} must be shaped like queries {[*q.shape]} and keys "
            f"{[*k.shape]}, and hedgehog features cannot be rotated."
        )
    given = [x.dtype for x in (q, k, v, q_rot, k_rot) if x is not None]
    if len({*given}) > 1 or not q.is_floating_point():
        raise ValueError(f"Queries, keys, values and rotated features need one float dtype, got {given}.")


def state_width(q, v, feature_map: str) -> int:
    """Floats of one packed state: F rows of E sums and F masses."""
    return q.shape[3] * (2 if feature_map == "hedgehog" else 1) * (v.shape[3] + 1)


def forward(on, q, k, v, q_rot, k_rot, start, q_bounds, k_bounds, feature_map, normalizer, eps):
    """out [B, H, Nq, E], share [B, H, Nq], totals [B, H, C, W]."""
    totals = on.state(k, k_rot, v, k_bounds, feature_map, start=start)
    out, share = on.apply(q, q_rot, totals, q_bounds, feature_map, normalizer, eps, v.shape[3])
    return out, share, totals


def backward(
    on, grad, grad_totals, q, k, v, q_rot, k_rot, out, share, totals, q_bounds, k_bounds, feature_map, normalizer
):
    """Gradients of q, k, v, q_rot, k_rot (empty where not given) and of the totals' start [B, H, W]."""
    dual = q_rot is not None
    slope, h = on.rows(grad, out, share, normalizer)
    dq, dq_rot = on.gradient(q, h, totals, q_bounds, feature_map, dual, share, slope)
    back = on.state(q, q_rot, h, q_bounds, feature_map, grad=grad_totals, factor=share, slope=slope, reverse=True)
    dk, dk_rot = on.gradient(k, v, back, k_bounds, feature_map, dual)
    dv, _ = on.apply(k, k_rot, back, k_bounds, feature_map, "none", 0.0, v.shape[3])
    return dq, dk, dv, dq_rot, dk_rot, back[:, :, 0]


def empty_outputs(q, v, chunks: int, feature_map: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Uninitialised results of forward, for tracing."""
    (b, h, n, _), exact = q.shape, torch.float64 if q.dtype == torch.float64 else torch.float32
    width = state_width(q, v, feature_map)
    return rows_like(q, v.shape[3]), q.new_empty(b, h, n, dtype=exact), q.new_empty(b, h, chunks, width, dtype=exact)
