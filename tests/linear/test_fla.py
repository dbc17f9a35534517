"""The calls of flash-linear-attention, on a stand-in with the parameters of release 0.6.0 that scans token by token in
the layout documented there, [B, T, H, K]. A parameter that it does not have, a wrong layout or order, is an error."""

import sys
import types

import pytest
import torch

from tessera.kernels.linear import _fla, delta_rule, ssd


def scanned(q, k, v, g, beta, scale, initial_state, output_final_state):
    """q, k [B, T, H, K], v [B, T, H, V], g (log) and beta [B, T, H] or None, initial_state [B, H, K, V]."""
    batch, tokens, heads, width = q.shape
    assert k.shape == q.shape and v.shape[:3] == q.shape[:3] and q.dtype == k.dtype == v.dtype
    for x in (q, k, v, g, beta):
        assert x is None or (x.is_contiguous() and x.shape[:3] == (batch, tokens, heads))
    assert all(x is None or (x.ndim == 3 and x.isfinite().all()) for x in (g, beta))
    assert initial_state is None or initial_state.dtype == torch.float32
    s = torch.zeros(batch, heads, width, v.shape[3]) if initial_state is None else initial_state
    assert s.shape == (batch, heads, width, v.shape[3])
    rows = []
    for t in range(tokens):
        s = s if g is None else s * g[:, t, :, None, None].exp()
        new = v[:, t].float()
        if beta is not None:
            new = (new - torch.einsum("bhk,bhkv->bhv", k[:, t].float(), s)) * beta[:, t, :, None]
        s = s + torch.einsum("bhk,bhv->bhkv", k[:, t].float(), new)
        rows.append(torch.einsum("bhk,bhkv->bhv", q[:, t].float(), s))
    out = torch.stack(rows, 1) * (width**-0.5 if scale is None else scale)
    return out.to(q.dtype), s if output_final_state else None


def chunk_delta_rule(
    q, k, v, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    cu_seqlens=None, cu_seqlens_cpu=None,
):  # fmt: skip
    assert not use_qk_l2norm_in_kernel and cu_seqlens is None and cu_seqlens_cpu is None and beta is not None
    return scanned(q, k, v, None, beta, scale, initial_state, output_final_state)


def chunk_gated_delta_rule(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None,
    cu_seqlens_cpu=None, chunk_indices=None, cp_context=None,
):  # fmt: skip
    assert not (use_qk_l2norm_in_kernel or use_beta_sigmoid_in_kernel or allow_neg_eigval or state_v_first)
    assert all(x is None for x in (cu_seqlens, cu_seqlens_cpu, chunk_indices, cp_context)) and g is not None
    return scanned(q, k, v, g, beta, scale, initial_state, output_final_state)


def chunk_simple_gla(
    q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, state_v_first=False,
    cu_seqlens=None, cu_seqlens_cpu=None,
):  # fmt: skip
    assert g_gamma is None and cu_seqlens is None and cu_seqlens_cpu is None and not state_v_first
    return scanned(q, k, v, g, None, scale, initial_state, output_final_state)


@pytest.fixture
def fla(monkeypatch):
    """The stand-in as the package fla, and CPU tensors let through."""
    stand_in = {"delta_rule": chunk_delta_rule, "gated_delta_rule": chunk_gated_delta_rule}
    for path in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    for name, function in (stand_in | {"simple_gla": chunk_simple_gla}).items():
        module = types.ModuleType(f"fla.ops.{name}")
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(_fla, "check", lambda q: None)


def delta_inputs():
    q, k, v = (torch.randn(2, 70, 3, d).transpose(1, 2) for d in (24, 24, 20))
    k = torch.nn.functional.normalize(k, dim=-1)
    return q, k, v, torch.rand(2, 3, 70), -torch.rand(2, 3, 70), torch.randn(2, 3, 24, 20)


def ssd_inputs():
    x = torch.randn(2, 70, 4, 20).transpose(1, 2)
    b, c = torch.randn(2, 2, 2, 70, 24)
    return x, b, c, -torch.rand(2, 4, 70), -2 * torch.rand(2, 4, 70), torch.randn(2, 2, 4, 24, 20)


