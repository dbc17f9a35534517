import math

import pytest
import torch
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa
from window_helper import BLOCKS, CASES, explicit, layout

from tessera.kernels.attention import block_sparse, gather
from tessera.methods.attention import local_window as m
from tessera.methods.attention.call import AttentionCall, Decline


def plan_of(case, block=None):
    grid, before, after, *window = case
    return m.build(layout(grid, before, after), *window, block=block)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_masked_attention(case, error):
    plan = plan_of(case)
    q, k, v = torch.randn(3, 2, plan.layout.total, 3, 24).transpose(2, 3)
    want = sdpa(q, k, v, explicit(case))
    assert not plan.dense and error(m.attend(plan, q, k, v), want) < 1e-6
    assert error(m.attend(plan, q, k, v), want) < 1e-6, "the second call takes the kept masks"
    assert error(m.attend(plan, q, k, v, 0.1), sdpa(q, k, v, explicit(case), scale=0.1)) < 1e-6


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lists_are_exactly_the_blocks_with_an_allowed_pair(case, block):
    plan, mask = plan_of(case, block), explicit(case)
    rows, cols = (-(-plan.layout.total // size) for size in block)
    ordered = mask[plan.order][:, plan.order]

    def by_block(fill):
        ends = 0, cols * block[1] - len(mask), 0, rows * block[0] - len(mask)
        return pad(ordered, ends, value=fill).unflatten(1, (cols, -1)).unflatten(0, (rows, -1))

    listed, whole = torch.zeros(2, rows, cols, dtype=torch.bool)
    for i in range(rows):
        live = slice(0, int(plan.cnt[0, 0, i]))
        at = plan.idx[0, 0, i, live].long()
        listed[i, at], whole[i, at] = True, plan.mode[0, 0, i, live] == 0
    assert torch.equal(listed, by_block(False).any(3).any(1))
    assert torch.equal(whole, by_block(True).all(3).all(1))
    gather.check_list(plan.idx, plan.cnt, cols)
    assert plan.pairs == mask.sum() and plan.block_pairs == listed.sum() and plan.dense_block_pairs == rows * cols
    area = pad(torch.ones_like(mask), (0, cols * block[1] - len(mask), 0, rows * block[0] - len(mask)))
    area = area.unflatten(1, (cols, -1)).unflatten(0, (rows, -1)).sum((1, 3))
    assert plan.computed == (area * listed).sum() and plan.pairs <= plan.computed <= plan.dense_pairs


@pytest.mark.parametrize("case", [((1, 11, 13), 5, 0, 4, "circle", 0), CASES[5]], ids=str)
def test_the_kernel_path_agrees(case, error):
    """On a GPU the permuted tensors go to the kernel; here the interpreter runs it, on a GPU's plan."""
    plan = plan_of(case, (128, 64))
    q, k, v = torch.randn(3, 1, 1, plan.layout.total, 16)
    o = plan.order
    got = block_sparse.launch(
        q[:, :, o], k[:, :, o], v[:, :, o], plan.idx, plan.cnt, plan.mode, plan.coords, plan.coords, None,
        plan.window.metric, plan.window.radius, plan.window.temporal_radius, None, *plan.block,
    )[0][:, :, plan.back]  # fmt: skip
    assert error(got, sdpa(q, k, v, explicit(case))) < 1e-6


@pytest.mark.parametrize(("grid", "r", "metric", "rt"), [((1, 9, 12), 14, "circle", 0), ((1, 9, 12), 12, "square", 0),
                                                         ((3, 4, 4), 5, "circle", 2), ((1,) * 3, 1, "circle", 0)])  # fmt: skip
def test_a_window_over_the_whole_grid_is_dense_attention_bit_for_bit(grid, r, metric, rt):
    plan = m.build(layout(grid, 5), r, metric, rt)
    q, k, v = torch.randn(3, 1, 2, plan.layout.total, 16)
    assert plan.dense and plan.pairs == plan.computed == plan.dense_pairs
    assert torch.equal(m.attend(plan, q, k, v), sdpa(q, k, v))


@pytest.mark.parametrize(("grid", "r", "metric", "rt"), [((1, 9, 12), 13, "circle", 0), ((1, 9, 12), 11, "square", 0),
                                                         ((3, 4, 4), 5, "circle", 1)])  # fmt: skip
def test_one_less_is_not(grid, r, metric, rt):
    assert not m.build(layout(grid), r, metric, rt).dense


@pytest.mark.parametrize(("r", "keys"), [(8, 193), (16, 793), (32, 3205)])
def test_interior_query_sees_the_published_number_of_keys(r, keys):
    """CLEAR: 193, 793 and 3205 neighbours for r = 8, 16, 32."""
    y, x = torch.meshgrid(torch.arange(-40, 41), torch.arange(-40, 41), indexing="ij")
    assert m.Window(r).inside(torch.tensor(0), y.abs(), x.abs()).sum() == keys


def test_grouped_heads_low_precision_and_key_bias(error):
    case = CASES[1]
    plan = plan_of(case)
    n = plan.layout.total
    q, k, v = torch.randn(2, 4, n, 16), torch.randn(2, 2, n, 16), torch.randn(2, 2, n, 16)
    bias = torch.where(torch.rand(2, n) < 0.2, -math.inf, torch.randn(2, n))
    mask = torch.zeros(n, n).masked_fill(~explicit(case), -math.inf) + bias[:, None, None]
    want = sdpa(q, k, v, mask, enable_gqa=True)
    assert error(m.attend(plan, q, k, v, key_bias=bias), want) < 1e-6
    half = m.attend(plan, *(x.bfloat16() for x in (q, k, v)), key_bias=bias)
    assert half.dtype == torch.bfloat16 and error(half, want) < 1.5e-2


def test_masks_too_large_to_keep_are_made_for_each_call(error, monkeypatch):
    monkeypatch.setattr("tessera.methods.attention._gathered.HELD_BYTES", 0)
    plan = plan_of(CASES[0])
    q, k, v = torch.randn(3, 1, 2, plan.layout.total, 16)
    for _ in range(2):
        assert error(m.attend(plan, q, k, v), sdpa(q, k, v, explicit(CASES[0]))) < 1e-6
    assert plan.held == {}


def test_video_plan_of_32760_tokens():
    """Wan at 480p: bounded memory, and counts that follow from the grid alone."""
    plan = m.build(layout((21, 30, 52)), 8, "circle", 1, (128, 64))
    assert plan.pairs == m.Window(8, "circle", 1).pairs((21, 30, 52))
    assert plan.pairs < plan.computed < 0.1 * plan.dense_pairs and plan.idx.shape[2] == 256


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: m.build(layout((1, 4, 4)), 0), "radius >= 1"),
        (lambda: m.build(layout((1, 4, 4)), 2, "disc"), "circle or square"),
        (lambda: m.build(layout((1, 4, 4)), 2, "circle", -1), "temporal radius >= 0"),
        (lambda: m.attend(m.build(layout((1, 4, 4)), 2), *torch.zeros(3, 1, 1, 17, 8)), "16 tokens, got 17"),
    ],
)
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def call_of(case, mask=None, keys=None):
    grid, before, after, *_ = case
    where = layout(grid, before, after)
    q, k, v = torch.randn(3, 2, 2, where.total, 16)
    return AttentionCall(q, k[:, :, :keys], v[:, :, :keys], mask, 0.25, "joint", where, None, None)


