import pytest
import torch
from linear_helper import ERROR, NAMES, exact, tracks

from tessera.kernels.linear import block_causal as m
from tessera.kernels.linear import linear_attention

SERVES = [m.launch, m.reference]
CASES = [  # B, H, D, E, bounds
    (1, 1, 8, 8, [0, 1]),  # one token
    (2, 1, 72, 72, [0, 33, 49, 65]),
    (1, 2, 64, 64, [0, 64, 128]),  # whole tiles
    (1, 2, 112, 40, [0, 1, 2, 90, 97]),  # chunks of one token
]


def make(case, device, dtype=torch.float32):
    b, h, d, e, bounds = case
    q, k = (torch.randn(b, bounds[-1], h, d, device=device).to(dtype).transpose(1, 2) for _ in range(2))
    return q, k, torch.randn(b, h, bounds[-1], e, device=device).to(dtype)


def visible(bounds, device="cpu"):
    """Pairs [N, N] that see each other."""
    chunk = torch.bucketize(
        torch.arange(bounds[-1], device=device), torch.tensor(bounds[1:], device=device), right=True
    )
    return (chunk[:, None] >= chunk[None, :]).double()


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_masked_quadratic_form(case, dtype, serve, device, error):
    q, k, v = make(case, device, dtype)
    out, _, states = serve(q, k, v, case[4], feature_map="elu1")
    want = exact(q, k, v, "elu1", mask=visible(case[4], device))
    assert out.dtype == dtype and out.shape == want.shape and error(out, want) < ERROR[dtype]
    assert states.shape == (*q.shape[:2], len(case[4]) - 1, case[2] * (case[3] + 1))


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("normalizer", ["sum", "rms", "none"])
@pytest.mark.parametrize("feature_map", ["relu", "softmax", "hedgehog", "identity"])
def test_maps_and_normalizers(feature_map, normalizer, serve, device, error):
    bounds = [0, 21, 22, 40]
    q, k, v = make((1, 2, 24, 40, bounds), device)
    if feature_map == "identity":
        q, k = q.abs(), k.abs()
    got = serve(q, k, v, bounds, None, None, None, feature_map, normalizer, 1e-2)[0]
    mask = visible(bounds, device)
    assert error(got, exact(q, k, v, feature_map, normalizer=normalizer, eps=1e-2, mask=mask)) < 2e-6


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_rotated_features_stand_in_the_numerator_only(serve, device, error):
    q, k, v = make(CASES[3], device)
    q, k = q.abs(), k.abs()  # every query shares features with its first chunk of one token
    q_rot, k_rot = tracks(q), tracks(k)
    got = serve(q, k, v, CASES[3][4], None, q_rot, k_rot, "relu", "sum", 1e-15)[0]
    mask = visible(CASES[3][4], device)
    assert error(got, exact(q, k, v, "relu", q_rot=q_rot, k_rot=k_rot, eps=1e-15, mask=mask)) < 2e-6


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_continued_clip_is_bit_equal(dtype, serve, device, monkeypatch):
    monkeypatch.setattr(linear_attention._launch, "PIECE", 48)  # several pieces in a chunk
    bounds = [0, 70, 130, 190, 250]
    q, k, v = make((1, 2, 40, 40, bounds), device, dtype)
    q_rot, k_rot = tracks(q), tracks(k)
    whole, _, states = serve(q, k, v, bounds, None, q_rot, k_rot)
    state, parts = None, []
    for cut in ([0, 70, 130], [130, 190], [190, 250]):
        piece = [x[:, :, cut[0] : cut[-1]] for x in (q, k, v, q_rot, k_rot)]
        out, _, got = serve(*piece[:3], [n - cut[0] for n in cut], state, *piece[3:])
        state = got[:, :, -1].clone()
        parts.append(out)
    assert torch.equal(torch.cat(parts, 2), whole) and torch.equal(state, states[:, :, -1])


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_one_chunk_is_linear_attention(serve, device):
    q, k, v = make((1, 2, 32, 32, [0, 90]), device)
    other = linear_attention.launch if serve is m.launch else linear_attention.reference
    assert torch.equal(serve(q, k, v, [0, 90])[0], other(q, k, v)[0])


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_later_chunks_change_nothing_earlier(serve, device):
    q, k, v = make(CASES[1], device)
    first = serve(q, k, v, CASES[1][4])[0]
    k[:, :, 50:] = 100.0
    second = serve(q, k, v, CASES[1][4])[0]
    assert torch.equal(first[:, :, :49], second[:, :, :49]) and not torch.equal(first[:, :, 49:], second[:, :, 49:])


