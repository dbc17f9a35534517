import pytest
import torch

from tessera.kernels.attention import transpose_lists as m


def lists(b, h, rows, blocks, width, device="cpu"):
    """Random ascending lists, some empty; behind each count stand blocks that must not be found."""
    idx = torch.rand(b, h, rows, blocks, device=device).argsort(-1)[..., :width].sort(-1).values.int()
    return idx, torch.randint(0, width + 1, (b, h, rows), device=device).int()


def brute(idx, cnt, blocks):
    """Per (batch, head) and key block the (query block, position) pairs, by walking the lists."""
    found = {}
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in idx.shape[:3])).view(-1, 3).tolist():
        for slot in range(int(cnt[min(b, cnt.shape[0] - 1), min(h, cnt.shape[1] - 1), i])):
            found.setdefault((b, h, int(idx[b, h, i, slot])), []).append((i, i * idx.shape[3] + slot))
    return found


@pytest.mark.parametrize(
    ("b", "h", "rows", "blocks", "width"), [(1, 1, 1, 1, 1), (2, 3, 7, 5, 4), (1, 2, 33, 40, 17), (1, 1, 3, 200, 2)]
)
def test_equals_a_walk_over_the_lists(b, h, rows, blocks, width, device):
    idx, cnt = lists(b, h, rows, blocks, width, device)
    offsets, to, position = m.transpose_lists(idx, cnt, blocks)
    want = brute(idx, cnt, blocks)
    assert offsets.dtype == to.dtype == position.dtype == torch.int32 and offsets.shape == (b, h, blocks + 1)
    assert (offsets[..., 0] == 0).all() and torch.equal(offsets[..., -1].long(), cnt.sum(-1))
    for i, j, block in torch.cartesian_prod(torch.arange(b), torch.arange(h), torch.arange(blocks)).tolist():
        part = slice(int(offsets[i, j, block]), int(offsets[i, j, block + 1]))
        got = list(zip(to[i, j, part].tolist(), position[i, j, part].tolist(), strict=True))
        assert got == want.get((i, j, block), [])


def test_counts_of_each_head_for_one_list(device):
    idx, _ = lists(1, 1, 6, 9, 4, device)
    cnt = torch.randint(0, 5, (2, 3, 6), device=device).int()
    got = m.transpose_lists(idx, cnt, 9)
    want = m.transpose_lists(idx.expand(2, 3, 6, 4), cnt, 9)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_nothing_listed(device):
    idx, cnt = lists(1, 2, 4, 5, 3, device)
    offsets, _, _ = m.transpose_lists(idx, torch.zeros_like(cnt), 5)
    assert (offsets == 0).all()
    offsets, rows, _ = m.transpose_lists(idx[..., :0], torch.zeros_like(cnt), 5)
    assert (offsets == 0).all() and rows.shape == (1, 2, 0)


def test_custom_op():
    idx, cnt = lists(2, 2, 5, 6, 3)
    torch.library.opcheck(m.transpose_lists, (idx, cnt, 6))
    torch.library.opcheck(m.transpose_lists, (idx[:1], cnt, 6))


@pytest.mark.parametrize(
    ("idx", "cnt"), [((1, 1, 4), (1, 1, 4)), ((1, 1, 4, 2), (1, 1, 5)), ((2, 1, 4, 2), (3, 1, 4))], ids=str
)
def test_lists_that_do_not_fit_are_refused(idx, cnt):
    with pytest.raises(ValueError, match=r"must be \[B|other batches"):
        m.transpose_lists(torch.zeros(idx, dtype=torch.int32), torch.zeros(cnt, dtype=torch.int32), 3)


def test_example_lists_a_tenth():
    idx, cnt, blocks = m.example(1280, "cpu", torch.float32)
    offsets, rows, _ = m.transpose_lists(idx, cnt, blocks)
    assert offsets[0, :, -1].tolist() == [2 * 20] * 8 and rows.max() == 19
