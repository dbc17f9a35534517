import math

import pytest
import torch
from block_sparse_helper import SHAPES, exact, expand, lists, make, rule_inputs
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tessera.kernels.attention import block_sparse as m
from tessera.kernels.attention._predicate import RULES, allowed
from tessera.kernels.attention._tiles import split_head

ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}  # the interpreter truncates to bf16
LSE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # absolute
SERVES = [m.launch, m.reference]
NAMES = ["kernel", "reference"]


def agree(got, want, error, dtype=torch.float32):
    out, lse = got
    assert out.dtype == dtype and error(out, want[0]) < ERROR[dtype]
    assert torch.equal(lse.isneginf(), want[1].isneginf())
    assert (lse.double() - want[1])[~lse.isneginf()].abs().max() < LSE[dtype]


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_masked_attention(shape, dtype, serve, device, error):
    q, k, v, idx, cnt = make(shape, device, dtype)
    got = serve(q, k, v, idx, cnt, block_m=shape[6], block_n=shape[7])
    agree(got, exact(q, k, v, expand(idx, cnt, shape[6:], (shape[3], shape[4]))), error, dtype)
    assert got[0].stride() == torch.empty_like(q).stride()


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("per_head", [True, False], ids=["lists per head", "one list"])
@pytest.mark.parametrize("rule", [r for r in RULES if r != "none"])
def test_rule_equals_explicit_mask(rule, per_head, serve, device, error):
    shape = SHAPES[2]
    q, k, v, idx, cnt, mode, qc, kc = rule_inputs(shape, device, per_head)
    got = serve(q, k, v, idx, cnt, mode, qc, kc, None, rule, 2, 1, None, *shape[6:])
    seen = allowed(rule, qc, kc, 2, 1)
    placed = seen[qc[:, 0] >= 0][:, kc[:, 0] >= 0]
    assert placed.any() and not placed.all()
    agree(got, exact(q, k, v, expand(idx, cnt, shape[6:], shape[3:5], seen, mode)), error)


