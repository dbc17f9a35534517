import inspect
import math

import pytest
import torch

from tessera.kernels.attention import topk as m

SERVES = [m.launch, m.reference]
NAMES = ["kernel", "reference"]
SHAPES = [(1, 1), (2, 3, 5, 37), (7, 64), (3, 300), (1, 2, 40, 17)]  # [.., nQ, nK]


def exact(scores, k, mask=None, first=0, diagonal=False):
    """Lists of columns, one row at a time: sorted by (kept, score, lower column)."""
    flat = scores.reshape(-1, *scores.shape[-2:])
    off = torch.zeros_like(flat, dtype=torch.bool) if mask is None else mask.expand(scores.shape).reshape(flat.shape)
    rows, columns = flat.shape[-2:]
    found = []
    for plane, barred in zip(flat.tolist(), off.tolist(), strict=True):
        for i, (row, bar) in enumerate(zip(plane, barred, strict=True)):
            low, high = math.floor(i * columns / rows), math.ceil((i + 1) * columns / rows)
            best = []
            for j, value in enumerate(row):
                kept = j < first or (diagonal and low <= j < high)
                if not bar[j] and (kept or (value == value and value > -math.inf)):
                    best.append((math.inf if kept else value, -j))
            found.append(sorted(-j for _, j in sorted(best, reverse=True)[:k]))
    return found


def listed(idx, cnt):
    assert idx.dtype == cnt.dtype == torch.int32 and idx.shape[:-1] == cnt.shape
    behind = torch.arange(idx.shape[-1], device=idx.device) >= cnt[..., None]
    assert (idx[behind] == 0).all()
    return [row[:n] for row, n in zip(idx.flatten(0, -2).tolist(), cnt.flatten().tolist(), strict=True)]


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("k", [1, 4, 16, 1000])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lists_the_k_best(shape, k, serve, device):
    scores = torch.randn(*shape, device=device)
    idx, cnt = serve(scores, k)
    assert idx.shape == (*shape[:-1], min(k, shape[-1])) and listed(idx, cnt) == exact(scores, k)


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("k", [1, 5, 12])
def test_equal_scores_go_to_the_lower_column(k, dtype, serve, device):
    """Few different values, both zeros among them, all signs, both infinities and NaN."""
    values = torch.tensor([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0, math.inf, -math.inf, math.nan], dtype=dtype)
    scores = values[torch.randint(0, 9, (2, 9, 40))].to(device)
    scores[0, 0], scores[0, 1], scores[0, 2, 3:] = 0.0, math.nan, -math.inf
    assert listed(*serve(scores, k)) == exact(scores, k)


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("shape", [(2, 6, 6), (2, 4, 10), (9, 4)], ids=str)
@pytest.mark.parametrize(("first", "diagonal"), [(2, False), (0, True), (1, True)])
def test_kept_and_masked_columns(first, diagonal, shape, serve, device):
    scores = torch.randn(*shape, device=device)
    mask = torch.rand(shape[-2:], device=device) < 0.4
    for k in (1, 3, 5):
        for bar in (None, mask, mask[:1], mask.new_zeros(1, shape[-1])):
            got = listed(*serve(scores, k, bar, first, diagonal))
            assert got == exact(scores, k, bar, first, diagonal)
    if diagonal and shape[-1] == shape[-2]:
        assert all(i % 6 in row for i, row in enumerate(listed(*serve(scores, 3, None, 0, True))))


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_nothing_to_choose(serve, device):
    scores = torch.full((3, 20), -math.inf, device=device)
    idx, cnt = serve(scores, 4)
    assert (cnt == 0).all() and (idx == 0).all()


def test_rows_longer_than_a_program(device, monkeypatch):
    monkeypatch.setattr(m, "TILE", 128)
    for scores in (torch.randn(2, 300, device=device), torch.randint(0, 3, (2, 260), device=device).float()):
        scores[0, 5:] = -math.inf
        for k in (1, 150):
            assert listed(*m.launch(scores, k)) == exact(scores, k)


def test_strided_scores(device):
    scores = torch.randn(6, 2, 50, device=device).transpose(0, 1)
    assert listed(*m.launch(scores[..., ::2], 5)) == exact(scores[..., ::2], 5)


