import pytest
import torch

from tessera.kernels.control import shuffle_window as m

ERROR = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}  # the interpreter truncates to bf16
SERVES = [m.launch, m.reference]
NAMES = ["kernel", "reference"]
CASES = [  # B, L, d, heads, segments
    (1, 4, 4, 4, 4),  # one token a segment
    (2, 28, 20, 4, 4),
    (1, 45, 24, 3, 5),
    (2, 72, 68, 4, 4),  # more than one tile of the product, and a tail
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


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_heads_one_after_another(case, dtype, serve, device, error):
    given = make(case, device, dtype)
    got, want = serve(*given), exact(*given)
    assert got.dtype == dtype and got.shape == want.shape and got.is_contiguous()
    assert error(got, want) < ERROR[dtype]


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_without_biases(serve, device, error):
    given = make(CASES[1], device, biased=False)
    assert error(serve(*given), exact(*given)) < 3e-6


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_a_mixer_that_changes_nothing(serve, device):
    """One token a segment sees itself alone; with values and projection the identity, scalars come back where they were."""
    d = 8
    x, perm = torch.randn(2, 4, d, device=device), m.permutation(4 * d, 3, device)
    one, nothing = torch.eye(d, device=device), torch.randn(2 * d, d, device=device)
    assert torch.equal(serve(x, perm, torch.cat((nothing, one)), None, one, None), x)
    assert torch.equal(serve(x, perm.long(), torch.cat((nothing, one)), None, one * 2, None), x * 2)


@pytest.mark.parametrize("case", CASES[1:3], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_gradients(case, biased, device, error):
    given = make(case, device, biased=biased)
    held = [i for i, t in enumerate(given) if isinstance(t, torch.Tensor) and i != 1]
    weight, found = torch.randn(given[0].shape, device=device), []
    for fn, kind in ((m.shuffle_window, torch.float32), (exact, torch.float64)):
        mine = [t.detach().to(kind).requires_grad_() if i in held else t for i, t in enumerate(given)]
        found.append(torch.autograd.grad((fn(*mine) * weight).sum(), [mine[i] for i in held]))
    for got, want in zip(*found, strict=True):
        assert got.shape == want.shape and error(got, want) < 1e-5


def test_double_stays_double(device, error):
    given = [t.double() if isinstance(t, torch.Tensor) and i != 1 else t for i, t in enumerate(make(CASES[1], device))]
    assert error(m.launch(*given), exact(*given)) < 1e-13


def test_custom_op(device):
    x, *rest = make(CASES[1], device)
    torch.library.opcheck(m.shuffle_window, (x.detach().requires_grad_(), *rest))


def test_mismatches_are_named(device):
    x, perm, *weights, heads, segments = make(CASES[1], device)
    cases = [((x[:, :27], m.permutation(27 * 20, 1, device), *weights), "that 4 divides, got 27: change the picture")]
    cases += [((x[0], perm, *weights), r"\[28, 20\]"), ((x, perm[:-1], *weights), r"\[559\]")]
    cases += [((x, perm, *weights, 3), "3 heads do not divide the 20"), ((x, perm.float(), *weights), "float32")]
    cases += [((x, perm, weights[0][:9], *weights[1:]), r"\[60, 20\] torch.float32, got \[9, 20\]")]
    cases += [((x.half(), perm, *weights), "float16")]
    for given, words in cases:
        for serve in SERVES:
            with pytest.raises(ValueError, match=words):
                serve(*given)


def test_example(device):
    got = m.launch(*m.example(6, device, torch.bfloat16))
    assert got.shape == (2, 8, 576) and got.isfinite().all()


def test_a_permutation_is_drawn_once_and_let_go(device):
    held = m.permutation(60, 5, device)
    assert m.permutation(60, 5, device) is held and held.dtype == torch.int32
    assert sorted(held.tolist()) == list(range(60)) and not torch.equal(held, m.permutation(60, 6, device))
    again, key = held.clone(), (60, 5, str(device))
    del held
    assert key not in m._held and torch.equal(m.permutation(60, 5, device), again)