def test_method_keeps_one_plan_a_layout_and_counts_pairs(error):
    method = m.LocalWindow(5, "circle", 0)
    state = method.begin()
    call = call_of(CASES[0])
    answer = method.attend(state, call)
    assert error(answer.out, sdpa(call.q, call.k, call.v, explicit(CASES[0]), scale=0.25)) < 1e-6
    (plan,) = state.values()
    assert (answer.pairs, answer.dense_pairs) == (4 * plan.computed, 4 * plan.dense_pairs)
    method.attend(state, call_of(CASES[0]))
    assert list(state.values()) == [plan]
    method.attend(state, call_of(CASES[3]))
    assert len(state) == 2


def test_method_takes_padding_masks_and_declines_others(error):
    method, n = m.LocalWindow(4, "square"), 77 + 17 * 23
    padding = torch.ones(2, 1, 1, n, dtype=torch.bool)
    padding[1, ..., 50:77] = False
    call = call_of(CASES[1], padding)
    got = method.attend(method.begin(), call).out
    assert error(got, sdpa(call.q, call.k, call.v, explicit(CASES[1]) & padding, scale=0.25)) < 1e-6
    with pytest.raises(Decline, match="differs between queries"):
        method.attend(method.begin(), call_of(CASES[1], torch.ones(1, 1, n, n).tril().bool()))
    with pytest.raises(Decline, match="not the same tokens"):
        method.attend(method.begin(), call_of(CASES[1], keys=77))
