import math

import pytest
import torch
from block_sparse_helper import SHAPES, exact, expand, lists, make, rule_inputs

from tessera.kernels.attention import block_sparse as forward
from tessera.kernels.attention import block_sparse_backward as m
from tessera.kernels.attention._predicate import RULES, allowed

ERROR = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 1.5e-2}
SERVES = [m.launch, m.reference]
NAMES = ["kernel", "reference"]


def wanted(q, k, v, mask, grad, grad_lse, bias=None, scale=None):
    """Gradients of exact() by autograd in fp64; of the bias too if there is one."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)] + ([] if bias is None else [bias])
    out, level = exact(*leaves[:3], mask, bias, scale)
    loss = (out * grad).sum()
    if grad_lse is not None:
        loss = loss + (level.masked_fill(level.isneginf(), 0) * grad_lse).sum()
    return torch.autograd.grad(loss, leaves)


def run(serve, q, k, v, idx, cnt, *args, grad_lse=True, **named):
    """Random gradients of out and lse, and what `serve` makes of them."""
    out, lse = forward.reference(q, k, v, idx, cnt, *args, **named)
    grad = torch.randn(out.shape, dtype=out.dtype, device=out.device)  # other strides than out's
    level_grad = torch.randn_like(lse) if grad_lse else None
    return grad, level_grad, serve(grad, level_grad, q, k, v, out, lse, idx, cnt, *args, **named)


def agree(got, want, error, dtype=torch.float32):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype and error(a, b) < ERROR[dtype]


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(SHAPES[0], torch.float32), (SHAPES[1], torch.float32), (SHAPES[3], torch.float32)]
    + [((1, 4, 2, 33, 50, 112, 32, 32), dtype) for dtype in ERROR]
    + [((1, 1, 1, 50, 40, 72, 32, 32), torch.bfloat16)],
    ids=str,
)
def test_equals_autograd_of_masked_attention(shape, dtype, serve, device, error):
    q, k, v, idx, cnt = make(shape, device, dtype)
    if shape[3] == 1:
        cnt.fill_(1)
    grad, level, got = run(serve, q, k, v, idx, cnt, block_m=shape[6], block_n=shape[7])
    if shape[3] == 1:  # one key: what goes to q is 0 in exact arithmetic
        level.zero_()
        return agree(got[2:3], wanted(q, k, v, expand(idx, cnt, shape[6:], shape[3:5]), grad, level)[2:], error, dtype)
    agree(got[:3], wanted(q, k, v, expand(idx, cnt, shape[6:], shape[3:5]), grad, level), error, dtype)
    assert [x.stride() for x in got[:3]] == [m.like(x).stride() for x in (q, k, v)] and got[3].numel() == 0
    return None


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("per_head", [True, False], ids=["lists per head", "one list"])
@pytest.mark.parametrize("rule", [r for r in RULES if r != "none"])
def test_rules(rule, per_head, serve, device, error):
    shape = (1, 2, 1, 40, 50, 16, 32, 32)
    q, k, v, idx, cnt, mode, qc, kc = rule_inputs(shape, device, per_head)
    rest = (mode, qc, kc, None, rule, 2, 1, None, *shape[6:])
    grad, level, got = run(serve, q, k, v, idx, cnt, *rest)
    mask = expand(idx, cnt, shape[6:], shape[3:5], allowed(rule, qc, kc, 2, 1), mode)
    agree(got[:3], wanted(q, k, v, mask, grad, level), error)


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("per_batch", [False, True], ids=["keys", "batch and keys"])
def test_log_weight(per_batch, serve, device, error):
    shape = (2, 2, 1, 40, 50, 24, 32, 32)
    q, k, v, idx, cnt = make(shape, device)
    weight = torch.randn(*(shape[:1] if per_batch else ()), shape[4], device=device)
    weight[..., 5] = -math.inf
    named = {"key_log_weight": weight, "scale": 0.3, "block_m": shape[6], "block_n": shape[7]}
    grad, level, got = run(serve, q, k, v, idx, cnt, **named)
    bias = weight.expand(shape[0], -1).double()[:, None, None].clone().requires_grad_()
    *want, of_bias = wanted(q, k, v, expand(idx, cnt, shape[6:], shape[3:5]), grad, level, bias, 0.3)
    agree(got, [*want, of_bias[:, 0, 0]], error)
    assert (got[1][:, :, 5] == 0).all() and (got[2][:, :, 5] == 0).all()


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize(("batch", "heads"), [((2, 1), (1, 2)), ((1, 2), (2, 1)), ((1, 1), (1, 1))], ids=str)
def test_lists_and_counts_that_serve_several(batch, heads, serve, device, error):
    q, k, v, *_ = make((2, 2, 2, 70, 70, 16, 32, 16), device)
    idx, _ = lists(batch[0], heads[0], 3, 5, 1.0)
    cnt = torch.randint(0, 6, (batch[1], heads[1], 3)).int()
    idx = torch.rand(idx.shape).argsort(-1)[..., :4].sort(-1).values.int().to(device)
    cnt = cnt.clamp_max(4).to(device)
    grad, level, got = run(serve, q, k, v, idx, cnt, block_m=32, block_n=16)
    mask = expand(idx.expand(2, 2, -1, -1), cnt.expand(2, 2, -1), (32, 16), (70, 70))
    agree(got[:3], wanted(q, k, v, mask, grad, level), error)


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_nothing_seen_gives_nothing_back(serve, device):
    q, k, v = torch.randn(3, 1, 2, 64, 16, device=device)
    idx, _ = forward.full_lists(2, 2, device)
    cnt = torch.tensor([[[0, 1]]], dtype=torch.int32, device=device)
    coords = torch.arange(64, device=device).int()[:, None].expand(-1, 3).contiguous()
    far = coords + torch.where(torch.arange(64, device=device) == 40, 1000, 0)[:, None].int()
    rest = torch.ones_like(idx), far, coords, None, "square", 99, 99
    _, _, (dq, dk, dv, _) = run(serve, q, k, v, idx, cnt, *rest, block_m=32, block_n=32)
    assert (dq[:, :, 40] == 0).all()  # its block lists keys, all of which the rule refuses
    dq = torch.cat((dq[:, :, :40], dq[:, :, 41:]), 2)
    assert (dq[:, :, :32] == 0).all() and (dk[:, :, 32:] == 0).all() and (dv[:, :, 32:] == 0).all()
    assert (dq[:, :, 32:].abs().sum(-1) > 0).all() and (dv[:, :, :32].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize(("d", "grad_lse"), [(32, True), (96, False), (160, True), (256, True)])
def test_head_sizes_blocks_and_no_gradient_of_lse(d, grad_lse, serve, device, error):
    q, k, v, idx, cnt = make((1, 1, 1, 60, 100, d, 48, 80), device)
    grad, level, got = run(serve, q, k, v, idx, cnt, grad_lse=grad_lse, block_m=48, block_n=80)
    agree(got[:3], wanted(q, k, v, expand(idx, cnt, (48, 80), (60, 100)), grad, level), error)


@pytest.mark.parametrize(("dtype", "d", "block"), [(torch.float64, 32, 64), (torch.float32, 288, 64)])
def test_launcher_hands_what_it_cannot_take_to_the_reference(dtype, d, block, device, error):
    q, k, v = torch.randn(3, 1, 2, 70, d, device=device, dtype=dtype)
    grad, level, got = run(m.launch, q, k, v, *forward.full_lists(2, 2, device), block_m=block, block_n=block)
    want = wanted(q, k, v, torch.ones(70, 70, dtype=torch.bool, device=device), grad, level)
    assert max(error(a, b) for a, b in zip(got[:3], want, strict=True)) < (1e-12 if dtype == torch.float64 else 5e-6)


@pytest.mark.gpu
def test_kernel_gives_the_same_bits_twice(device):
    q, k, v, idx, cnt = make(SHAPES[2], device)
    out, lse = forward.reference(q, k, v, idx, cnt, block_m=64, block_n=32)
    inputs = torch.ones_like(out), None, q, k, v, out, lse, idx, cnt
    first, second = (m.launch(*inputs, block_m=64, block_n=32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_reference_computes_the_listed_blocks_only(monkeypatch):
    """The CPU path must save the work: it gathers the keys of the lists, not all."""
    gathered = 0
    gather = m.gather

    def counted(x, rows, count, d):
        nonlocal gathered
        got = gather(x, rows, count, d)
        gathered += got.shape[0] * got.shape[1] * got.shape[2] if x.shape[-1] == 64 * d == 64 * 16 else 0
        return got

    monkeypatch.setattr(m, "gather", counted)
    q, k, v = torch.randn(3, 1, 2, 512, 16)
    idx, cnt = lists(1, 2, 8, 8, 0.3)
    run(m.reference, q, k, v, idx, cnt)
    assert gathered == 2 * 64 * int(cnt.sum())


def test_custom_op():
    q, k, v, idx, cnt, mode, qc, kc = rule_inputs((1, 2, 1, 40, 35, 16, 32, 32), "cpu", False)
    rest = (mode, qc, kc, torch.randn(35), "circle", 2, 1, None, 32, 32)
    out, lse = forward.reference(q, k, v, idx, cnt, *rest)
    torch.library.opcheck(m.block_sparse_backward, (out, lse.zero_(), q, k, v, out, lse, idx, cnt, *rest))
    plain = (out, None, q, k, v, out, lse, idx, cnt, *rest[:3], None, *rest[4:])
    torch.library.opcheck(m.block_sparse_backward, plain, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("which", [0, 1])
def test_gradients_that_do_not_fit_are_refused(which):
    q, k, v = torch.randn(3, 1, 1, 20, 16)
    lists = forward.full_lists(1, 1)
    out, lse = forward.reference(q, k, v, *lists)
    grads = [torch.ones_like(out), torch.ones_like(lse)]
    grads[which] = grads[which][:, :, 1:]
    with pytest.raises(ValueError, match="do not fit the outputs"):
        m.block_sparse_backward(*grads, q, k, v, out, lse, *lists)


def test_example(error):
    *_, q, k, v, out, lse, idx, cnt = inputs = m.example(320, "cpu", torch.float32)
    mask = expand(idx, cnt, (64, 64), (320, 320))
    agree(m.block_sparse_backward(*inputs)[:3], wanted(q, k, v, mask, *inputs[:2]), error)


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_padding_of_the_last_block_stays_finite(serve, device, error):
    """Where every logit is far below 0, a padded key of logit 0 would weigh e^300."""
    q, k, v = torch.randn(3, 1, 1, 20, 16, device=device)
    q, k = 0.1 * q + 9, 0.1 * k - 9
    mask = torch.ones(20, 20, dtype=torch.bool, device=device)
    grad, level, got = run(serve, q, k, v, *forward.full_lists(1, 1, device), block_m=32, block_n=32)
    assert max(error(a, b) for a, b in zip(got[:3], wanted(q, k, v, mask, grad, level), strict=True)) < 1e-4
