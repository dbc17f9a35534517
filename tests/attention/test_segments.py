"""What windows, diagonal blocks and frame tiles share: both paths compute exactly the pairs of a segment and of the
free tokens."""

import math

import pytest
import torch
from segments_helper import call_of, layout, seen, whole
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tessera.kernels.attention import block_sparse, gather
from tessera.methods.attention import _segments as m
from tessera.methods.attention.call import Decline

LABELS = {
    "blocks in a row": torch.arange(200) // 37,
    "scattered": torch.arange(211) % 5,
    "uneven": torch.cat([torch.zeros(1), torch.ones(97), torch.full((3,), 7), torch.full((40,), 8)]).long(),
    "with free ones": torch.where(torch.arange(230) % 50 < 9, -1, torch.arange(230) // 40),
    "single tokens": torch.arange(23),
    "one segment and free ones": torch.cat([torch.full((30,), -1), torch.arange(60) // 30, torch.full((5,), -1)]),
}
each = pytest.mark.parametrize("name", LABELS)
BLOCKS = [(128, 64), (64, 64), (16, 32)]


def qkv(n, heads=2, kv=2, batch=2, dim=16):
    return (torch.randn(batch, n, h, dim).transpose(1, 2) for h in (heads, kv, kv))


@each
def test_equals_masked_attention(name, error):
    label = LABELS[name]
    plan = m.build(label)
    q, k, v = qkv(len(label))
    want = sdpa(q, k, v, seen(label))
    assert not plan.dense and error(m.attend(plan, q, k, v), want) < 1e-6
    assert error(m.attend(plan, q, k, v), want) < 1e-6, "the second call takes what was kept"
    assert error(m.attend(plan, q, k, v, 0.1), sdpa(q, k, v, seen(label), scale=0.1)) < 1e-6
    assert plan.pairs == plan.computed == seen(label).sum() and plan.dense_pairs == len(label) ** 2


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@each
def test_lists_are_exactly_the_blocks_with_a_seen_pair(name, block):
    label = LABELS[name]
    plan, n = m.build(label, block), len(label)
    rows, cols = (-(-n // size) for size in block)
    ordered = seen(label)[plan.order][:, plan.order]
    ends = 0, cols * block[1] - n, 0, rows * block[0] - n

    def by_block(x, fill):
        return pad(x, ends, value=fill).unflatten(1, (cols, -1)).unflatten(0, (rows, -1))

    listed, full = torch.zeros(2, rows, cols, dtype=torch.bool)
    for i in range(rows):
        live = slice(0, int(plan.cnt[0, 0, i]))
        at = plan.idx[0, 0, i, live].long()
        listed[i, at], full[i, at] = True, plan.mode[0, 0, i, live] == 0
    assert torch.equal(listed, by_block(ordered, False).any(3).any(1))
    assert torch.equal(full, by_block(ordered, True).all(3).all(1))
    gather.check_list(plan.idx, plan.cnt, cols)
    assert plan.block_pairs == listed.sum() and plan.dense_block_pairs == rows * cols
    area = by_block(torch.ones(n, n, dtype=torch.bool), False).sum((1, 3))
    assert plan.computed == (area * listed).sum() and plan.pairs == seen(label).sum() <= plan.computed


@pytest.mark.parametrize("block", BLOCKS[:2], ids=str)
@each
def test_the_listed_path_agrees(name, block, error):
    """On a GPU the ordered tensors go to the kernel; its reference follows the same lists."""
    label = LABELS[name]
    q, k, v = qkv(len(label), 4, 2)
    got = m.attend(m.build(label, block), q, k, v)
    assert error(got, sdpa(q, k, v, seen(label), enable_gqa=True)) < 1e-6


def test_the_kernel_agrees(error):
    label = LABELS["with free ones"]
    plan = m.build(label, (64, 64))
    q, k, v = torch.randn(3, 1, 1, len(label), 16)
    o = plan.order
    lists = plan.idx, plan.cnt, plan.mode, plan.coords, plan.coords, None
    got = block_sparse.launch(q[:, :, o], k[:, :, o], v[:, :, o], *lists, "block_diagonal", 0, 0, None, *plan.block)
    assert error(got[0][:, :, plan.back], sdpa(q, k, v, seen(label))) < 1e-6


def test_a_gpu_takes_the_blocks_that_waste_less():
    device, wide, narrow = torch.device("meta"), torch.arange(4096) // 512, torch.arange(4096) // 64
    assert [m.build(label, None, device).block for label in (wide, narrow)] == [(128, 64), (64, 64)]


def test_rows_in_order_are_neither_gathered_nor_moved():
    plan = m.build(torch.arange(512) // 64)
    assert not plan.moved and all(p.query_span and p.key_span for p in m.segment_chunks(plan, 4096, 1 << 30))
    assert m.build(torch.arange(512) % 8).moved


@each
def test_scores_that_are_formed_in_memory_stay_small(name, error):
    label = LABELS[name]
    plan = m.build(label)
    q, k, v = qkv(len(label))
    parts = list(m.segment_chunks(plan, 4096, 2000))
    for part in parts:
        keys = len(part.keys) // part.rows
        assert len(part.queries) * keys <= max(2000, part.rows * keys)
    assert torch.equal(torch.cat([p.queries for p in parts]).sort().values, torch.arange(len(label)))
    out, lse = gather.outputs(q)
    for b in range(2):
        gather.attend(parts, q[b], k[b], v[b], 0.25, 1, out[b], lse[b])
    assert error(out, sdpa(q, k, v, seen(label), scale=0.25)) < 1e-6


def test_grouped_heads_low_precision_and_key_bias(error):
    label = LABELS["with free ones"]
    n, plan = len(label), m.build(label)
    q, k, v = qkv(n, 4, 2)
    bias = torch.where(torch.rand(2, n) < 0.2, -math.inf, torch.randn(2, n))
    mask = torch.zeros(n, n).masked_fill(~seen(label), -math.inf) + bias[:, None, None]
    want = sdpa(q, k, v, mask, enable_gqa=True)
    for made in (plan, m.build(label, (64, 64))):
        assert error(m.attend(made, q, k, v, key_bias=bias), want) < 1e-6
        half = m.attend(made, *(x.bfloat16() for x in (q, k, v)), key_bias=bias)
        assert half.dtype == torch.bfloat16 and error(half, want) < 1.5e-2


def test_plans_too_large_to_keep_are_made_for_each_call(error, monkeypatch):
    monkeypatch.setattr(m, "HELD_BYTES", 0)
    label = LABELS["scattered"]
    plan = m.build(label)
    q, k, v = qkv(len(label))
    for _ in range(2):
        assert error(m.attend(plan, q, k, v), sdpa(q, k, v, seen(label))) < 1e-6
    assert plan.held == {}


def test_one_segment_is_dense():
    for label in (torch.zeros(40).long(), torch.full((40,), -1), torch.tensor([-1] * 9 + [3] * 30)):
        assert m.build(label).dense
    q, k, v = qkv(17)
    with pytest.raises(ValueError, match="of 23 tokens, got 17"):
        m.attend(m.build(LABELS["single tokens"]), q, k, v)


def image(grid):
    return torch.arange(math.prod(grid)) // 20


def test_serving_keeps_one_plan_a_layout_and_counts_pairs(error):
    state, where = {}, layout((2, 5, 7), 6, 3)
    for text in ("dense", "none"):
        call = call_of(where)
        answer = m.serve(state, call, text, image, text, "dense")
        label = whole(where, image(where.grid), text)
        assert error(answer.out, sdpa(call.q, call.k, call.v, seen(label), scale=0.25)) < 1e-6
        assert answer.pairs == 4 * seen(label).sum() and answer.dense_pairs == 4 * where.total**2
    plans = list(state.values())
    m.serve(state, call_of(where), "none", image, "none", "dense")
    assert len(plans) == 2 and list(state.values()) == plans
    m.serve(state, call_of(layout((2, 5, 7), 4)), "none", image, "none", "dense")
    assert len(state) == 3


def test_serving_takes_padding_masks_and_declines_others(error):
    where = layout((1, 5, 13), 8)
    padding = torch.ones(2, 1, 1, where.total, dtype=torch.bool)
    padding[1, ..., 5:8] = False
    call = call_of(where, padding)
    got = m.serve({}, call, 0, image, "dense", "dense").out
    mask = seen(whole(where, image(where.grid))) & padding
    assert error(got, sdpa(call.q, call.k, call.v, mask, scale=0.25)) < 1e-6
    tril = torch.ones(1, 1, where.total, where.total).tril().bool()
    with pytest.raises(Decline, match="differs between queries"):
        m.serve({}, call_of(where, tril), 0, image, "dense", "dense")
    with pytest.raises(Decline, match="not the same tokens"):
        m.serve({}, call_of(where, keys=40), 0, image, "dense", "dense")
    with pytest.raises(Decline, match="all of it"):
        m.serve({}, call_of(where), 0, lambda grid: torch.zeros(65).long(), "dense", "all of it")
