import pytest
import torch

from tessera.kernels.control import shuffle_window as m

CASES = [  # B, L, d, heads, segments
    (1, 4, 4, 4, 4),  # one token a segment
    (2, 28, 20, 4, 4),
    (1, 45, 24, 3, 5),
]


def make(case, device, dtype=torch.float32, biased=True):
    b, length, d = case[:3]
    x = torch.randn(b, length, d + 3, device=device).to(dtype)[..., 3:]  # a slice of a wider row
    perm = m.permutation(length * d, 1, device)
    qkv, proj = (torch.randn(s, d, device=device).to(dtype) / d**0.5 for s in (3 * d, d))
    biases = [torch.randn(s, device=device).to(dtype) if biased else None for s in (3 * d, d)]
    return x, perm, qkv, biases[0], proj, biases[1], *case[3:]


def exact(x, perm, qkv_weight, qkv_bias, proj_weight, proj_bias, heads, segments):
    """fp64, one segment and head after another, undone by the inverse permutation."""
    x, w, p = x.double(), qkv_weight.double(), proj_weight.double()
    width, place = x.shape[2] // heads, perm.long()
    shuffled = x.flatten(1)[:, place].view(x.shape)
    mixed = []
    for rows in shuffled.chunk(segments, 1):
        qkv = rows @ w.t() + (0 if qkv_bias is None else qkv_bias.double())
        q, k, v = qkv.chunk(3, -1)
        parts = []
        for head in range(heads):
            at = slice(head * width, (head + 1) * width)
            share = (q[..., at] @ k[..., at].transpose(1, 2) * width**-0.5).softmax(-1)
            parts.append(share @ v[..., at])
        mixed.append(torch.cat(parts, -1) @ p.t() + (0 if proj_bias is None else proj_bias.double()))
    return torch.cat(mixed, 1).flatten(1)[:, place.argsort()].view(x.shape)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_equals_heads_one_after_another(case, biased, device, error):
    given = make(case, device, biased=biased)
    got = m.reference(*given)
    assert got.is_contiguous() and error(got, exact(*given)) < 2e-6


def test_a_number_of_tokens_that_does_not_divide_is_named(device):
    x, _, *rest = make(CASES[1], device)
    with pytest.raises(ValueError, match="that 4 divides, got 27"):
        m.reference(x[:, :27], m.permutation(27 * 20, 1, device), *rest)


def test_a_permutation_is_drawn_once_and_let_go(device):
    held = m.permutation(60, 5, device)
    assert m.permutation(60, 5, device) is held and held.dtype == torch.int32
    assert sorted(held.tolist()) == list(range(60)) and not torch.equal(held, m.permutation(60, 6, device))
    again, key = held.clone(), (60, 5, str(device))
    del held
    assert key not in m._held and torch.equal(m.permutation(60, 5, device), again)