@pytest.mark.parametrize(
    ("rule", "keys", "seen"),
    [
        ("circle", [(0, 7, 7), (0, 2, 5), (0, 5, 8), (1, 5, 5), (2, 5, 5)], [1, 0, 0, 1, 0]),
        ("square", [(0, 7, 7), (0, 2, 5), (0, 5, 8), (1, 3, 3), (2, 5, 5)], [1, 0, 0, 1, 0]),
        ("band", [(0, 99, 8), (0, 5, 9), (0, 5, 2), (1, 5, 5), (2, 5, 5)], [1, 0, 1, 1, 0]),
        ("frame_tile", [(0, 0, 9), (1, 0, 5), (1, 1, 5), (9, 2, 0), (9, 0, 5)], [1, 0, 1, 1, 0]),
        ("block_diagonal", [(0, 5, 5), (0, 5, 6), (0, 4, 5), (1, 5, 5), (-1, 0, 0)], [1, 0, 0, 0, 1]),
    ],
)
def test_rules_at_their_edge(rule, keys, seen):
    """From (0, 5, 5), in frame_tile from (0, 0, 5): radius 3, strict where a distance is meant, and one frame."""
    query = torch.tensor([[0, 0 if rule == "frame_tile" else 5, 5]])
    assert allowed(rule, query, torch.tensor(keys), 3, 1).int().tolist() == [seen]


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_other_tokens_see_and_are_seen(serve, device, error):
    """t < 0 on either side passes every rule, however far the token."""
    q, k, v = torch.randn(3, 1, 1, 20, 16, device=device)
    coords = torch.arange(20, device=device).int()[:, None].expand(-1, 3) * 100
    coords = torch.where(torch.arange(20, device=device)[:, None] < 4, -1, coords).int()
    idx, cnt = m.full_lists(1, 1, device)
    got = serve(q, k, v, idx, cnt, torch.ones_like(idx), coords, coords, None, "circle", 1, 0, None, 32, 32)
    free = torch.arange(20, device=device) < 4
    mask = free[:, None] | free[None] | torch.eye(20, dtype=torch.bool, device=device)
    agree(got, exact(q, k, v, mask), error)


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_full_list_is_dense_attention(serve, device, error):
    q, k, v = (torch.randn(2, n, 3, 40, device=device).transpose(1, 2) for n in (70, 130, 130))
    out, lse = serve(q, k, v, *m.full_lists(2, 3, device), block_m=64, block_n=64)
    assert error(out, sdpa(q, k, v)) < 2e-6
    assert (lse - (q @ k.transpose(2, 3) * 40**-0.5).logsumexp(-1)).abs().max() < 1e-5


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_empty_lists_and_blind_queries_give_zero(serve, device):
    q, k, v = torch.randn(3, 1, 2, 64, 16, device=device)
    idx, cnt = m.full_lists(2, 2, device)
    cnt = torch.tensor([[[0, 2]]], dtype=torch.int32, device=device)
    coords = torch.arange(64, device=device).int()[:, None].expand(-1, 3).contiguous()
    far = coords + torch.where(torch.arange(64, device=device) >= 60, 1000, 0)[:, None].int()
    mode = torch.ones_like(idx)
    out, lse = serve(q, k, v, idx, cnt, mode, far, coords, None, "square", 1, 0, None, 32, 32)
    blind = torch.arange(64, device=device)
    blind = (blind < 32) | (blind >= 60)
    assert (out[:, :, blind] == 0).all() and lse[:, :, blind].isneginf().all()
    assert torch.allclose(out[:, :, ~blind], v[:, :, ~blind]) and lse[:, :, ~blind].isfinite().all()


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("per_batch", [False, True], ids=["keys", "batch and keys"])
def test_log_weight_counts_a_key_that_often(per_batch, serve, device, error):
    shape = SHAPES[1]
    q, k, v, idx, cnt = make(shape, device)
    weight = torch.randn(shape[0], shape[4], device=device) if per_batch else torch.randn(shape[4], device=device)
    weight[..., 5] = -math.inf
    got = serve(q, k, v, idx, cnt, key_log_weight=weight, scale=0.3, block_m=shape[6], block_n=shape[7])
    mask = expand(idx, cnt, shape[6:], shape[3:5])
    agree(got, exact(q, k, v, mask, weight.view(-1, 1, 1, shape[4]).double(), 0.3), error)


def test_key_that_stands_for_three(device, error):
    q, k, v = torch.randn(1, 1, 5, 16), torch.randn(1, 1, 4, 16), torch.randn(1, 1, 4, 16)
    weight = torch.tensor([math.log(3.0), 0.0, 0.0, 0.0])
    out, lse = m.reference(q, k, v, *m.full_lists(1, 1), key_log_weight=weight)
    often = [0, 0, 0, 1, 2, 3]
    assert error(out, sdpa(q, k[:, :, often], v[:, :, often])) < 2e-6


def test_blocks_smaller_than_the_kernel_tile_and_no_multiple_of_it(device, error):
    q, k, v = torch.randn(3, 1, 1, 130, 16, device=device)
    idx, cnt = lists(1, 1, 3, 2, 0.7)
    got = m.launch(q, k, v, idx.to(device), cnt.to(device), block_m=48, block_n=80)
    agree(got, exact(q, k, v, expand(idx.to(device), cnt.to(device), (48, 80), (130, 130))), error)


