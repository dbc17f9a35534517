import math
from types import SimpleNamespace

import pytest
import torch
from log_linear_helper import explicit
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tessera.archs import Layout
from tessera.kernels.attention import block_sparse, hierarchical_sparse
from tessera.kernels.attention.hierarchical_sparse import default_levels
from tessera.methods.attention import log_linear_sparse as m
from tessera.methods.attention.call import AttentionCall, Decline

GRIDS = [  # grid, tokens before the image, after it: ragged tails everywhere
    ((1, 13, 17), 0, 0),
    ((1, 13, 17), 19, 0),
    ((3, 7, 11), 0, 33),
    ((2, 9, 16), 5, 70),
]


def layout(grid, before=0, after=0):
    n = math.prod(grid)
    return Layout(grid, slice(before, before + n), before + n + after)


def made(where, heads=2, kv=None, dim=12, batch=1):
    """q, k, v in token-major memory, as models hand them over."""
    shapes = (heads, kv or heads, kv or heads)
    return tuple(torch.randn(batch, where.total, h, dim).transpose(1, 2) for h in shapes)


FORWARD = SimpleNamespace()


def call_of(where, mask=None, keys=None, tensors=None, forward=None):
    q, k, v = tensors or made(where, batch=2)
    return AttentionCall(q, k[:, :, :keys], v[:, :, :keys], mask, 0.25, "joint", where, None, forward or FORWARD)


def run(method, where, q, k, v, scale=0.3, bias=None):
    return method.compute(method.plan(where), q, k, v, scale, bias)


@pytest.mark.parametrize("case", GRIDS, ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {"topk": 2},
        {"topk": 3, "exclude_selected": True, "reorder": "zorder"},
        {"topk": 2, "enrich": False, "reorder": "none"},
        {"topk": 2, "reweight": False, "reorder": "tile2d"},
        {"density": 0.2, "levels": 2},
        {"topk": 1, "levels": 3, "exclude_selected": True},
    ],
    ids=str,
)
def test_equals_the_definition(case, settings, error):
    method, where = m.LogLinearSparse(**settings), layout(*case)
    q, k, v = made(where)
    got = run(method, where, q, k, v)
    for h in range(2):
        assert error(got[0, h], explicit(method, where, q[0, h], k[0, h], v[0, h], 0.3)) < 1e-5


@pytest.mark.parametrize("settings", [{"enrich": False}, {"exclude_selected": True}], ids=str)
@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("case", GRIDS, ids=str)
def test_all_patches_are_dense_attention(case, levels, settings, error):
    method, where = m.LogLinearSparse(density=1, levels=levels, **settings), layout(*case)
    q, k, v = made(where, 4, 2)
    assert error(run(method, where, q, k, v), sdpa(q, k, v, scale=0.3, enable_gqa=True)) < 1e-5


@pytest.mark.parametrize("settings", [{"density": 1.0}, {"topk": 4096, "exclude_selected": True}, {"density": 0.95}])
def test_what_keeps_everything_is_left_to_the_model(settings):
    method = m.LogLinearSparse(**settings)
    with pytest.raises(Decline, match="every patch is chosen"):
        method.attend(method.begin(), call_of(layout((1, 13, 17), 19)))


def test_no_more_pairs_than_dense_attention():
    method = m.LogLinearSparse(topk=255)
    with pytest.raises(Decline, match="as many pairs"):
        method.attend(method.begin(), call_of(layout((1, 64, 64)), tensors=made(layout((1, 64, 64)), 1, 1, 4)))


