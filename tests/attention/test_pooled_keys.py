"""CLEAR's pooled keys and proportional scale against dense attention over the concatenated keys with an explicit mask."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from window_helper import BLOCKS, CASES, explicit, layout

from tessera.kernels.attention import block_sparse, gather
from tessera.methods.attention import _pooled_keys
from tessera.methods.attention import local_window as m
from tessera.methods.attention.call import AttentionCall, Decline

FACTORS = (2, 4, 3)


def patches(grid, factor):
    """bool [P, T * H * W]: which tokens a patch holds, written down from the definition."""
    t, y, x = torch.meshgrid(*(torch.arange(s) for s in grid), indexing="ij")
    high, wide = -(-grid[1] // factor), -(-grid[2] // factor)
    number = ((t * high + y // factor) * wide + x // factor).flatten()
    return number[None] == torch.arange(grid[0] * high * wide)[:, None]


def by_hand(case, factor, q, k, v, every=False, scale=None, bias=None, weight=None):
    """CLEAR's downsampled attention: concatenated keys, one mask."""
    grid, before, after, *_ = case
    image, held = slice(before, before + math.prod(grid)), patches(grid, factor).float()
    if weight is not None:
        y, x = (a.flatten() for a in torch.meshgrid(torch.arange(grid[1]), torch.arange(grid[2]), indexing="ij"))
        held = held * weight[y % factor, x % factor].repeat(grid[0]) * factor**2
    counts = patches(grid, factor).sum(1)
    ks, vs = (torch.cat([a, (held / counts[:, None]) @ a[:, :, image].float()], 2) for a in (k.float(), v.float()))
    seen = torch.zeros(q.shape[2], len(counts), dtype=torch.bool)
    seen[image] = True
    mask = torch.cat([explicit(case), seen], 1)
    added = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)[None, None]
    if every:
        added[..., q.shape[2] :] += counts.log()
    if bias is not None:
        added = added + torch.cat([bias, torch.zeros(len(bias), len(counts))], 1)[:, None, None]
    return sdpa(q.float(), ks, vs, added, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def plan_of(case, factor, block=None):
    grid, before, after, *window = case
    return m.build(layout(grid, before, after), *window, block=block, down_factor=factor)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_attention_over_the_concatenated_keys(case, factor, error):
    plan = plan_of(case, factor)
    q, k, v = torch.randn(3, 2, plan.layout.total, 3, 24).transpose(2, 3)
    for every in (False, True):
        got = m.attend(plan, q, k, v, 0.2, pooling=m.Pooling(every=every))
        assert error(got, by_hand(case, factor, q, k, v, every, 0.2)) < 1e-6


@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=str)
def test_learned_patch_weights_grouped_heads_and_bf16(case, error):
    plan, weight = plan_of(case, 4), torch.randn(4, 4)
    n = plan.layout.total
    q, k, v = torch.randn(2, 4, n, 16), torch.randn(2, 2, n, 16), torch.randn(2, 2, n, 16)
    want = by_hand(case, 4, q, k, v, weight=weight)
    assert error(m.attend(plan, q, k, v, pooling=m.Pooling(weight)), want) < 1e-6
    half = m.attend(plan, *(x.bfloat16() for x in (q, k, v)), pooling=m.Pooling(weight))
    assert half.dtype == torch.bfloat16 and error(half, want) < 2e-2


def test_a_uniform_patch_weight_is_the_mean():
    plan = plan_of(CASES[0], 4)
    q, k, v = torch.randn(3, 1, 2, plan.layout.total, 16)
    got = m.attend(plan, q, k, v, pooling=m.Pooling(torch.full((4, 4), 1 / 16)))
    assert torch.allclose(got, m.attend(plan, q, k, v), atol=1e-6)


