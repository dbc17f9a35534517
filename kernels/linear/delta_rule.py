"""Delta rule: a linear attention whose state is corrected instead of only added to, in chunks.

    S_t = e^{g_t} (1 - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T      o_t = scale S_t^T q_t

so that asking with a stored key returns the value written last (DeltaNet, arXiv 2406.06484, section 3; with the scalar
gate e^{g_t} <= 1 gated DeltaNet, arXiv 2412.06464). Keys should have length 1 and beta lie in 0 .. 2: then no state
grows. The values w_t that the rule really writes obey, inside a chunk, a triangular system (the WY form of a product of
Householder matrices): one small inverse T a chunk turns the tokens' recurrence into products of matrices, and only the
state goes from chunk to chunk. Chunks have 64 tokens (fp32 kernels: 32).
"""

import torch

from .._triton import on_gpu
from . import _delta_launch, _delta_passes, _fla
from ._delta_kernels import delta_carry as delta_carry
from ._delta_kernels import delta_inverse as delta_inverse
from ._delta_kernels import delta_prepare as delta_prepare
from ._delta_kernels import delta_taken as delta_taken
from ._delta_launch import aot_specs as aot_specs
from ._reference import exact, rows_like
from ._ssd_kernels import ssd_out as ssd_out


def _check(q, k, v, beta, g, state) -> None:
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:3] != k.shape[:3] or 0 in q.shape or 0 in v.shape:
        raise ValueError(
            f"Queries {[*q.shape]} do not fit keys {[*k.shape]} and values {[*v.shape]}: [B, H, N, D], the same, and "
            "[B, H, N, E], nothing empty; repeat grouped heads first."
        )
    for name, x in (("beta", beta), ("the log gate", g)):
        if x is not None and (x.shape != q.shape[:3] or not x.is_floating_point()):
            raise ValueError(f"{name} {[*x.shape]} {x.dtype} must be floats {[*q.shape[:3]]}.")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"Queries, keys and values need one float dtype, got {q.dtype}, {k.dtype}, {v.dtype}.")
    want = (*q.shape[:2], q.shape[3], v.shape[3])
    if state is not None and (state.shape != want or state.dtype != exact(q[:0]).dtype):
        raise ValueError(
            f"The state {[*state.shape]} {state.dtype} must be {[*want]} {exact(q[:0]).dtype}, as a call returns it."
        )


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k [B, H, N, D], v [B, H, N, E], any strides, one float dtype; beta [B, H, N] and g [B, H, N], the natural
    logarithm of the gate, <= 0 (None: no gate), any float dtype; state fp32 [B, H, D, E], what came before (None:
    nothing); scale None: D^-1/2.

    -> out [B, H, N, E] (token-major memory if v's is) and the state behind the last token, fp32 (fp64 for fp64).
    Raises ValueError when shapes or dtypes do not fit.
    """
    _check(q, k, v, beta, g, state)
    return _delta_passes.forward(q, k, v, beta, g, state, q.shape[3] ** -0.5 if scale is None else scale)


delta_rule = torch.library.custom_op("tessera::delta_rule", reference, mutates_args=())


@delta_rule.register_fake
def _fake(q, k, v, beta, g=None, state=None, scale=None):
    last = q.new_empty(*q.shape[:2], q.shape[3], v.shape[3], dtype=exact(q[:0]).dtype)
    return rows_like(v, v.shape[3]), last


@on_gpu(delta_rule)
def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference, which serves fp64 and heads above 128."""
    _check(q, k, v, beta, g, state)
    on = _delta_launch if _delta_launch.serves(q) else _delta_passes
    return on.forward(q, k, v, beta, g, state, q.shape[3] ** -0.5 if scale is None else scale)


def backward_reference(
    grad: torch.Tensor,
    grad_state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    state: torch.Tensor | None,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, beta, g (empty where not given) and the state that came in; products of matrices on every
    device."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    dq, dk, dv, dbeta, dg, dstate = _delta_passes.backward(grad, grad_state, q, k, v, beta, g, state, scale)
    return dq, dk, dv, dbeta.to(beta.dtype), q.new_empty(0) if g is None else dg.to(g.dtype), dstate


delta_rule_backward = torch.library.custom_op("tessera::delta_rule_backward", backward_reference, mutates_args=())


@delta_rule_backward.register_fake
def _fake_backward(grad, grad_state, q, k, v, beta, g, state, scale):
    rows = [rows_like(x, x.shape[3]) for x in (q, k, v)]
    gate = q.new_empty(0) if g is None else g.new_empty(g.shape)
    return *rows, beta.new_empty(beta.shape), gate, torch.empty_like(grad_state)


def _save(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad, grad_state):
    *_, g, state = ctx.saved_tensors
    dq, dk, dv, dbeta, dg, dstate = delta_rule_backward(grad, grad_state, *ctx.saved_tensors, ctx.scale)
    return dq, dk, dv, dbeta, None if g is None else dg, None if state is None else dstate, None


delta_rule.register_autograd(_gradients, setup_context=_save)


def by_fla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference, by flash-linear-attention. RuntimeError where it is not installed, without a GPU, for fp32 and fp64,
    and for heads above 256."""
    _check(q, k, v, beta, g, state)
    _fla.check(q)
    rows = {name: _fla.rows(x) for name, x in (("q", q), ("k", k), ("v", v), ("beta", beta.float()))}
    more = {"scale": scale, "initial_state": state, "output_final_state": True}
    if g is None:
        out, last = _fla.function("delta_rule", "chunk_delta_rule")(**rows, **more)
    else:
        out, last = _fla.function("gated_delta_rule", "chunk_gated_delta_rule")(**rows, **more, g=_fla.gates(g))
    return out.transpose(1, 2), last


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """8 heads of 128, keys of length 1, as a DeltaNet layer in place of attention has them."""
    q, k, v = (torch.randn(1, tokens, 8, 128, device=device).transpose(1, 2) for _ in range(3))
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    beta = torch.rand(1, 8, tokens, device=device)
    return q.to(dtype), k.to(dtype), v.to(dtype), beta.to(dtype)