@pytest.mark.parametrize("heads", [(4, 2), (6, 1)])
def test_grouped_heads_masks_over_text_and_low_precision(heads, error):
    where = layout((1, 13, 17), 19, 7)
    method = m.LogLinearSparse(topk=4, exclude_selected=True)
    q, k, v = made(where, *heads, batch=2)
    bias = torch.zeros(2, where.total)
    bias[1, 5:19], bias[0, -3:] = -math.inf, 0.7
    got = run(method, where, q, k, v, bias=bias)
    group = heads[0] // heads[1]
    for b in range(2):
        for h in range(heads[0]):
            want = explicit(method, where, q[b, h], k[b, h // group], v[b, h // group], 0.3, bias[b])
            assert error(got[b, h], want) < 1e-5
    half = method.compute(method.plan(where), *(x.bfloat16() for x in (q, k, v)), 0.3, bias)
    dense = sdpa(q, k, v, bias[:, None, None], scale=0.3, enable_gqa=True)
    others = [*range(19), *range(240, 247)]
    assert half.dtype == torch.bfloat16 and error(half[:, :, others], dense[:, :, others]) < 1.5e-2
    full = m.LogLinearSparse(density=1, exclude_selected=True)
    assert error(full.compute(full.plan(where), *(x.bfloat16() for x in (q, k, v)), 0.3, bias), dense) < 1.5e-2


def test_text_that_is_wholly_hidden_is_as_if_it_were_not_there(error):
    bare, where = layout((1, 13, 17)), layout((1, 13, 17), 19)
    method = m.LogLinearSparse(topk=3)
    q, k, v = made(where)
    bias = torch.zeros(1, where.total)
    bias[:, :19] = -math.inf
    got = run(method, where, q, k, v, bias=bias)[:, :, where.image]
    assert error(got, run(method, bare, *(x[:, :, where.image] for x in (q, k, v)))) < 1e-6


@pytest.mark.parametrize("settings", [{}, {"exclude_selected": True, "levels": 2}], ids=str)
def test_heads_in_several_passes(settings, monkeypatch):
    where = layout((2, 9, 16), 5)
    method, tensors = m.LogLinearSparse(topk=3, **settings), made(where, 6, 3)
    whole = run(method, where, *tensors)
    monkeypatch.setattr(m, "SELECTION_BYTES", 1)
    assert torch.equal(run(method, where, *tensors), whole)


@pytest.mark.parametrize("case", [((1, 9, 13), 19, 0), ((2, 5, 11), 0, 7)], ids=str)
def test_the_kernels_agree(case, error, monkeypatch):
    """What serves on a GPU, run by the interpreter."""
    where, method = layout(*case), m.LogLinearSparse(topk=2, exclude_selected=True)
    q, k, v = made(where, 2, 1, 16)
    bias = torch.zeros(1, where.total)
    bias[:, [0, -1]] = bias.new_tensor([-1.5, 0.0]) if case[1] else bias.new_tensor([0.0, -math.inf])
    want = run(method, where, q, k, v, bias=bias)
    monkeypatch.setattr(m, "block_sparse", block_sparse.launch)
    monkeypatch.setattr(hierarchical_sparse, "hierarchical_sparse", hierarchical_sparse.launch)
    assert error(run(method, where, q, k, v, bias=bias), want) < 1e-5


def test_averages_bring_back_what_plain_top_k_loses(error):
    """Attention spread over smooth values: the means carry what the chosen patches leave out."""
    where = layout((1, 32, 32))
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    v = torch.stack([y, x, y * x, y - x], -1).reshape(1, 1, -1, 4)
    q, k = (0.3 * torch.randn(1, 1, 1024, 4) + v for _ in range(2))
    want = sdpa(q, k, v)
    without = error(run(m.LogLinearSparse(topk=8, enrich=False), where, q, k, v, 0.5), want)
    paper = error(run(m.LogLinearSparse(topk=8), where, q, k, v, 0.5), want)
    ours = error(run(m.LogLinearSparse(topk=8, exclude_selected=True), where, q, k, v, 0.5), want)
    assert ours < paper < without and ours < 0.2 * without


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("reorder", m.ORDERS)
@pytest.mark.parametrize("grid", [(1, 16, 16), (1, 13, 17), (4, 8, 8), (1, 1, 1), (5, 3, 2)], ids=str)
def test_orders_are_permutations(grid, reorder, block):
    order = m.image_order(grid, reorder, block)
    assert (order is None) == (reorder == "none" or (reorder == "auto" and grid[0] == 1 and grid[2] <= block))
    if order is not None:
        assert torch.equal(order.sort().values, torch.arange(math.prod(grid)))


def test_tiles_are_tiles():
    rows = m.image_order((1, 16, 16), "tile2d", 16).view(-1, 16)
    for patch in rows:
        for at in (patch // 16, patch % 16):
            assert at.max() - at.min() == 3
    for name, frames in (("tile2d", 1), ("tile3d", 2)):
        patches = m.image_order((8, 16, 16), name, 16).view(-1, 16)
        assert all(len((patch // 256).unique()) == frames for patch in patches)


def test_the_paper_s_pairs():
    """LLSA at 4,096 tokens: 8 patches of 16 and 256 means with one level; 8 of 16, 8 of 16 and 16 with two."""
    where = layout((1, 64, 64))
    assert [m.LogLinearSparse(topk=8, levels=n).plan(where).keys for n in (1, 2)] == [384, 272]
    assert m.LogLinearSparse(topk=8).plan(where).pyramid.levels == default_levels(4096, 16)
    assert m.LogLinearSparse(density=0.25).plan(where).pyramid.levels == 1, "64 of 16 coarse nodes are all of them"
    text = layout((1, 64, 64), 100)
    assert m.LogLinearSparse(topk=8, levels=1).plan(text).pairs == 4096 * 484 + 100 * 4196


def test_log_linear_growth():
    """With fixed topk the keys of a query grow as the levels do, not as the picture does."""
    seen = [m.LogLinearSparse(topk=8, reorder="none").plan(layout((1, s, s))).keys for s in (64, 128, 256)]
    assert seen[2] < 2.5 * seen[0]


def test_method_keeps_one_plan_a_layout_and_counts_pairs():
    method = m.LogLinearSparse(topk=3)
    state = method.begin()
    a, b = layout((1, 13, 17), 19), layout((2, 9, 16), 5)
    answer = method.attend(state, call_of(a))
    (plan,) = state.plans.values()
    assert (answer.pairs, answer.dense_pairs) == (4 * plan.pairs, 4 * a.total**2) and plan.pairs < a.total**2
    method.attend(state, call_of(a))
    assert list(state.plans.values()) == [plan]
    method.attend(state, call_of(b))
    assert len(state.plans) == 2


def test_masks():
    where = layout((1, 13, 17), 19)
    method = m.LogLinearSparse(topk=3)
    n, state = where.total, method.begin()
    text = torch.ones(2, 1, 1, n, dtype=torch.bool)
    text[1, ..., :9] = False
    call = call_of(where, text)
    bias = torch.zeros(2, n).masked_fill(~text[:, 0, 0], -math.inf)
    want = method.compute(method.plan(where), call.q, call.k, call.v, 0.25, bias)
    assert torch.equal(method.attend(state, call).out, want)
    assert torch.equal(method.attend(state, call).out, want), "the second call knows the mask"
    text[0, ..., :5], later = False, SimpleNamespace()
    want = method.compute(
        method.plan(where), call.q, call.k, call.v, 0.25, torch.zeros(2, n).masked_fill(~text[:, 0, 0], -math.inf)
    )
    again = AttentionCall(call.q, call.k, call.v, text, 0.25, "joint", where, None, later)
    assert torch.equal(method.attend(state, again).out, want), "the next call of the model may have written into it"
    image = torch.ones(2, 1, 1, n, dtype=torch.bool)
    image[1, ..., 30] = False
    for mask, words in ((image, "hides or weighs image"), (torch.ones(1, 1, n, n).tril().bool(), "differs between")):
        for _ in range(2):
            with pytest.raises(Decline, match=words):
                method.attend(state, call_of(where, mask))
    with pytest.raises(Decline, match="not the same tokens"):
        method.attend(state, call_of(where, keys=77))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reorder": "spiral"}, "tile3d, tile2d"),
        ({"density": 1.5}, "density of 0 to 1"),
        ({"levels": 4}, "0 to 3 levels"),
        ({"block": 24}, "multiple of 16"),
    ],
)
def test_what_cannot_be_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        m.LogLinearSparse(**settings)
