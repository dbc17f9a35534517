"""Pooling, selection and attention together (log_linear_attention of hierarchical_sparse.py)."""

import math

import pytest
import torch
from hierarchical_helper import OPTIONS, exact, make
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tessera.kernels.attention import _hierarchical_reference as plain
from tessera.kernels.attention import hierarchical_sparse as m


def pooling(tokens, block, level, device):
    """fp64 [N_level, N], the mean over the tokens below each node, written out."""
    node = torch.arange(tokens, device=device) // block**level
    members = (node == torch.arange(int(node[-1]) + 1, device=device)[:, None]).double()
    return members / members.sum(1, keepdim=True)


@pytest.mark.parametrize(("tokens", "levels"), [(83, 1), (290, 2), (300, 3)])
def test_whole_method_and_its_gradients(tokens, levels, device, error):
    """Pooling, selection, attention; gradients reach k and v through the means too."""
    shape = (1, 2, 1, tokens, 16, 16, levels, 2)
    q, k, v = (x.double().requires_grad_() for x in make(shape, device)[:3])
    out, lse, pairs = m.log_linear_attention(q, k, v, 2, 16, levels)
    pyramid = m.Pyramid(tokens, 16, levels)
    means = [pooling(tokens, 16, level, device) for level in range(1, levels + 1)]
    qp, kp, vp = ([p @ x for p in means] for x in (q, k, v))
    idx, cnt = m.hierarchical(qp, kp, 16, 2)
    want = exact(q, k, v, torch.cat(kp, 2), torch.cat(vp, 2), idx, cnt, 16, levels)
    assert error(out, want[0]) < 1e-12 and (lse - want[1]).abs().max() < 1e-12
    grads = [torch.randn_like(x) for x in want]
    got, wanted = (torch.autograd.grad(pair, (q, k, v), grads) for pair in ((out, lse), want))
    for g, w in zip(got, wanted, strict=True):
        assert error(g, w) < 1e-12
    assert pairs == 2 * tokens * m.keys_seen(pyramid, 2, True, False)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_all_chosen_is_dense_attention(levels, device, error):
    """Without the means, or with every chosen node left out of them; enriched it differs by design."""
    q, k, v = make((1, 2, 2, 290, 16, 16, levels, 1), device)[:3]
    dense = sdpa(q, k, v)
    for options in ({"enrich": False}, {"exclude_selected": True}):
        out, _, pairs = m.log_linear_attention(q, k, v, 1000, 16, levels, **options)
        assert error(out, dense) < 2e-6 and pairs == 2 * 290 * 290
    assert error(m.log_linear_attention(q, k, v, 1000, 16, levels)[0], dense) > 1e-3


@pytest.mark.parametrize("tokens", [256, 300])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_excluding_makes_a_partition(levels, tokens, device):
    """Equal keys: the weights of what a query sees add up to the number of tokens."""
    q = torch.randn(1, 1, tokens, 16, device=device)
    zero = torch.zeros_like(q)
    lse = m.log_linear_attention(q, zero, zero, 2, 16, levels, exclude_selected=True)[1]
    assert (lse.exp() - tokens).abs().max() < 1e-2


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pairs_are_those_the_reference_forms(options, device, monkeypatch):
    formed = []
    scores = plain._scores

    def counted(piece, q, keys, scale):
        got = scores(piece, q, keys, scale)
        formed.append(int((got > -math.inf).sum()))
        return got

    monkeypatch.setattr(plain, "_scores", counted)
    q = torch.randn(1, 2, 512, 16, device=device)
    pairs = m.log_linear_attention(q, q, q, 3, 16, 2, None, *options)[2]
    if device == "cpu":
        assert sum(formed) == pairs


@pytest.mark.parametrize(
    ("tokens", "block", "levels"), [(1, 16, 1), (4095, 16, 1), (4096, 16, 2), (65536, 16, 3), (1 << 24, 16, 3)]
)
def test_default_levels(tokens, block, levels):
    assert m.default_levels(tokens, block) == levels
    assert levels == min(3, max(1, int(math.log(tokens, block) + 1e-9) - 1))
