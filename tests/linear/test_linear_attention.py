import pytest
import torch
from linear_helper import ERROR, NAMES, exact, tracks

from tessera.kernels.linear import linear_attention as m

SERVES = [m.launch, m.reference]
SHAPES = [  # B, H, Nq, Nk, D, E
    (1, 1, 1, 1, 8, 8),  # one token
    (2, 3, 70, 70, 72, 72),  # padded head, tails
    (1, 2, 33, 130, 112, 96),  # queries unlike keys, values unlike keys
    (1, 2, 64, 64, 64, 64),  # whole tiles
    (1, 1, 17, 20, 160, 200),  # several tiles of E, widest padding
    (1, 1, 270, 300, 16, 16),  # several steps of the reference
]
MAPS = ["relu", "elu1", "softmax", "hedgehog", "identity"]


def make(shape, device, dtype=torch.float32):
    """Views as a model's are: q token-major, k and v slices of one wider projection."""
    b, h, nq, nk, d, e = shape
    q = torch.randn(b, nq, h, d, device=device).to(dtype).transpose(1, 2)
    kv = torch.randn(b, nk, h, d + e, device=device).to(dtype).transpose(1, 2)
    return q, kv[..., :d], kv[..., d:]


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_quadratic_form(shape, dtype, serve, device, error):
    q, k, v = make(shape, device, dtype)
    out, _, state = serve(q, k, v, feature_map="elu1")
    want = exact(q, k, v, "elu1")
    assert out.dtype == dtype and out.shape == want.shape and error(out, want) < ERROR[dtype]
    assert state.shape == (*q.shape[:2], 1, shape[4] * (shape[5] + 1)) and state.dtype == torch.float32


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("normalizer", ["sum", "mean", "rms", "none"])
@pytest.mark.parametrize("feature_map", MAPS)
def test_maps_and_normalizers(feature_map, normalizer, serve, device, error):
    q, k, v = make((1, 2, 40, 50, 24, 40), device)
    if feature_map == "identity" and normalizer in ("sum", "mean"):
        q, k = q.abs(), k.abs()  # else the denominator may vanish
    got = serve(q, k, v, None, None, feature_map, normalizer, 1e-2)[0]
    assert error(got, exact(q, k, v, feature_map, normalizer=normalizer, eps=1e-2)) < 2e-6


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotated_features_stand_in_the_numerator_only(dtype, serve, device, error):
    q, k, v = make(SHAPES[2], device, dtype)
    q_rot, k_rot = tracks(q), tracks(k)
    got = serve(q, k, v, q_rot, k_rot, "relu", "sum", 1e-15)[0]
    assert error(got, exact(q, k, v, "relu", q_rot=q_rot, k_rot=k_rot, eps=1e-15)) < ERROR[dtype]
    both = exact(q, k, v, "relu", q_rot=q_rot, k_rot=k_rot, eps=1e-15, rotate_mass=True)
    assert error(got, both) > 1e-2


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_unrotated_tracks_change_nothing(serve, device, error):
    q, k, v = make(SHAPES[2], device)
    assert error(serve(q, k, v, q.relu(), k.relu(), "relu")[0], serve(q, k, v, None, None, "relu")[0]) < 1e-6


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("eps", [0.0, 1e-15])
def test_a_query_without_features_gives_zero(serve, eps, device):
    q, k, v = make(SHAPES[3], device)
    q = q.clone()
    q[:, :, 5:9] = -1.0
    out = serve(q, k, v, None, None, "relu", "sum", eps)[0]
    assert (out[:, :, 5:9] == 0).all() and out.isfinite().all()


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_state_is_the_sum_over_keys(serve, device, error):
    q, k, v = make(SHAPES[1], device)
    state = serve(q, k, v, None, None, "relu")[2][:, :, 0]
    f = k.double().relu()
    assert error(state[..., : 72 * 72].unflatten(-1, (72, 72)), f.transpose(2, 3) @ v.double()) < 1e-6
    assert error(state[..., 72 * 72 :], f.sum(2)) < 1e-6


def test_many_pieces_of_keys(device, error, monkeypatch):
    monkeypatch.setattr(m._launch, "PIECE", 32)
    q, k, v = make(SHAPES[2], device)
    assert error(m.launch(q, k, v)[0], exact(q, k, v, "relu")) < 2e-6


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("normalizer", ["sum", "mean", "rms"])
def test_fp16_stays_finite_where_sums_leave_its_range(serve, normalizer, device, error):
    q, k, v = make((1, 1, 40, 300, 32, 32), device, torch.float16)
    q, k, v = q * 30, k * 30, v.abs() * 30
    out = serve(q, k, v, None, None, "relu", normalizer, 1e-4)[0]
    assert error(out, exact(q, k, v, "relu", normalizer=normalizer, eps=1e-4)) < 1e-3


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_order_of_keys_does_not_matter(serve, device, error):
    q, k, v = make(SHAPES[1], device)
    order = torch.randperm(70, device=device)
    assert error(serve(q, k[:, :, order], v[:, :, order])[0], serve(q, k, v)[0]) < 1e-5


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_rms_ignores_the_scale_of_values(serve, device, error):
    q, k, v = make(SHAPES[1], device)
    a, b = (serve(q, k, x, None, None, "elu1", "rms", 1e-6)[0] for x in (v, 7 * v))
    assert error(b, a) < 1e-4