@pytest.mark.parametrize(("started", "scale"), [(False, None), (True, 0.3)])
@pytest.mark.parametrize("gated", [False, True])
def test_delta_rule_is_called_as_it_asks(gated, started, scale, fla, error):
    q, k, v, beta, g, state = delta_inputs()
    inputs = q, k, v, beta, g if gated else None, state if started else None, scale
    for mine, right in zip(delta_rule.by_fla(*inputs), delta_rule.reference(*inputs), strict=True):
        assert mine.shape == right.shape and mine.dtype == right.dtype and error(mine, right) < 3e-6


@pytest.mark.parametrize(("started", "own"), [(False, False), (True, True)], ids=["bare", "state and own decay"])
@pytest.mark.parametrize(("direction", "diagonal"), [("forward", 1), ("reverse", 1), ("both", 1), ("both", 2)])
def test_ssd_is_called_as_it_asks(direction, diagonal, own, started, fla, error):
    x, b, c, a, back, state = ssd_inputs()
    start = (state if direction == "both" else state[0]) if started else None
    inputs = x, b, c, a, start, direction, back if own and direction != "forward" else None, diagonal
    for mine, right in zip(ssd.by_fla(*inputs), ssd.reference(*inputs), strict=True):
        assert mine.shape == right.shape and mine.dtype == right.dtype and error(mine, right) < 3e-6


def test_gates_that_forget_everything_are_finite(fla, error):
    q, k, v, beta, g, state = delta_inputs()
    g[:, :, ::9] = -torch.inf
    inputs = q, k, v, beta, g, state
    assert error(delta_rule.by_fla(*inputs)[0], delta_rule.reference(*inputs)[0]) < 3e-6
    x, b, c, a, _, states = ssd_inputs()
    a[:, :, ::9] = -torch.inf
    scan = x, b, c, a, states, "both"
    assert error(ssd.by_fla(*scan)[0], ssd.reference(*scan)[0]) < 3e-6


@pytest.mark.parametrize("op", ["delta_rule", "ssd"])
def test_gradients_flow_through_the_call(op, fla, error):
    module, given = (delta_rule, delta_inputs()) if op == "delta_rule" else (ssd, ssd_inputs()[:4])
    given = [x.clone().requires_grad_() for x in given]
    more = () if op == "delta_rule" else (None, "both")
    grads = []
    for serve in (module.by_fla, getattr(module, op)):
        out, last = serve(*given, *more)
        grads.append(torch.autograd.grad(out.square().sum() + last.square().sum(), given))
    for mine, right in zip(*grads, strict=True):
        assert error(mine, right) < 1e-5


def test_low_precision_keeps_the_dtypes(fla):
    q, k, v, beta, g, state = delta_inputs()
    out, last = delta_rule.by_fla(q.bfloat16(), k.bfloat16(), v.bfloat16(), beta.bfloat16(), g, state)
    assert out.dtype == torch.bfloat16 and last.dtype == torch.float32
    x, b, c, a, _, states = ssd_inputs()
    out, last = ssd.by_fla(x.half(), b.half(), c.half(), a.half(), states, "both")
    assert out.dtype == torch.float16 and last.dtype == torch.float32


def test_what_it_does_not_take_is_named():
    q, k, v, beta, *_ = delta_inputs()
    x, b, c, a, *_ = ssd_inputs()
    for call in (lambda: delta_rule.by_fla(q, k, v, beta), lambda: ssd.by_fla(x, b, c, a)):
        with pytest.raises(RuntimeError, match="needs 16-bit tensors on a GPU"):
            call()
    wide = types.SimpleNamespace(device=torch.device("cuda"), element_size=lambda: 2, shape=(1, 1, 1, 257))
    with pytest.raises(RuntimeError, match="heads of up to 256, got 257"):
        _fla.check(wide)


def test_absence_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(RuntimeError, match="pip install flash-linear-attention"):
        _fla.function("delta_rule", "chunk_delta_rule")
