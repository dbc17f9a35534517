import pytest
import torch

from tessera.kernels.tokens import gather_rows as g
from tessera.kernels.tokens import scatter_rows as s

ERROR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # the interpreter truncates to bf16
NAMES = ["kernel", "reference"]


def make(device, dtype=torch.float32, c=24):
    """A token-major slice, places of each batch item, matrices for 3 pairs of a head of 6."""
    x = torch.randn(2, 11, c + 2, device=device).to(dtype)[..., 2:]
    idx = torch.stack([torch.randperm(11)[:5] for _ in range(2)]).to(device)
    return x, idx, torch.randn(11, 3, 2, 2, device=device)


def turn(row, matrices):
    """Written out: one row [C] in fp64."""
    row, out = row.double(), torch.empty_like(row, dtype=torch.float64)
    for j in range(len(row) // 2):
        out[2 * j : 2 * j + 2] = matrices[j % len(matrices)].double() @ row[2 * j : 2 * j + 2]
    return out


def gathered(x, idx, freqs, transposed=False):
    idx = idx.expand(len(x), -1) if idx.ndim == 1 else idx
    rows = []
    for b in range(len(x)):
        of = freqs if freqs is None or freqs.ndim == 4 else freqs[b % len(freqs)]
        of = of.transpose(2, 3) if transposed else of
        rows.append(torch.stack([x[b, n].double() if of is None else turn(x[b, n], of[n]) for n in idx[b]]))
    return torch.stack(rows)


@pytest.mark.parametrize("serve", [g.launch, g.reference], ids=NAMES)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("form", ["plain", "turned", "batched", "back", "shared"])
def test_gather(form, dtype, serve, device, error):
    x, idx, freqs = make(device, dtype)
    freqs = {"plain": None, "batched": torch.randn(2, 11, 3, 2, 2, device=device)}.get(form, freqs)
    idx = idx[0].int() if form == "shared" else idx
    got = serve(x, idx, freqs, form == "back")
    want = gathered(x, idx, freqs, form == "back")
    assert got.dtype == dtype and got.shape == (2, 5, 24) and error(got, want) < ERROR[dtype]
    if form == "plain":
        assert torch.equal(got.double(), want)


def test_an_index_outside_gives_zeros_in_the_kernel(device, monkeypatch):
    """On a GPU the values of the index are not read before the kernel runs."""
    monkeypatch.setattr(g, "check_index", lambda x, idx: None)
    x, _, freqs = make(device)
    for of in (None, freqs):
        got = g.launch(x, torch.tensor([3, 11, -1, 0], device=device), of)
        assert (got[:, 1:3] == 0).all() and (got[:, [0, 3]] != 0).any(-1).all()


@pytest.mark.parametrize("serve", [s.launch, s.reference], ids=NAMES)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("form", ["plain", "turned", "batched", "back", "shared"])
def test_scatter(form, dtype, serve, device, error):
    x, idx, freqs = make(device, dtype)
    freqs = {"plain": None, "batched": torch.randn(2, 11, 3, 2, 2, device=device)}.get(form, freqs)
    idx = idx[0].int() if form == "shared" else idx
    rows = torch.randn(2, 5, 24, device=device).to(dtype)
    before = x.clone()
    got = serve(x, rows, idx, freqs, form == "back")
    want = x.double()
    lines = torch.arange(2, device=device)[:, None]
    placed = torch.zeros_like(want)
    placed[lines, idx.long().expand(2, 5)] = rows.double()
    want[lines, idx.long().expand(2, 5)] = gathered(placed, idx, freqs, form == "back")
    assert error(got, want) < ERROR[dtype] and torch.equal(x, before) and got.is_contiguous()
    rest = torch.ones(2, 11, dtype=torch.bool, device=device)
    rest[lines, idx.long().expand(2, 5)] = False
    assert torch.equal(got[rest], x[rest])


def test_wide_rows_take_several_programs(device):
    x = torch.randn(1, 3, 1100, device=device)
    idx = torch.tensor([2, 0], device=device)
    assert torch.equal(g.launch(x, idx), x[:, [2, 0]])
    got = s.launch(x, x[:, [0, 1]], idx)
    assert torch.equal(got, x[:, [1, 1, 0]])


def test_there_and_back(device):
    x, idx, _ = make(device)
    assert torch.equal(s.launch(x, g.launch(x, idx), idx), x)


def test_none_and_one(device):
    x, idx, _ = make(device)
    assert g.launch(x, idx[:, :0]).shape == (2, 0, 24) and torch.equal(s.launch(x, x[:, :0], idx[:, :0]), x)
    assert torch.equal(g.launch(x[:, :1], idx[0, :1] * 0), x[:, :1])


def test_gradients(device):
    x, idx, freqs = make(device, torch.float64, 12)
    x, rows = x.detach().requires_grad_(), torch.randn(2, 5, 12, device=device, dtype=torch.float64, requires_grad=True)
    for f in (None, freqs):
        assert torch.autograd.gradcheck(lambda t, f=f: g.gather_rows(t, idx, f), (x,))
        assert torch.autograd.gradcheck(lambda t, r, f=f: s.scatter_rows(t, r, idx, f), (x, rows))


def test_custom_ops(device):
    x, idx, freqs = make(device)
    torch.library.opcheck(g.gather_rows, (x.detach().requires_grad_(), idx, freqs))
    torch.library.opcheck(s.scatter_rows, (x.detach().requires_grad_(), torch.randn(2, 5, 24, device=device), idx))


@pytest.mark.parametrize("on", ["launch", "reference"])
def test_mismatches_are_named(on, device):
    x, idx, freqs = make(device)
    rows = torch.zeros(2, 5, 24, device=device)
    cases = [
        ((x[0], idx), r"\[11, 24\]"),
        ((x, idx[:1]), r"\[1, 5\]"),
        ((x, idx.float()), "int32"),
        ((x, idx + 9), "11 rows"),
    ]
    cases += [((x, idx, freqs[:4]), r"\[4, 3, 2, 2\]"), ((x, idx, freqs.repeat(1, 3, 1, 1)), r"\[11, 9, 2, 2\]")]
    for given, words in cases:
        if words == "11 rows" and device == "cuda":
            continue  # the kernel gives zeros there
        with pytest.raises(ValueError, match=words):
            getattr(g, on)(*given)
        with pytest.raises(ValueError, match=words):
            getattr(s, on)(given[0], rows, *given[1:])
    with pytest.raises(ValueError, match="5 places"):
        getattr(s, on)(x, rows[:, :4], idx)


def test_examples(device):
    assert g.launch(*g.example(5, device, torch.bfloat16)).shape == (1, 2, 3072)
    assert s.launch(*s.example(5, device, torch.bfloat16)).isfinite().all()