def pyramid(tokens, levels, block, heads, device):
    """Whole numbers, so that each product is exact and many scores are equal."""
    sizes = [tokens]
    for _ in range(levels):
        sizes.append(-(-sizes[-1] // block))
    return [torch.randint(-2, 3, (2, heads, n, 8), device=device).float() for n in sizes[1:]]


def exact_hierarchy(queries, keys, block, k):
    """Per level {(b, h, node): list}, from the definition."""
    group = queries[0].shape[1] // keys[0].shape[1]
    levels, above = [], None
    for q, x in reversed(list(zip(queries, keys, strict=True))):
        scores = torch.einsum("bhid,bhjd->bhij", q, x.repeat_interleave(group, 1))
        here = {}
        for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
            parents = None if above is None else above[b, h, i // block]
            nodes = [j for j in range(x.shape[2]) if parents is None or j // block in parents]
            here[b, h, i] = sorted(sorted(nodes, key=lambda j: (-scores[b, h, i, j].item(), j))[:k])
        levels.insert(0, here)
        above = here
    return [row for here in levels for row in here.values()]


@pytest.mark.parametrize(
    ("tokens", "levels", "block", "k"),
    [(1, 1, 16, 8), (300, 1, 16, 3), (250, 2, 4, 3), (250, 3, 4, 2), (67, 3, 4, 1), (100, 2, 4, 50)],
)
def test_hierarchy_equals_brute_force(tokens, levels, block, k, device):
    queries, keys = pyramid(tokens, levels, block, 2, device), pyramid(tokens, levels, block, 1, device)
    idx, cnt = m.hierarchical(queries, keys, block, k)
    assert idx.shape[:3] == (2, 2, sum(q.shape[2] for q in queries)) and idx.shape[3] == min(k, keys[0].shape[2])
    got, start = [], 0
    for q in queries:
        rows = slice(start, start + q.shape[2])
        got += listed(idx[:, :, rows], cnt[:, :, rows])
        start += q.shape[2]
    assert got == exact_hierarchy(queries, keys, block, k)


def test_hierarchy_in_chunks_is_the_same(device, monkeypatch):
    queries, keys = pyramid(250, 2, 4, 2, device), pyramid(250, 2, 4, 2, device)
    whole = m.hierarchical(queries, keys, 4, 3)
    monkeypatch.setattr(m, "GATHER_BYTES", 2000)
    assert all(map(torch.equal, whole, m.hierarchical(queries, keys, 4, 3)))


def test_hierarchy_scores_grow_with_n_log_n(monkeypatch, device):
    """Elements scored for each token do not grow with the length, but for those of the coarsest level."""
    seen = []
    monkeypatch.setattr(m, "topk", lambda s, k, mask=None: (seen.append(s.numel()), m.reference(s, k, mask))[1])
    for tokens in (1024, 4096):
        seen.clear()
        nodes = pyramid(tokens, 2, 16, 1, device)
        m.hierarchical(nodes, nodes, 16, 2)
        assert seen == [2 * (tokens // 256) ** 2, 2 * tokens // 16 * 2 * 16]


def test_hierarchy_takes_tensors_that_ask_for_gradients(device):
    nodes = [x.requires_grad_() for x in pyramid(70, 2, 4, 1, device)]
    assert m.hierarchical(nodes, nodes, 4, 2)[0].shape[2] == 18 + 5


def test_custom_op(device):
    torch.library.opcheck(m.topk, (torch.randn(2, 5, 9, device=device), 3))
    torch.library.opcheck(
        m.topk, (torch.randn(5, 9, device=device), 30, torch.rand(5, 9, device=device) < 0.3, 1, True)
    )


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_mismatches_are_named(serve, device):
    scores = torch.zeros(4, 6, device=device)
    off = torch.zeros(4, 6, dtype=torch.bool, device=device)
    for arguments, words in [
        ((scores, 0), "at least 1"), ((scores.int(), 1), "float scores"), ((scores[:, :0], 1), "nK > 0"),
        ((scores, 1, off[:3]), "broadcast"), ((scores, 1, off.int()), "bool"), ((scores, 1, off[None]), "broadcast"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            serve(*arguments)


def test_hierarchy_mismatches_are_named():
    q = [torch.zeros(1, 2, n, 4) for n in (10, 3)]
    for queries, keys, words in [
        ([], [], "0 and 0 levels"), (q, q[:1], "2 and 1 levels"), ([q[0], q[0]], [q[0], q[0]], "pool to 10"),
        (q, [q[0][:, :, :9], q[1]], "do not fit"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            m.hierarchical(queries, keys, 4, 2)


def test_example_and_specs(device):
    scores, k = m.example(700, device, torch.float32)
    assert listed(*m.topk(scores, k)) == exact(scores, k) and k == 1
    for spec in m.aot_specs():
        kernel = getattr(m, spec["kernel"])
        assert {*spec["args"], *spec["const"]} == set(inspect.signature(kernel.fn).parameters)
