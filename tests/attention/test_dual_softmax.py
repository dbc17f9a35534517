import pytest
import torch
from block_sparse_helper import SHAPES, exact, expand, make, rule_inputs

from tessera.kernels.attention import block_sparse as sparse
from tessera.kernels.attention import dual_softmax as m
from tessera.kernels.attention._predicate import RULES, allowed

ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}
LSE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
SERVES = [m.launch, m.reference]
NAMES = ["kernel", "reference"]


def agree(got, mask, q, k, v, error, dtype=torch.float32):
    for pair, want in ((got[:2], exact(q, k, v, torch.ones_like(mask))), (got[2:], exact(q, k, v, mask))):
        assert pair[0].dtype == dtype and error(pair[0], want[0]) < ERROR[dtype]
        assert torch.equal(pair[1].isneginf(), want[1].isneginf())
        assert ((pair[1].double() - want[1])[~want[1].isneginf()].abs() < LSE[dtype]).all()


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 2, 1, 40, 50, 72, 32, 16), torch.float32),
        ((1, 2, 1, 40, 50, 72, 32, 16), torch.float16),
        ((1, 2, 2, 40, 50, 112, 32, 32), torch.bfloat16),
        ((1, 1, 1, 1, 1, 8, 64, 64), torch.float32),
        ((1, 1, 1, 100, 100, 64, 128, 64), torch.float32),
    ],
    ids=str,
)
def test_equals_dense_and_masked_attention(shape, dtype, serve, device, error):
    q, k, v, idx, cnt = make(shape, device, dtype)
    cnt[..., -1] = idx.shape[3]
    idx[..., -1, :] = torch.arange(idx.shape[3])
    got = serve(q, k, v, idx, cnt, block_m=shape[6], block_n=shape[7])
    agree(got, expand(idx, cnt, shape[6:], shape[3:5]), q, k, v, error, dtype)
    assert got[0].stride() == got[2].stride() == m.like(q).stride()


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("per_head", [True, False], ids=["lists per head", "one list"])
@pytest.mark.parametrize("rule", [r for r in RULES if r != "none"])
def test_rules(rule, per_head, serve, device, error):
    """A pair that the rule refuses in a listed block belongs to the full attention all the same, once."""
    shape = (1, 2, 1, 40, 50, 16, 32, 32)
    q, k, v, idx, cnt, mode, qc, kc = rule_inputs(shape, device, per_head)
    got = serve(q, k, v, idx, cnt, mode, qc, kc, rule, 2, 1, None, *shape[6:])
    mask = expand(idx, cnt, shape[6:], shape[3:5], allowed(rule, qc, kc, 2, 1), mode)
    agree(got, mask.expand(1, 2, -1, -1), q, k, v, error)


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("count", [0, 1, 3], ids=["nothing listed", "the last block", "everything"])
def test_ends_of_the_lists(count, serve, device, error):
    q, k, v = torch.randn(3, 1, 1, 40, 16, device=device)
    idx = {1: [[[[2]]]]}.get(count, [[[[0, 1, 2]]]])
    idx, cnt = (torch.tensor(x, dtype=torch.int32, device=device) for x in (idx, [[[count]]]))
    got = serve(q, k, v, idx, cnt, scale=0.25, block_m=64, block_n=16)
    agree(got, expand(idx, cnt, (64, 16), (40, 40)), q, k, v, error)


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_reuse_of_a_refresh_gives_full_attention(serve, device, error):
    """What Re-ttention keeps, put back through row_factor and residual at unchanged inputs, is the full attention."""
    shape = SHAPES[2]
    q, k, v, idx, cnt = make(shape, device)
    full, full_lse, out, lse = serve(q, k, v, idx, cnt, block_m=shape[6], block_n=shape[7])
    share = (lse - full_lse).exp()
    residual = full - share[..., None] * out
    named = {"row_factor": share, "residual": residual, "block_m": shape[6], "block_n": shape[7]}
    launch = sparse.launch if serve is m.launch else sparse.reference
    assert (share < 1).any() and error(launch(q, k, v, idx, cnt, **named)[0], full) < 2e-6


def test_what_the_kernel_cannot_take_goes_to_the_reference(device, error):
    q, k, v = torch.randn(3, 1, 1, 40, 16, dtype=torch.float64, device=device)
    idx, cnt = sparse.full_lists(2, 2, device)
    full, full_lse, out, lse = m.launch(q, k, v, idx, cnt, block_m=24, block_n=24)
    assert full.dtype == full_lse.dtype == torch.float64 and torch.equal(full, out) and torch.equal(full_lse, lse)
    assert error(full, exact(q, k, v, torch.ones(40, 40, dtype=torch.bool, device=device))[0]) < 1e-12


def test_custom_op():
    q, k, v, idx, cnt, mode, qc, kc = rule_inputs((1, 2, 1, 40, 35, 16, 32, 32), "cpu", False)
    torch.library.opcheck(m.dual_softmax, (q, k, v, idx, cnt, mode, qc, kc, "band", 2, 1, None, 32, 32))


def test_lists_that_do_not_fit_are_refused():
    q, k, v = torch.randn(3, 1, 1, 100, 16)
    idx, cnt = sparse.full_lists(2, 2)
    for serve in SERVES:
        with pytest.raises(ValueError, match="must hold 2 rows"):
            serve(q, k, v, idx[:, :, :1], cnt)
    with pytest.raises(ValueError, match="ascend"):
        m.dual_softmax(q, k, v, idx.flip(-1), cnt)


def test_example(error):
    q, k, v, idx, cnt = inputs = m.example(320, "cpu", torch.float32)
    agree(m.dual_softmax(*inputs), expand(idx, cnt, (64, 64), (320, 320)).expand(1, 8, -1, -1), q, k, v, error)