@pytest.mark.parametrize(
    ("dtype", "d", "block"), [(torch.float64, 32, 64), (torch.float32, 288, 64), (torch.float32, 32, 24)]
)
def test_launcher_hands_what_it_cannot_take_to_the_reference(dtype, d, block, device, error):
    q, k, v = torch.randn(3, 1, 1, 50, d, device=device, dtype=dtype)
    blocks = -(-50 // block)
    out, lse = m.launch(q, k, v, *m.full_lists(blocks, blocks, device), block_m=block, block_n=block)
    assert out.dtype == dtype and lse.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert error(out, sdpa(q, k, v)) < (1e-12 if dtype == torch.float64 else 2e-6)


def test_reference_computes_the_listed_blocks_only(monkeypatch):
    """The CPU path must save the work: the score elements it forms are those of the lists."""
    formed = 0
    dense = m.dense

    def counted(q, k, v, bias, scale, scratch):
        nonlocal formed
        formed += q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        return dense(q, k, v, bias, scale)

    monkeypatch.setattr("tessera.kernels.attention.gather.chunk_attention", counted)
    q, k, v = torch.randn(3, 1, 2, 512, 16)
    idx, cnt = lists(1, 2, 8, 8, 0.3)
    m.reference(q, k, v, idx, cnt)
    assert formed == int(cnt.sum()) * 64 * 64


@pytest.mark.parametrize("d", [8, 16, 32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256])
def test_split_head_holds_it_without_doubling(d):
    first, second = split_head(d)
    assert d <= first + second < max(17, 2 * d) and (second == 0 or first > second >= 16)
    assert split_head(d, 32)[1] == 0 and d <= split_head(d, 32)[0] < max(17, 2 * d)
    assert {72: (64, 16), 96: (64, 32), 112: (128, 0)}.get(d, (first, second)) == (first, second)


@pytest.mark.parametrize("token_major", [True, False])
def test_custom_op(token_major):
    shape = SHAPES[1]
    q, k, v, idx, cnt, mode, qc, kc = rule_inputs(shape, "cpu", True)
    if not token_major:
        q = q.contiguous()
    needing = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(m.block_sparse, (*needing, idx, cnt, mode, qc, kc, None, "circle", 2, 1, None, *shape[6:]))
    out, _ = m.block_sparse(q, k, v, idx, cnt, block_m=shape[6], block_n=shape[7])
    assert out.stride() == torch.empty_like(q).stride()


def everything(dtype, device):
    """Grouped heads, a rule, keys with weights, segments of which one is not seen, a row factor and a residual."""
    shape = (2, 2, 1, 40, 70, 24, 32, 16)
    q, k, v, idx, cnt, mode, qc, kc = rule_inputs(shape, device, True)
    segments = torch.randint(0, 4, (70,), device=device).int()
    segments[:16] = 3
    cnt[1, 0, 1] = 0
    cnt[0, 1, 0], idx[0, 1, 0, 0] = 1, 0  # only keys of the segment that is not seen
    bias = torch.tensor([[0.3, -1.0, 0.0, -math.inf], [-0.5, 2.0, -math.inf, 0.1]], device=device)
    parts = (
        torch.randn(70, device=device),
        bias,
        torch.rand(2, 2, 40, device=device),
        torch.randn(q.shape, device=device),
    )
    leaves = [x.to(dtype).detach() for x in (q, k, v, *parts)]

    def call(serve, q, k, v, weight, bias, factor, residual):
        lists = idx, cnt, mode, qc, kc, weight, "circle", 2, 1, 0.3, *shape[6:]
        return serve(q, k, v, *lists, segments, bias, factor, residual)

    mask = expand(idx, cnt, shape[6:], shape[3:5], allowed("circle", qc, kc, 2, 1), mode)

    def brute(q, k, v, weight, bias, factor, residual):
        added = (weight + bias[:, segments])[:, None, None]
        out, level = exact(q, k, v, mask, added, 0.3)
        return out * factor[..., None] + residual, level

    return leaves, call, brute


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_segment_bias_row_factor_and_residual(serve, device, error):
    leaves, call, brute = everything(torch.float32, device)
    want = brute(*(x.double() for x in leaves))
    assert want[1].isneginf().any() and not want[1].isneginf().all()
    agree(call(serve, *leaves), want, error)


@torch.enable_grad()
@pytest.mark.parametrize("which", [range(7), (0,), (4,), (5, 6), (3,)], ids=str)
def test_gradients_of_everything(which, error):
    """Against autograd of the brute force in fp64, through both outputs, however few inputs need a gradient."""
    leaves, call, brute = everything(torch.float64, "cpu")
    leaves = [x.requires_grad_(i in which) for i, x in enumerate(leaves)]
    (out, level), (want, want_level) = call(m.block_sparse, *leaves), brute(*leaves)
    grads = torch.randn_like(out), torch.randn_like(level)
    some = [leaves[i] for i in which]

    def through(out, level):
        seen = level.isfinite()
        loss = (out * grads[0]).sum()
        if level.requires_grad:
            loss = loss + (level[seen] * grads[1][seen]).sum()
        return torch.autograd.grad(loss, some)

    for got, wanted in zip(through(out, level), through(want, want_level), strict=True):
        finite = wanted.isfinite()  # of a bias of -inf: 0 here, NaN in the brute force
        assert error(got[finite], wanted[finite]) < 1e-11 and (got[~finite] == 0).all()


@torch.enable_grad()
@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_output_alone(output, error):
    leaves = [x.requires_grad_() for x in make((1, 2, 1, 40, 50, 16, 32, 32), "cpu", torch.float64)[:3]]
    lists = m.full_lists(2, 2)
    want = exact(*leaves, torch.ones(40, 50, dtype=torch.bool))[output].sin().sum()
    got = m.block_sparse(*leaves, *lists, block_m=32, block_n=32)[output].sin().sum()
    used = leaves[: 3 - output]  # v does not reach lse
    for a, b in zip(torch.autograd.grad(got, used), torch.autograd.grad(want, used), strict=True):
        assert error(a, b) < 1e-12


def test_segment_strength_weighs_keys(error):
    """A bias of ln s multiplies the weight of a segment's keys by s before the softmax is normalised."""
    q, k, v = torch.randn(3, 1, 1, 30, 16)
    segments = (torch.arange(30) >= 20).int()
    out, _ = m.reference(q, k, v, *m.full_lists(1, 1), segments=segments, segment_bias=torch.tensor([0, 0.4]).log())
    assert error(out, sdpa(q[:, :, :], k[:, :, 20:], v[:, :, 20:])) < 2e-6
    out, _ = m.reference(q, k, v, *m.full_lists(1, 1), segments=segments, segment_bias=torch.tensor([1, 0.4]).log())
    weights = (q @ k.transpose(2, 3) / 4).exp() * torch.where(segments == 1, 0.4, 1.0)
    assert error(out, weights / weights.sum(-1, True) @ v) < 2e-6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.update(k=a["k"][:, :, :-1]), "do not fit"),
        (lambda a: a.update(v=a["v"].half()), "one float dtype"),
        (lambda a: a.update(idx=a["idx"][:, :, :1]), "must hold 2 rows"),
        (lambda a: a.update(idx=a["idx"].flip(-1)), "ascend"),
        (lambda a: a.update(idx=torch.zeros_like(a["idx"])), "ascend"),
        (lambda a: a.update(idx=a["idx"] + 1), "outside 0..1"),
        (lambda a: a.update(cnt=a["cnt"] + 1), "more than 2"),
        (lambda a: a.update(rule="disc"), "circle"),
        (lambda a: a.update(rule="circle", mode=torch.ones_like(a["idx"])), "query_coords"),
        (lambda a: a.update(key_log_weight=torch.zeros(3)), r"must be \[100\]"),
        (lambda a: a.update(segments=torch.zeros(100).int()), "needs both"),
        (lambda a: a.update(segments=torch.zeros(99).int(), segment_bias=torch.zeros(2)), r"segments \[100\]"),
        (lambda a: a.update(segments=torch.zeros(100).int(), segment_bias=torch.zeros(3, 2)), r"\[S\] or \[1, S\]"),
        (lambda a: a.update(row_factor=torch.ones(1, 1, 99)), r"must be \[1, 1, 100\]"),
        (lambda a: a.update(residual=torch.ones(1, 1, 100, 8)), r"must be \[1, 1, 100, 16\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, words):
    idx, cnt = m.full_lists(2, 2)
    inputs = {"q": torch.randn(1, 1, 100, 16), "k": torch.randn(1, 1, 100, 16), "v": torch.randn(1, 1, 100, 16)}
    inputs |= {"idx": idx, "cnt": cnt}
    change(inputs)
    with pytest.raises(ValueError, match=words):
        m.block_sparse(**inputs)


def test_example_is_one_tenth_dense(error):
    q, k, v, idx, cnt = m.example(1280, "cpu", torch.float32)
    out, _ = m.block_sparse(q, k, v, idx, cnt)
    assert error(out, exact(q, k, v, expand(idx, cnt, (64, 64), (1280, 1280)))[0]) < 2e-6
    assert cnt.float().mean() / idx.shape[2] == 0.1