def gradients(call, given, weights):
    given = [x.detach().requires_grad_() for x in given]
    loss = sum((x.double() * w).sum() for x, w in zip(call(*given), weights, strict=True))
    return torch.autograd.grad(loss, given, materialize_grads=True)


@pytest.mark.parametrize("serve", ["kernel", "reference"])
@pytest.mark.parametrize("normalizer, dual", [("sum", False), ("sum", True), ("rms", True), ("none", False)])
def test_gradients(normalizer, dual, serve, device, error, on_kernels):
    """Of every input, through the outputs and the states of two chunks, with a state coming in."""
    on_kernels(serve)
    bounds = [0, 21, 40, 55]
    q, k, v = make((1, 2, 24, 16, bounds), device)
    state = torch.rand(1, 2, 24 * 17, device=device)
    given = [q, k, v, state, *((torch.randn_like(q), torch.randn_like(k)) if dual else ())]
    weights = [torch.randn(1, 2, 55, 16, device=device)]
    weights += [1e-2 * torch.randn(1, 2, 24 * 17, device=device) for _ in range(2)]

    def ours(q, k, v, state, *rot):
        got = m.block_causal(q, k, v, bounds, state, *(rot or (None, None)), "elu1", normalizer, 1e-2)
        return got[0], got[2][:, :, 0], got[2][:, :, 2]

    def brute(q, k, v, state, *rot):
        a, b = (torch.where(x > 0, x + 1, x.clamp(max=0).exp()) for x in (q, k))
        c, d = rot or (a, b)
        mask = visible(bounds, q.device)
        sums, mass = state[..., : 24 * 16].unflatten(-1, (24, 16)), state[..., 24 * 16 :, None]
        y = (c @ d.transpose(2, 3) * mask) @ v + c @ sums
        if normalizer == "sum":
            y = y / ((a @ b.transpose(2, 3) * mask).sum(-1, keepdim=True) + a @ mass + 1e-2)
        if normalizer == "rms":
            y = y / (y.square().mean(-1, keepdim=True) + 1e-2).sqrt()
        ends = [
            state + torch.cat(((d[:, :, :n].transpose(2, 3) @ v[:, :, :n]).flatten(2), b[:, :, :n].sum(2)), -1)
            for n in (21, 55)
        ]
        return y, *ends

    wants = gradients(brute, [x.double() for x in given], weights)
    for got, want in zip(gradients(ours, given, weights), wants, strict=True):
        assert error(got, want) < 5e-6


def test_chunk_bounds():
    assert m.chunk_bounds(43, 10) == [0, 13, 23, 33, 43]
    assert m.chunk_bounds(7, 10, 3) == [0, 21]
    assert m.chunk_bounds(20, 10, 2) == [0, 20, 40]
    with pytest.raises(ValueError, match="0 frames"):
        m.chunk_bounds(0, 10)


def test_double_stays_double(device, error):
    q, k, v = (x.double() for x in make(CASES[1], device))
    got = m.launch(q, k, v, CASES[1][4])[0]
    assert error(got, exact(q, k, v, "relu", mask=visible(CASES[1][4], device))) < 1e-13


def test_custom_op(device):
    q, k, v = (x.requires_grad_() for x in make((1, 2, 8, 6, [0, 3, 7]), device))
    torch.library.opcheck(m.block_causal, (q, k, v, [0, 3, 7]))
    state = torch.rand(1, 2, 8 * 7, device=device, requires_grad=True)
    torch.library.opcheck(m.block_causal, (q, k, v, [0, 3, 7], state, *(x.detach().relu() for x in (q, k))))


def test_mismatches_are_named(device):
    q, k, v = make((1, 2, 8, 6, [0, 7]), device)
    state = torch.zeros(1, 2, 8 * 6, device=device)
    cases = [((q, k, v, bounds), "must ascend from 0 to the 7") for bounds in ([0], [0, 6], [1, 7], [0, 4, 4, 7])]
    cases += [((q, k, v, [0, 7], state), r"must be \[1, 2, 56\]"), ((q, k[:, :, :5], v[:, :, :5], [0, 7]), "5 keys")]
    cases += [((q, k, v, [0, 7], None, None, None, "relu", "mean"), "running state")]
    for given, words in cases:
        for serve in SERVES:
            with pytest.raises(ValueError, match=words):
                serve(*given)


def test_example(device):
    out, _, states = m.launch(*m.example(9, device, torch.bfloat16))
    assert out.shape == (1, 20, 9, 112) and states.shape[2] == 4 and out.isfinite().all()