def gradients(call, given, weights):
    given = [x.detach().requires_grad_() for x in given]
    out, state = call(*given)
    loss = (out.double() * weights[0]).sum() + (state.double() * weights[1]).sum()
    return torch.autograd.grad(loss, given, materialize_grads=True)


@pytest.mark.parametrize("serve", ["kernel", "reference"])
@pytest.mark.parametrize(
    "feature_map, normalizer, dual",
    [(name, "sum", False) for name in MAPS]
    + [("elu1", "mean", False), ("relu", "rms", False), ("hedgehog", "none", False)]
    + [("relu", "sum", True), ("softmax", "rms", True), ("identity", "none", True)],
)
def test_gradients(feature_map, normalizer, dual, serve, device, error, on_kernels):
    on_kernels(serve)
    q, k, v = make((1, 2, 35, 50, 24, 40), device)
    if feature_map == "identity":
        q, k = q.abs() + 0.1, k.abs() + 0.1
    given = [q, k, v, *((torch.randn_like(q), torch.randn_like(k)) if dual else ())]
    features = 48 if feature_map == "hedgehog" else 24
    weights = torch.randn(1, 2, 35, 40, device=device), 1e-3 * torch.randn(1, 2, features * 41, device=device)

    def ours(q, k, v, *rot):
        out, _, state = m.linear_attention(q, k, v, *(rot or (None, None)), feature_map, normalizer, 1e-2)
        return out, state[:, :, 0]

    def brute(q, k, v, *rot):
        pair = dict(zip(("q_rot", "k_rot"), rot, strict=False))
        return exact(q, k, v, feature_map, normalizer=normalizer, eps=1e-2, state=True, **pair)

    wants = gradients(brute, [x.double() for x in given], weights)
    for got, want, x in zip(gradients(ours, given, weights), wants, given, strict=True):
        assert got.dtype == x.dtype and error(got, want) < 5e-6


@pytest.mark.parametrize("serve", ["kernel", "reference"])
@pytest.mark.parametrize("dtype, bound", [(torch.float16, 4e-3), (torch.bfloat16, 2.5e-2)], ids=str)
@pytest.mark.parametrize("feature_map", ["relu", "softmax"])
def test_low_precision_gradients(feature_map, dtype, bound, serve, device, error, on_kernels):
    on_kernels(serve)
    q, k, v = make((1, 1, 70, 70, 72, 72), device, dtype)
    weights = torch.randn(1, 1, 70, 72, device=device).to(dtype), torch.zeros((), device=device)
    got = gradients(lambda *x: m.linear_attention(*x, None, None, feature_map)[::2], [q, k, v], weights)
    want = gradients(lambda *x: exact(*x, feature_map, eps=1e-6, state=True), [x.double() for x in (q, k, v)], weights)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype and error(a, b) < bound


def test_projection_of_hedgehog_features(device, error):
    q, k, v = make((1, 2, 20, 30, 16, 16), device)
    wq, wk = torch.randn(2, 2, 16, 24, device=device)
    got = m.linear_attention(m.projected(q, wq), m.projected(k, wk), v, None, None, "hedgehog", "sum", 0.0)[0]
    u, w = (torch.einsum("bhnd,hde->bhne", x.double(), y.double()) for x, y in ((q, wq), (k, wk)))
    assert error(got, exact(u, w, v, "hedgehog", eps=0.0)) < 2e-6
    with pytest.raises(ValueError, match=r"must be \[2, 16, D'\]"):
        m.projected(q, wq[:1])


def test_wide_heads_and_double_take_the_reference(device, error):
    q, k, v = make((1, 2, 20, 30, 288, 288), device)
    assert error(m.launch(q, k, v)[0], exact(q, k, v, "relu")) < 2e-6
    q, k, v = (x.double() for x in (q, k, v))
    got = m.launch(q, k, v)[0]
    assert got.dtype == torch.float64 and error(got, exact(q, k, v, "relu")) < 1e-13


def test_transposed_rows(device, error):
    q, k, v = (torch.randn(1, 2, 16, 40, device=device).transpose(2, 3) for _ in range(3))  # last axis not dense
    assert error(m.launch(q, k, v)[0], exact(q, k, v, "relu")) < 2e-6


def test_custom_op(device):
    q, k, v = (x.requires_grad_() for x in make((1, 2, 5, 7, 8, 6), device))
    torch.library.opcheck(m.linear_attention, (q, k, v))
    torch.library.opcheck(m.linear_attention, (q, k, v, *(x.detach().relu() for x in (q, k)), "relu", "rms"))


def test_mismatches_are_named(device):
    q, k, v = make((1, 2, 5, 7, 8, 6), device)
    cases = [((q, k[:, :1], v), r"\[1, 1, 7, 8\]"), ((q, k, v[:, :, :3]), r"\[1, 2, 3, 6\]")]
    cases += [((q, k.half(), v), "float16"), ((q, k, v, q), "belong together"), ((q[:, :, :0], k, v), "not be empty")]
    cases += [((q, k, v, q[..., :4], k), r"\[1, 2, 5, 4\]"), ((q, k, v, q, k, "hedgehog"), "cannot be rotated")]
    cases += [((q, k, v, None, None, "gelu"), "gelu"), ((q, k, v, None, None, "relu", "max"), "max")]
    for given, words in cases:
        for serve in SERVES:
            with pytest.raises(ValueError, match=words):
                serve(*given)


def test_example(device):
    got = m.launch(*m.example(3, device, torch.bfloat16))
    assert got[0].shape == (1, 20, 3, 112) and all(x.isfinite().all() for x in got)
