import math

import pytest
import torch

from tessera.kernels.attention import segment_bias as m

ERROR = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}  # the interpreter truncates to bf16
SERVES = [m.launch, m.reference]
NAMES = ["kernel", "reference"]
OUT = -math.inf
CASES = [  # B, H, Hkv, N, ends of the segments, D, bias of each row
    (1, 1, 1, 1, [1], 8, [[0.0]]),  # one token
    (2, 2, 2, 37, [37, 40, 85], 72, [[0.0, 0.0, 0.7], [0.0, OUT, -1.5]]),  # head 64 + 16; rows that differ
    (1, 4, 2, 70, [33, 33, 90, 107], 112, [[OUT, 3.0, -0.3, 0.0]]),  # shared heads, an empty segment
    (2, 2, 1, 5, [1, 2, 3, 4, 5, 6, 7, 40, 81], 16, [[0.0] * 9, [OUT, 0.5] * 4 + [1.0]]),  # as many as there can be
]
EIGHT = [  # keys of the case's k: what follows is appended
    (1, 0),
    (1, 40),
    (2, 90),
    (3, 4),
]


def make(case, device, dtype=torch.float32):
    b, h, kv, n, ends, d, bias = case
    q = torch.randn(b, n, h, d, device=device).to(dtype).transpose(1, 2)  # token-major, as ComfyUI's views are
    k = torch.randn(b, ends[-1], 2, kv, d, device=device).to(dtype)[:, :, 0].transpose(1, 2)  # of a packed projection
    v = torch.randn(b, kv, ends[-1], d, device=device).to(dtype)  # other strides than k's
    return q, k, v, ends, torch.tensor(bias, device=device)


def appended(case, keys, device, dtype=torch.float32):
    """The columns from `keys` on as e4m3, and the inputs whose k and v are what those numbers stand for."""
    q, k, v, ends, bias = make(case, device, dtype)
    k = k * torch.linspace(0.5, 8, k.shape[1], device=device)[:, None, None].to(dtype)  # heads of unlike size
    eight = m.Appended.of(k[:, :, keys:], v[:, :, keys:])
    wide = [
        torch.cat((x[:, :, :keys].double(), x8.double() * scale.double()[..., None, None]), 2)
        for x, x8, scale in ((k, eight.k8, eight.k_scale), (v, eight.v8, eight.v_scale))
    ]
    return (q, k[:, :, :keys], v[:, :, :keys], ends, bias, None, *eight), (q, *wide, ends, bias)


def exact(q, k, v, ends, bias, scale=None):
    """fp64 over an explicit mask of queries and keys."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    added = torch.empty(q.shape[0], k.shape[2], dtype=torch.double, device=q.device)
    for i, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):
        added[:, start:stop] = bias[:, i, None]
    score = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale) + added[:, None, None]
    return score.softmax(-1).nan_to_num(0.0) @ v


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_attention_over_a_mask(case, dtype, serve, device, error):
    given = make(case, device, dtype)
    got, want = serve(*given), exact(*given)
    assert got.dtype == dtype and got.shape == want.shape and got.transpose(1, 2).is_contiguous()
    assert error(got, want) < ERROR[dtype]


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("number, keys", EIGHT)
def test_appended_keys_of_eight_bits(number, keys, dtype, serve, device, error):
    given, wide = appended(CASES[number], keys, device, dtype)
    assert error(serve(*given), exact(*wide)) < ERROR[dtype]


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_number_of_e4m3_is_read_right(dtype, serve, device):
    """A row of the batch for each, with one key: subnormals, both signs, zero and 448."""
    bits = torch.tensor([i for i in range(256) if i % 128 != 127], dtype=torch.uint8, device=device)
    v8 = bits.view(torch.float8_e4m3fn)[:, None, None, None].expand(-1, 1, 1, 16)
    q, one = torch.randn(254, 1, 1, 16, device=device).to(dtype), torch.ones(254, 1, device=device)
    got = serve(q, q[:, :, :0], q[:, :, :0], [1], one * 0, None, v8, v8, one, one * 2)
    assert torch.equal(got.float(), v8.float() * 2)


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_a_segment_left_out_is_as_if_it_were_not_there(serve, device):
    """Bit for bit, whatever it holds: the picture of strength 0 is the base model's."""
    q, k, v, *_ = make((2, 2, 2, 37, [85], 72, [[0.0]] * 2), device)
    k[:, :, 40:], v[:, :, 40:] = math.nan, math.nan
    zero = torch.zeros(2, 2, device=device)
    got = serve(q, k, v, [40, 85], zero + torch.tensor([0.0, OUT], device=device))
    assert torch.equal(got, serve(q, k[:, :, :40], v[:, :, :40], [40], zero[:, :1]))


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_what_sees_nothing_is_zero(serve, device):
    q, k, v, ends, _ = make(CASES[1], device)
    got = serve(q, k, v, ends, torch.tensor([[OUT] * 3, [0.0, OUT, OUT]], device=device))
    assert (got[0] == 0).all() and (got[1] != 0).all()
    assert (serve(q, k[:, :, :0], v[:, :, :0], [0], torch.zeros(2, 1, device=device)) == 0).all()


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_scale(serve, device, error):
    given = make(CASES[2], device)
    assert error(serve(*given, 0.3), exact(*given, 0.3)) < 3e-6


