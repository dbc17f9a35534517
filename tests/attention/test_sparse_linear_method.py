"""The method against its formulas, written down with explicit masks over all pairs."""

import math

import pytest
import torch
from sparse_linear_helper import call_of, classes, explicit, layout, projections
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tessera.kernels.attention import block_sparse
from tessera.methods.attention import _linear_branch
from tessera.methods.attention import sparse_linear as m
from tessera.methods.attention.call import AttentionCall, Decline
from tessera.methods.attention.sparse_linear_weights import Projections

CASES = [  # grid, tokens before the image, after it, key heads of 4
    ((1, 17, 23), 0, 0, 4),
    ((1, 17, 23), 77, 0, 4),
    ((1, 16, 16), 3, 30, 2),
    ((5, 9, 11), 0, 0, 4),
    ((3, 8, 16), 0, 65, 1),
]


@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("order", m.ORDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sparse_part_equals_masked_attention(case, order, block_q, error):
    method = m.SparseLinear(0.4, block_q=block_q, order=order)
    call = call_of(case)
    got = method.attend(method.begin(), call).out
    assert error(got, explicit(method, call)) < 1e-12
    assert error(got, sdpa(call.q, call.k, call.v, scale=0.25, enable_gqa=True)) > 1e-2


@pytest.mark.parametrize("feature_map", ["softmax", "elu1", "relu"])
@pytest.mark.parametrize("variant", m.VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_variants_equal_their_formulas(case, variant, feature_map, error):
    weights = projections()
    method = m.SparseLinear(0.3, variant, 0.3, feature_map, keep_own=False, projections=weights)
    call = call_of(case)
    got = method.attend(method.begin(), call).out
    assert error(got, explicit(method, call, weights.blocks[3])) < 1e-12
    text = [i for i in range(call.layout.total) if not call.layout.image.start <= i < call.layout.image.stop]
    dense = sdpa(call.q, call.k, call.v, scale=0.25, enable_gqa=True)
    assert error(got[:, :, text], dense[:, :, text]) < 1e-12, "text rows are dense"


@pytest.mark.parametrize("variant", m.VARIANTS)
def test_padding_masks_count_in_both_branches(variant, error):
    case, weights = CASES[1], projections()
    mask = torch.ones(2, 1, 1, 77 + 17 * 23, dtype=torch.bool)
    mask[1, ..., 50:77] = False
    method = m.SparseLinear(0.3, variant, projections=weights)
    call = call_of(case, mask=mask)
    got = method.attend(method.begin(), call).out
    assert error(got, explicit(method, call, weights.blocks[3])) < 1e-6  # the bias over keys is fp32
    other = call_of(case, mask=torch.ones(1, 1, 468, 468).tril().bool())
    with pytest.raises(Decline, match="differs between queries"):
        method.attend(method.begin(), other)


def test_half_precision(error):
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        case, weights = CASES[3], projections()
        method = m.SparseLinear(0.4, "sla1", projections=weights, keep_own=False)
        call = call_of(case, dtype)
        answer = method.attend(method.begin(), call)
        exact = AttentionCall(
            *(x.double() for x in (call.q, call.k, call.v)), None, 0.25, "self", call.layout, call.block, None
        )
        plan = m.build(call.layout, 0.4)
        same = m.select(plan, *(x.index_select(2, plan.order) for x in (call.q, call.k)), False, None).idx
        again = m.select(plan, *(x.index_select(2, plan.order) for x in (exact.q, exact.k)), False, None).idx
        assert torch.equal(same, again), "the same blocks in every precision, here"
        assert answer.out.dtype == dtype and error(answer.out, explicit(method, exact, weights.blocks[3])) < bound


@pytest.mark.parametrize("n", [1, 63, 64, 65, 4097])
@pytest.mark.parametrize("variant", m.VARIANTS)
def test_any_number_of_tokens(n, variant):
    weights = projections(8)
    method = m.SparseLinear(0.2, variant, projections=weights)
    call = call_of(((1, 1, n), 0, 0, 4), torch.float32, d=8)
    if n <= 64:
        with pytest.raises(Decline, match="every block is kept"):
            method.attend(method.begin(), call)
    else:
        assert method.attend(method.begin(), call).out.isfinite().all()


@pytest.mark.parametrize("topk", [1.0, 0.999])
def test_the_number_of_blocks_is_the_official_one(topk):
    """int(topk K), at least 1; all of them is dense attention, left to the model."""
    for blocks in (1, 2, 5, 64):
        plan = m.build(layout((1, 64, blocks)), topk)
        assert (plan.ranked, plan.keep, plan.dense) == (blocks, max(1, int(topk * blocks)), topk == 1 or blocks == 1)
    assert m.build(layout((1, 64, 50)), 0.01).keep == 1


def test_selected_blocks_are_the_best_pooled_ones():
    case = ((1, 32, 40), 0, 0, 4)
    call, plan = call_of(case), m.build(layout((1, 32, 40)), 0.2, order="rows")
    got = m.select(plan, call.q, call.k, False, None)
    q, k = (x.unflatten(2, (20, 64)).mean(3) for x in (call.q, call.k))
    for centred in (k, k - call.k.mean(2, keepdim=True)):  # subtracting the mean key changes no choice
        want = (q @ centred.transpose(2, 3)).topk(4).indices.sort().values
        assert torch.equal(got.idx, want.int()) and (got.cnt == 4).all()
    kept = m.select(plan, call.q, call.k, True, None).idx
    assert all((kept[:, :, i] == i).any(-1).all() for i in range(20))


def test_scores_that_are_not_finite_still_give_whole_lists():
    plan = m.build(layout((1, 32, 40)), 0.2, order="rows")
    q, k = torch.randn(2, 1, 1, 1280, 16)
    q[0, 0, :64], k[0, 0, 100] = math.nan, math.inf
    got = m.select(plan, q, k, True, 0.3)
    assert (got.cnt == 4).all() and (got.idx[..., 1:] > got.idx[..., :-1]).all()
    assert (got.rest.sum(-1) == 20 - 4 - 6).all()


@pytest.mark.parametrize("case", [((1, 20, 32), 0, 0, 4), ((4, 8, 16), 0, 65, 4)], ids=str)
def test_pairs_are_those_of_the_lists(case):
    method = m.SparseLinear(0.4)
    call = call_of(case, torch.float32)
    answer = method.attend(method.begin(), call)
    critical, _ = classes(method, call)
    assert answer.pairs == pytest.approx(float(critical.sum())) and answer.dense_pairs == critical.numel()
    if not case[2]:
        assert answer.pairs / answer.dense_pairs == pytest.approx(4 / 10), "sparsity is 1 - k / K"


def test_a_block_without_projection_is_sparse_alone():
    case = CASES[0]
    call = call_of(case)
    plain = m.SparseLinear(0.3)
    for other in (projections(number=4), None):
        method = m.SparseLinear(0.3, projections=other)
        assert torch.equal(method.attend(method.begin(), call).out, plain.attend(plain.begin(), call).out)
    zero = Projections("zero", {3: (torch.zeros(16, 16), torch.zeros(16))})
    method = m.SparseLinear(0.3, projections=zero)
    assert torch.equal(method.attend(method.begin(), call).out, plain.attend(plain.begin(), call).out)


def test_weights_for_other_heads_are_refused():
    method = m.SparseLinear(0.3, projections=projections(32))
    with pytest.raises(ValueError, match="heads of 32, block 3 of this model has heads of 16"):
        method.attend(method.begin(), call_of(CASES[0]))


@pytest.mark.parametrize("variant", m.VARIANTS)
def test_little_memory_gives_the_same(variant, monkeypatch, error):
    call, method = call_of(CASES[2]), m.SparseLinear(0.3, variant, projections=projections())
    want = method.attend(method.begin(), call).out
    monkeypatch.setattr(_linear_branch, "STATE_BYTES", 1)
    assert error(method.attend(method.begin(), call).out, want) < 1e-13


def test_the_kernels_agree(error):
    """What a GPU would run, in the interpreter."""
    method = m.SparseLinear(0.5, keep_own=True)
    call = call_of(((1, 12, 22), 0, 20, 2), torch.float32)
    plan = method.plan(method.begin(), call)
    rows = m.ordered(plan, call, None)
    blocks = m.select(plan, rows.q, rows.k, True, None)
    lists = blocks.idx, blocks.cnt, None, None, None, None, "none", 0, 0, 0.25, *plan.block
    added = torch.randn_like(rows.q)
    got = block_sparse.launch(rows.q, rows.k, rows.v, *lists, residual=added)[0]
    assert error(got, method.sparse(plan, rows, blocks, 0.25, added)) < 1e-6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"variant": "sla2"}, "main, sla1, paper"),
        ({"feature_map": "exp"}, "softmax, elu1, relu"),
        ({"order": "zigzag"}, "tiles, rows"),
        ({"topk": 0.0}, "topk above 0"),
        ({"negligible": 1.0}, "negligible from 0"),
    ],
)
def test_what_cannot_be_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        m.SparseLinear(**settings)


def test_one_plan_a_layout():
    method = m.SparseLinear(0.3)
    state = method.begin()
    for case in (CASES[0], CASES[0], CASES[3]):
        method.attend(state, call_of(case))
    assert len(state.plans) == 2
    for wrong in (CASES[0][:1], CASES[3][:1]):
        call = call_of((*wrong, 0, 0, 4))
        with pytest.raises(Decline, match="not the same tokens"):
            method.plan(
                state,
                AttentionCall(call.q, call.k[:, :, :9], call.v[:, :, :9], None, 1, "self", call.layout, None, None),
            )
