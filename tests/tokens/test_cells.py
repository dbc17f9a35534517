import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tessera.kernels.tokens import cell_entropy as e
from tessera.kernels.tokens import merge_cells as m
from tessera.kernels.tokens import unmerge_cells as u

ERROR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # the interpreter truncates to bf16
NAMES = ["kernel", "reference"]
DTYPES = pytest.mark.parametrize("dtype", ERROR, ids=str)
MERGE = pytest.mark.parametrize("merge", [m.launch, m.reference], ids=NAMES)
UNMERGE = pytest.mark.parametrize("unmerge", [u.launch, u.reference], ids=NAMES)
FINE, SIZE, CELLS = 5, 4, 3


def make(device, dtype=torch.float32, shared=False, c=24):
    """(a token-major slice [2, 17, c], the order of its places, the owner of each)."""
    x = torch.randn(2, 17, c + 2, device=device).to(dtype)[..., 2:]
    order = torch.stack([torch.randperm(17) for _ in range(2)])
    of = torch.cat((torch.arange(FINE), FINE + torch.arange(CELLS).repeat_interleave(SIZE)))
    owner = torch.empty_like(order).scatter_(1, order, of.expand(2, -1))
    pick = (lambda t: t[0].int()) if shared else (lambda t: t)
    return x, pick(order).to(device), pick(owner).to(device)


@MERGE
@DTYPES
@pytest.mark.parametrize("shared", [False, True])
def test_merge_is_written_out(merge, dtype, shared, device, error):
    x, order, _ = make(device, dtype, shared)
    got = merge(x, order, FINE, SIZE)
    assert got.dtype == dtype and got.shape == (2, FINE + CELLS, 24)
    for b in range(2):
        places = (order if shared else order[b]).tolist()
        assert torch.equal(got[b, :FINE], x[b, places[:FINE]])
        for k in range(CELLS):
            at = places[FINE + k * SIZE : FINE + (k + 1) * SIZE]
            assert error(got[b, FINE + k], x[b, at].double().mean(0)) < ERROR[dtype]


@UNMERGE
@DTYPES
@pytest.mark.parametrize("shared", [False, True])
def test_unmerge_is_written_out(unmerge, dtype, shared, device, error):
    x, _, owner = make(device, dtype, shared)
    before, after = (torch.randn(2, FINE + CELLS, 24, device=device).to(dtype) for _ in range(2))
    got = unmerge(x, before, after, owner, FINE)
    for b in range(2):
        for n, o in enumerate((owner if shared else owner[b]).tolist()):
            want = after[b, o] if o < FINE else x[b, n].double() + after[b, o].double() - before[b, o].double()
            assert torch.equal(got[b, n], want) if o < FINE else error(got[b, n], want) < ERROR[dtype]


@MERGE
def test_the_way_back_keeps_the_means(merge, device, error):
    x, order, owner = make(device)
    before = merge(x, order, FINE, SIZE)
    assert error(u.launch(x, before, before, owner, FINE), x) < 1e-6
    after = torch.randn_like(before)
    assert error(merge(u.launch(x, before, after, owner, FINE), order, FINE, SIZE), after) < 1e-6


def test_merged_twins_leave_the_attention_of_others_alone(error):
    """Four equal tokens as one with log 4 added to its logits are the same four to every query."""
    k, v = torch.randn(1, 2, 17, 8), torch.randn(1, 2, 17, 8)
    order = torch.randperm(17)
    for t in (k, v):
        for c in range(CELLS):
            at = order[FINE + c * SIZE : FINE + (c + 1) * SIZE]
            t[:, :, at] = t[:, :, at[:1]]
    q = torch.randn(1, 2, 9, 8)
    short = [m.reference(t[0], order, FINE, SIZE)[None] for t in (k, v)]
    bias = torch.cat((torch.zeros(FINE), torch.full((CELLS,), math.log(SIZE)))).expand(1, 1, 1, -1)
    assert error(sdpa(q, *short, attn_mask=bias), sdpa(q, k, v)) < 1e-5
    assert error(sdpa(q, *short), sdpa(q, k, v)) > 1e-2


@pytest.mark.parametrize("serve", [e.launch, e.reference], ids=NAMES)
def test_entropy_is_the_formula(serve, device, error):
    x = torch.rand(4, 9, device=device)
    places = torch.linspace(0, 1, 48, dtype=torch.float64, device=device)
    p = torch.exp(-((x.double()[:, :, None] - places) ** 2) / (2 * 0.03**2)).mean(1)
    p = p / p.sum(1, keepdim=True)
    assert error(serve(x, 48, 0.03), -(p * p.log()).sum(1) / math.log(48)) < 1e-5


@pytest.mark.parametrize("serve", [e.launch, e.reference], ids=NAMES)
def test_a_flat_cell_has_least_and_noise_most(serve, device):
    flat, noise = torch.full((1, 512), 0.5, device=device), torch.rand(1, 512, device=device)
    ramp, two = (
        torch.linspace(0.4, 0.6, 512, device=device)[None],
        torch.tensor([0.1, 0.9], device=device).repeat(256)[None],
    )
    values = serve(torch.cat((flat, two, ramp, noise)), 64, 0.01)
    assert values.diff().min() > 0.05 and 0 <= values[0] < 0.3 and 0.97 < values[3] <= 1


def test_what_lies_between_bins_is_seen(device):
    x = torch.full((2, 5), 0.5 + 0.5 / 63, device=device) + torch.tensor([[0.0], [0.5 / 63]], device=device)
    assert e.reference(x).isfinite().all()
    with pytest.raises(ValueError, match="between bins unseen"):
        e.reference(x, 8, 0.01)


def test_custom_ops(device):
    x, order, owner = make(device)
    before = m.reference(x, order, FINE, SIZE)
    leaf = lambda t: t.detach().clone().requires_grad_()  # noqa: E731
    torch.library.opcheck(m.merge_cells, (leaf(x), order, FINE, SIZE))
    torch.library.opcheck(u.unmerge_cells, (leaf(x), leaf(before), leaf(before), owner, FINE))
    torch.library.opcheck(e.cell_entropy, (torch.rand(3, 4, device=device), 64, 0.01))


def test_gradients(device):
    x, order, owner = make(device, torch.float64, c=3)
    before = m.reference(x, order, FINE, SIZE)
    leaf = lambda t: t.detach().clone().requires_grad_()  # noqa: E731
    torch.autograd.gradcheck(lambda t: m.merge_cells(t, order, FINE, SIZE), leaf(x))
    torch.autograd.gradcheck(
        lambda *t: u.unmerge_cells(*t, owner, FINE), (leaf(x), leaf(before), leaf(torch.randn_like(before)))
    )


@pytest.mark.parametrize("on", NAMES)
def test_what_does_not_fit_is_refused(on, device):
    x, order, owner = make(device)
    on = "launch" if on == "kernel" else on
    with pytest.raises(ValueError, match="17 places are not 4 fine tokens and cells of 4"):
        getattr(m, on)(x, order, 4, SIZE)
    short = x[:, : FINE + CELLS]
    with pytest.raises(ValueError, match="do not belong together"):
        getattr(u, on)(x, short, short[:, 1:], owner, FINE)
    with pytest.raises(ValueError, match="share a dtype"):
        getattr(u, on)(x, short, short.double(), owner, FINE)
    with pytest.raises(ValueError, match=r"\[R, S\]"):
        getattr(e, on)(x)


def test_examples(device):
    for kernel in (m, u, e):
        assert kernel.launch(*kernel.example(17, device, torch.bfloat16)).isfinite().all()
        assert kernel.aot_specs()