@pytest.mark.parametrize("number", [1, 2, 3])
def test_gradients(number, device, error, monkeypatch):
    monkeypatch.setattr(m, "SCORES", 4 * 2 * 4 * 107 * 3)  # a few queries at once
    given = make(CASES[number], device)
    found, weight = [], torch.randn_like(given[0])
    for fn, kind in ((m.segment_bias, torch.float32), (exact, torch.float64)):
        q, k, v = (x.detach().to(kind).requires_grad_() for x in given[:3])
        bias = given[4].detach().clone().requires_grad_()
        found.append(torch.autograd.grad((fn(q, k, v, given[3], bias) * weight).sum(), (q, k, v, bias)))
    for got, want in zip(*found, strict=True):
        assert got.shape == want.shape and error(got, want.nan_to_num(0.0)) < 1e-5


def test_gradients_beside_appended_keys(device, error):
    given, wide = appended(CASES[1], 40, device)
    q, k, v = (x.detach().clone().requires_grad_() for x in given[:3])
    weight = torch.randn_like(q)
    got = torch.autograd.grad((m.segment_bias(q, k, v, *given[3:]) * weight).sum(), (q, k, v))
    doubled = [x.detach().double().requires_grad_() for x in wide[:3]]
    want = torch.autograd.grad((exact(*doubled, *wide[3:]) * weight).sum(), doubled)
    for ours, theirs, keys in zip(got, want, (37, 40, 40), strict=True):
        assert error(ours, theirs[:, :, :keys]) < 1e-5


def test_double_stays_double(device, error):
    given = [x.double() if i < 3 else x for i, x in enumerate(make(CASES[1], device))]
    assert error(m.launch(*given), exact(*given)) < 1e-13


def test_custom_op(device):
    q, *rest = make(CASES[1], device)
    torch.library.opcheck(m.segment_bias, (q.requires_grad_(), *rest))
    (q, *rest), _ = appended(CASES[1], 40, device)
    checks = (
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )  # the schema's cannot have e4m3
    torch.library.opcheck(m.segment_bias, (q.detach().requires_grad_(), *rest), test_utils=checks)


def test_mismatches_are_named(device):
    q, k, v, ends, bias = make(CASES[1], device)
    (*_, k8, v8, k_scale, v_scale), _ = appended(CASES[1], 40, device)
    short = k[:, :, :40], v[:, :, :40]
    cases = [((q, k[..., :8], v, ends, bias), r"\[2, 2, 85, 8\]"), ((q, k, v.half(), ends, bias), "float16")]
    cases += [((q, k, v, [37, 30, 85], bias), "ascending"), ((q, k, v, [37, 40, 84], bias), "the last one 85")]
    cases += [((q, k, v, [85] * 10, bias), "1 to 9"), ((q, k, v, ends, bias[:1]), r"\[2, 3\]")]
    cases += [((q, k, v, ends, bias.double()), "float64"), ((q[:, :1], k, v, ends, bias), "no multiple of the 2")]
    cases += [
        ((q, *short, ends, bias, None, k8), "need all of"),
        ((q, *short, ends, bias, None, k, v, k_scale, v_scale), "e4m3"),
    ]
    cases += [((q, *short, [37, 41, 85], bias, None, k8, v8, k_scale, v_scale), "one must end at 40")]
    cases += [((q, *short, ends, bias, None, k8, v8, k_scale[0], v_scale), r"\[2\] torch.float32")]
    for given, words in cases:
        for serve in SERVES:
            with pytest.raises(ValueError, match=words):
                serve(*given)


def test_example(device):
    got = m.launch(*m.example(3, device, torch.bfloat16))
    assert got.shape == (1, 8, 3, 128) and got.isfinite().all()


def test_fp64_decodes_appended_keys_in_fp64(device, error):
    given, wide = appended(CASES[2], 90, device, torch.float64)
    assert error(m.reference(*given), exact(*wide)) < 1e-13