def test_a_bias_on_the_text_and_on_image_tokens(error):
    """Masked text is not seen; an image token with bias b is e^b tokens of its patch, at -inf it is not there."""
    case = CASES[1]
    plan = plan_of(case, 4)
    n, grid, image = plan.layout.total, case[0], slice(77, 77 + 17 * 23)
    q, k, v = torch.randn(3, 2, 2, n, 16)
    bias = torch.zeros(2, n)
    bias[1, 50:77] = -math.inf
    assert error(m.attend(plan, q, k, v, key_bias=bias), by_hand(case, 4, q, k, v, bias=bias)) < 1e-6
    blind = m.attend(plan, q, k, v, key_bias=torch.full((2, n), -math.inf))
    assert torch.equal(blind, torch.zeros_like(blind)), "a query that sees nothing gives 0, as without pooled keys"
    held = patches(grid, 4)
    bias[0, image][held[0] | (torch.arange(len(held[0])) == 9)] = -math.inf  # a whole patch, and a token of another
    bias[:, image][:, 11] = 0.5
    shares = bias[:, image].exp()
    total = shares @ held.T.float()
    pooled = [torch.nan_to_num((held.float() * shares[:, None]) @ x[:, 0, image] / total[..., None]) for x in (k, v)]
    got = _pooled_keys.pool(k[:, :1, image], grid, 4, _pooled_keys.sizes(grid, 4), None, shares)[:, 0]
    assert error(got, pooled[0]) < 1e-6 and torch.isfinite(m.attend(plan, q, k, v, key_bias=bias)).all()
    for every, want in ((True, total), (False, total / held.sum(1))):
        assert torch.allclose(_pooled_keys.pooled_bias(shares, grid, 4, _pooled_keys.sizes(grid, 4), every), want.log())


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_pooled_pairs_are_counted(block):
    plan, plain = plan_of(CASES[3], 4, block), plan_of(CASES[3], 0, block)
    image, pooled = 15 * 16, 4 * 4
    assert plan.pairs == plain.pairs + image * pooled == explicit(CASES[3]).sum() + image * pooled
    assert plan.computed == plain.computed + image * pooled >= plan.pairs
    idx, cnt = plan.every_pooled
    assert idx.shape[2] == -(-image // block[0]) and idx.shape[3] == -(-pooled // block[1]) == cnt.max() == cnt.min()
    gather.check_list(idx, cnt, idx.shape[3])


@pytest.mark.parametrize("case", [((1, 11, 13), 5, 0, 4, "circle", 0), CASES[5]], ids=str)
def test_the_kernel_path_agrees(case, error, monkeypatch):
    """On a GPU permuted tensors go to the kernel; here the interpreter runs it, on a GPU's plan."""
    plan = plan_of(case, 2, (128, 64))
    q, k, v = torch.randn(3, 1, 1, plan.layout.total, 16)
    monkeypatch.setattr(m, "gathers", lambda device: False)
    monkeypatch.setattr(m, "block_sparse", block_sparse.launch)
    assert error(m.attend(plan, q, k, v), by_hand(case, 2, q, k, v)) < 1e-6


def test_a_factor_of_one_is_off_bit_for_bit():
    plans = [plan_of(CASES[1], factor) for factor in (0, 1)]
    q, k, v = torch.randn(3, 1, 2, plans[0].layout.total, 16)
    assert torch.equal(m.attend(plans[0], q, k, v), m.attend(plans[1], q, k, v)) and plans[1].down_factor == 0


def call_of(case, features=()):
    grid, before, after, *_ = case
    where = layout(grid, before, after)
    q, k, v = torch.randn(3, 2, 2, where.total, 16)
    forward = SimpleNamespace(run=SimpleNamespace(features=features))
    return AttentionCall(q, k, v, None, 0.25, "joint", where, SimpleNamespace(number=3), forward)


def test_the_method_takes_the_patch_weights_of_its_block(error):
    """They come with loaded CLEAR weights, for which a patch is one key; a block without any pools by the mean."""
    weights = {3: torch.randn(4, 4)}
    for held, want, counts, every in (
        (weights, weights[3], "auto", False),
        (weights, weights[3], "all", True),
        ({2: weights[3]}, None, "auto", True),
        ({2: weights[3]}, None, "one", False),
    ):
        call = call_of(CASES[0], (object(), SimpleNamespace(patch_weights=held)))
        method = m.LocalWindow(5, down_factor=4, counts_as=counts)
        state = method.begin()
        for _ in range(2):
            got = method.attend(state, call).out
            assert error(got, by_hand(CASES[0], 4, call.q, call.k, call.v, every, 0.25, weight=want)) < 1e-6


def test_proportional_scale(error):
    """CLEAR: sqrt(log_4608(N) / D), beside pooled keys log_4608(10 N)."""
    assert m.LocalWindow(proportional=True).scale_factor(4608) == 1 and m.LocalWindow().scale_factor(9) == 1
    assert m.LocalWindow(proportional=True).scale_factor(4608**2) == pytest.approx(math.sqrt(2))
    assert m.LocalWindow(proportional=True, down_factor=4).scale_factor(4608) == pytest.approx(
        math.sqrt(math.log(46080) / math.log(4608))
    )
    assert m.LocalWindow(proportional=True, base_tokens=100).scale_factor(1) > 0
    method, call = m.LocalWindow(5, proportional=True, base_tokens=64), call_of(CASES[0])
    scale = 0.25 * math.sqrt(math.log(17 * 23) / math.log(64))
    got = method.attend(method.begin(), call).out
    assert error(got, sdpa(call.q, call.k, call.v, explicit(CASES[0]), scale=scale)) < 1e-6


def test_a_window_over_the_whole_picture_still_has_its_scale_and_pools_nothing(error):
    call = call_of(((1, 6, 7), 4, 0, 20, "circle", 0))
    with pytest.raises(Decline, match="spans"):
        m.LocalWindow(20, proportional=True, base_tokens=46).attend({}, call)
    method = m.LocalWindow(20, proportional=True, base_tokens=10)
    answer = method.attend({}, call)
    want = sdpa(call.q, call.k, call.v, scale=0.25 * math.sqrt(math.log(46, 10)))
    assert error(answer.out, want) < 1e-6 and answer.pairs == answer.dense_pairs
    with pytest.raises(Decline, match="spans"):
        m.LocalWindow(20, down_factor=2, counts_as="one").attend({}, call)


@pytest.mark.parametrize("factor, pools", [(2, True), (6, True), (7, False), (32, False)])
def test_a_patch_of_the_whole_frame_is_none(factor, pools):
    case = (1, 6, 7), 4, 0, 2, "circle", 0
    given = call_of(case)
    plain, pooled = (m.LocalWindow(2, down_factor=f).attend({}, given) for f in (0, factor))
    assert torch.equal(plain.out, pooled.out) == (not pools) and (pooled.pairs == plain.pairs) == (not pools)
