"""Pictures of masks against explicit masks over all pairs, pooled."""

import dataclasses
import gc
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from segments_helper import seen
from sparse_linear_helper import call_of, classes
from window_helper import CASES, explicit, layout

from tessera.methods.attention import _static
from tessera.methods.attention import picture as m
from tessera.methods.attention.call import AttentionCall
from tessera.methods.attention.diagonal import Diagonal
from tessera.methods.attention.local_window import LocalWindow
from tessera.methods.attention.log_linear_sparse import LogLinearSparse
from tessera.methods.attention.rettention import Rettention
from tessera.methods.attention.sparse_linear import Blocks, SparseLinear
from tessera.methods.attention.tile import Tile
from tessera.methods.attention.window_3d import Window3D
from tessera.patching.pictures import shades

ODD = ((1, 17, 23), 77, 0, 4), ((3, 9, 11), 0, 65, 2), ((1, 16, 16), 0, 0, 4)


def shrunk(mask):
    """bool [N, M] -> the share of True in each of at most 96 x 96 cells, looked up one by one."""
    cells = [[torch.arange(n)[torch.arange(n) * min(96, n) // n == c] for c in range(min(96, n))] for n in mask.shape]
    return torch.stack([torch.stack([mask[r[:, None], c].float().mean() for c in cells[1]]) for r in cells[0]])


def drawn(method, call):
    """The shares of the picture of this call."""
    shares = method.attend(method.begin(), call).picture().shares
    return shares if isinstance(shares, torch.Tensor) else shares()


def call_on(grid, before=0, after=0, block=0):
    where = layout(grid, before, after)
    q = torch.randn(1, 2, where.total, 16)
    return AttentionCall(q, q, q, None, 0.25, "joint", where, SimpleNamespace(number=block, count=4), None)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_local_window(case):
    grid, before, after, *window = case
    got = drawn(LocalWindow(*window), call_on(grid, before, after))
    assert torch.allclose(got, shrunk(explicit(case)), atol=1e-6)


@pytest.mark.parametrize("text", ["dense", "none"])
@pytest.mark.parametrize(
    ("method", "label"),
    [
        (Diagonal(24, 1.0), lambda g: Diagonal(24).blocks(g)),
        (Window3D(2, 4, 4, "always", 0), lambda g: Window3D(2, 4, 4).windows(g, True)),
    ],
    ids=["diagonal", "window"],
)
def test_segments(method, label, text):
    grid, before, after = (3, 9, 11), 5, 20
    image = label(grid)
    every = torch.full((before + len(image) + after,), -1 if text == "dense" else 10**6)
    every[before : before + len(image)] = image
    got = drawn(type(method)(**{**method.__dict__, "text": text}), call_on(grid, before, after))
    assert torch.allclose(got, shrunk(seen(every)), atol=1e-6)


def test_tile_draws_frames_and_references():
    got = drawn(Tile(1, "first"), call_on((4, 4, 6)))
    frame = torch.arange(96) // 24
    assert torch.equal(got, ((frame[:, None] == frame) | (frame == 0) | (frame[:, None] == 0)).float())


@pytest.mark.parametrize("pattern", _static.PATTERNS)
def test_rettention_draws_its_pattern(pattern):
    grid, before, after = (3, 8, 10), 7, 30
    where, n = layout(grid, before, after), math.prod(grid)
    at, rule, radius, reach = _static.places(pattern, grid, 0.3)
    t, y, x = (at[:, None] - at).abs().unbind(-1)
    near = ((y * y + x * x < radius**2) if rule == "circle" else x <= radius) & (t <= reach)
    mask = torch.ones(where.total, where.total, dtype=torch.bool)
    free = at[:, 0] < 0
    mask[where.image, where.image] = near | free[:, None] | free
    assert mask.sum() < where.total**2 - 0.3 * n * n
    method = Rettention(0.3, pattern)
    assert torch.allclose(method.picture(where).shares(), shrunk(mask), atol=1e-6)


@pytest.mark.parametrize("order", ["tiles", "rows"])
@pytest.mark.parametrize("case", ODD, ids=str)
def test_sparse_linear_draws_the_blocks_that_it_lists(case, order):
    """Cells are whole blocks here: a picture of the lists, its text dense, agrees with masks of single tokens."""
    method = SparseLinear(0.3, order=order, block_q=32, block_k=16)
    call = call_of(case)
    mask = classes(method, call)[0][0].float().mean(0)
    state = method.begin()
    got = method.attend(state, call).picture()
    (plan,) = state.plans.values()
    sequence = torch.arange(call.layout.total) if plan.order is None else plan.order
    mask = mask[sequence][:, sequence]
    image, total, held = plan.image, plan.layout.total, min(plan.ranked * 16, plan.image)
    rows = [len(x) for side, size in ((image, 32), (total - image, 32)) for x in torch.arange(side).split(size) if side]
    columns = [len(x) for n, size in ((held, 16), (total - held, 16)) for x in torch.arange(n).split(size) if n]
    want = torch.stack([torch.stack([c.mean() for c in r.split(columns, 1)]) for r in mask.split(rows)])
    assert got.shares.shape == want.shape and torch.allclose(got.shares, want, atol=1e-6)
    assert got.heads == "mean of 4 heads" and want.min() + want.max() > 0 and want.unique().numel() > 2


@pytest.mark.parametrize("case", ODD, ids=str)
def test_log_linear_sparse_draws_as_many_patches_as_it_chooses(case):
    call = call_of(case, torch.float32)
    method = LogLinearSparse(0.25, levels=2)
    state = method.begin()
    got = method.attend(state, call).picture()
    (plan,) = state.plans.values()
    n = plan.pyramid.sizes[1]
    assert torch.equal(got.shares[:n, :n].unique(), torch.tensor([0.0, 1.0]))
    assert torch.equal(got.shares[:n, :n].sum(1), torch.full((n,), float(plan.topk)))
    assert got.shares[n:].eq(1).all() and got.shares[:, n:].eq(1).all()
    assert "Means" in got.note and not LogLinearSparse(enrich=False).picture(plan, call.q[:1, :1], call.k[:1, :1]).note


def test_many_blocks_share_cells_by_their_tokens():
    torch.manual_seed(0)
    listed = torch.rand(130, 205).round()
    got = m.listed_shares(listed, 130 * 8 - 3, 50, (8, 5))
    heights, widths = ([8] * 129 + [5], [8] * 6 + [2]), ([5] * 205, [5] * 12 + [2])
    every = torch.ones(137, 218)
    every[:130, :205] = listed
    rows, columns = (torch.tensor(a + b) for a, b in (heights, widths))
    at = [torch.arange(len(x)) * 96 // len(x) for x in (rows, columns)]
    area = rows[:, None] * columns
    where = at[0][:, None] * 96 + at[1]
    sums = [torch.zeros(96 * 96).index_add_(0, where.flatten(), x.flatten().float()) for x in (every * area, area)]
    assert torch.allclose(got, (sums[0] / sums[1]).view(96, 96), atol=1e-5)


def test_large_layouts_are_drawn_from_some_queries(monkeypatch):
    where = layout((1, 40, 40), 100)
    whole = LocalWindow(9).picture(where).shares()
    monkeypatch.setattr(m, "RULE_PAIRS", 1 << 19)
    some = LocalWindow(9).picture(where).shares()
    assert whole.shape == some.shape == (96, 96) and (whole - some).abs().mean() < 0.02
    assert not torch.equal(whole, some)


def test_a_picture_holds_no_queries_and_few_bytes():
    for method in (SparseLinear(0.3), LogLinearSparse(), LocalWindow(3), Diagonal(16, 1.0)):
        call = call_of(ODD[0], torch.float32)
        object.__setattr__(call, "block", SimpleNamespace(number=0, count=4))
        gone = [weakref.ref(x) for x in (call.q, call.k, call.v)]
        found = method.attend(method.begin(), call).picture()
        del call
        gc.collect()
        assert [x() for x in gone] == [None] * 3, type(method).__name__
        if isinstance(found.shares, torch.Tensor):
            assert shades(found.shares).nbytes <= 96 * 96


def test_shades_tell_few_pairs_from_none():
    assert shades(torch.tensor([0.0, 1e-6, 0.5, 1.0])).tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("method", [SparseLinear(0.3), LogLinearSparse(levels=2)], ids=lambda x: type(x).__name__)
def test_drawing_from_lists_reads_no_values(method):
    """On the meta device there are none to read: on a GPU nothing waits, and the result stays there."""
    call = call_of(ODD[0], torch.float32)
    state = method.begin()
    method.attend(state, call)
    (plan,) = state.plans.values()
    tensors = {name: x.to("meta") for name, x in vars(plan).items() if isinstance(x, torch.Tensor)}
    away = dataclasses.replace(plan, **tensors)
    if isinstance(method, SparseLinear):
        idx = torch.zeros(2, 4, 7, plan.keep + len(plan.always), dtype=torch.int32, device="meta")
        found = method.picture(away, Blocks(idx, idx[..., 0], None))
    else:
        found = method.picture(away, *(x[:1, :1].to("meta") for x in (call.q, call.k)))
    assert shades(found.shares).device.type == "meta"
