import pytest
import torch
from torch.nn import functional

from tessera.kernels.conv import depthwise_conv as m

ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # the interpreter truncates to bf16
SERVES = [m.launch, m.reference]
NAMES = ["kernel", "reference"]
CASES = [  # B, H, W, C, K, activation, glu
    (1, 1, 1, 2, 3, "none", False),
    (2, 5, 9, 70, 3, "silu", True),
    (1, 7, 5, 66, 5, "gelu", False),
    (1, 3, 40, 24, 5, "gelu", True),
    (1, 4, 6, 10, 3, "gelu_tanh", True),
]


def make(case, device, dtype=torch.float32, biased=True):
    b, h, w, c, k = case[:5]
    x = torch.randn(b, h * w, c + 3, device=device).to(dtype)[..., 3:]  # a slice of a wider row
    weight, bias = (torch.randn(s, device=device).to(dtype) for s in ((c, k, k), (c,)))
    return x, weight, bias if biased else None, [h, w], *case[5:]


def exact(x, weight, bias, grid, activation="none", glu=False):
    """fp64, one shifted product for each tap."""
    (h, w), k, r = grid, weight.shape[1], weight.shape[1] // 2
    rows = functional.pad(x.double().unflatten(1, grid), (0, 0, r, r, r, r))
    p = sum(weight[:, i, j].double() * rows[:, i : i + h, j : j + w] for i in range(k) for j in range(k)).flatten(1, 2)
    p = p if bias is None else p + bias.double()
    a, g = p.chunk(2, 2) if glu else (1.0, p)
    acts = {"none": lambda t: t, "silu": functional.silu, "gelu": functional.gelu}
    return a * {**acts, "gelu_tanh": lambda t: functional.gelu(t, approximate="tanh")}[activation](g)


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_sum_over_taps(case, dtype, serve, device, error):
    given = make(case, device, dtype)
    got, want = serve(*given), exact(*given)
    assert got.dtype == dtype and got.shape == want.shape and got.is_contiguous()
    assert error(got, want) < ERROR[dtype]


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_without_bias(serve, device, error):
    given = make(CASES[2], device, biased=False)
    assert error(serve(*given), exact(*given)) < 2e-6


@pytest.mark.parametrize("serve", ["kernel", "reference"])
@pytest.mark.parametrize("case", [*CASES[1:3], CASES[4], (1, 4, 6, 8, 3, "none", False)], ids=str)
def test_gradients(case, serve, device, error, monkeypatch):
    monkeypatch.setattr(m, "STEPS", 1)  # several splits
    given = make(case, device)
    rows = [x.detach().clone().requires_grad_() for x in given[:3]]
    weight = torch.randn_like(m.reference(*given))
    backward = m.launch_backward if serve == "kernel" else m.depthwise_conv_backward
    got = backward(weight, *given)
    doubled = [x.detach().double().requires_grad_() for x in given[:3]]
    wants = torch.autograd.grad((exact(*doubled, *given[3:]) * weight).sum(), doubled)
    ours = torch.autograd.grad((m.depthwise_conv(*rows, *given[3:]) * weight).sum(), rows)
    for a, b, want in zip(got, ours, wants, strict=True):
        assert error(a, want) < 5e-6 and error(b, want) < 5e-6


def test_double_stays_double(device, error):
    given = [x.double() if isinstance(x, torch.Tensor) else x for x in make(CASES[1], device)]
    assert error(m.launch(*given), exact(*given)) < 1e-13


def test_custom_op(device):
    x, *rest = make((1, 2, 3, 4, 3, "silu", True), device)
    torch.library.opcheck(m.depthwise_conv, (x.requires_grad_(), *rest))


def test_mismatches_are_named(device):
    x, weight, bias, grid, *_ = make(CASES[2], device)
    cases = [((x, weight, bias, [7, 6]), r"\[7, 6\]"), ((x, weight[:9], bias, grid), r"\[9, 5, 5\]")]
    cases += [((x, weight[:, :4, :4], bias, grid), "odd K"), ((x, weight, bias[:2], grid), r"\[2\]")]
    cases += [((x, weight, bias, grid, "tanh"), "tanh"), ((x.half(), weight, bias, grid), "float16")]
    cases += [((x[..., :1], weight[:1], None, grid, "silu", True), "even number")]
    for given, words in cases:
        for serve in SERVES:
            with pytest.raises(ValueError, match=words):
                serve(*given)


def test_example(device):
    got = m.launch(*m.example(2, device, torch.bfloat16))
    assert got.shape == (1, 2, 2880) and got.isfinite().all()
