import inspect

import pytest
import torch
from hierarchical_helper import OPTIONS, exact, make

from tessera.kernels.attention import _hierarchical_launch as launches
from tessera.kernels.attention import _hierarchical_reference as plain
from tessera.kernels.attention import hierarchical_sparse as m

SHAPES = [  # B, H, Hkv, N, D, block, levels, entries of a list
    (1, 1, 1, 1, 8, 16, 1, 2),  # one token
    (2, 1, 1, 83, 72, 16, 1, 3),  # head 64 + 16, tails
    (1, 2, 1, 275, 16, 16, 2, 3),  # grouped heads, a parent that ends after two children
    (1, 1, 1, 272, 40, 16, 3, 2),  # three levels, one node on the coarsest
    (1, 1, 1, 210, 112, 48, 1, 2),  # blocks that are no power of two, tiles across their borders
    (1, 2, 2, 130, 96, 64, 1, 2),  # a block as wide as the tile
]
ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}  # the interpreter truncates to bf16
LSE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # absolute
GRADIENT = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SERVES = [m.launch, m.reference]
NAMES = ["kernel", "reference"]


def agree(got, want, error, dtype=torch.float32):
    out, lse = got
    assert out.dtype == dtype and error(out, want[0]) < ERROR[dtype]
    assert torch.equal(lse.isneginf(), want[1].isneginf())
    assert (lse.double() - want[1])[~lse.isneginf()].abs().max() < LSE[dtype]


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_explicit_matrix(shape, serve, device, error):
    inputs = make(shape, device)
    got = serve(*inputs)
    agree(got, exact(*inputs), error)
    assert got[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_options(shape, options, serve, device, error):
    inputs = make(shape, device)
    agree(serve(*inputs, 0.3, *options), exact(*inputs, 0.3, *options), error)


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision(dtype, serve, device, error):
    inputs = make(SHAPES[2], device, dtype)
    agree(serve(*inputs), exact(*inputs), error, dtype)


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
def test_empty_lists_give_zero_where_nothing_is_seen(serve, device):
    inputs = list(make((1, 2, 2, 70, 16, 16, 1, 3), device))
    inputs[6] = inputs[6].clone()
    inputs[6][:, :, 1] = 0
    out, lse = serve(*inputs, None, False)
    assert (out[:, :, 16:32] == 0).all() and lse[:, :, 16:32].isneginf().all()
    assert lse[:, :, :16].isfinite().all() and lse[:, :, 32:].isfinite().all() and out.isfinite().all()
    grads = (m.launch_backward if serve is m.launch else m.reference_backward)(
        torch.ones_like(out), torch.zeros_like(lse), *inputs[:7], out, lse, 16, 1, None, False, True, False
    )
    assert all(g.isfinite().all() for g in grads) and (grads[0][:, :, 16:32] == 0).all()


def gradients(serve, inputs, options, grad_out, grad_lse):
    """Of the op's inputs, through launch/launch_backward or both references."""
    out, lse = serve(*inputs, None, *options)
    backward = m.launch_backward if serve is m.launch else m.reference_backward
    return backward(grad_out, grad_lse, *inputs[:7], out, lse, *inputs[7:], None, *options)


def exact_gradients(inputs, options, grad_out, grad_lse):
    leaves = [x.double().requires_grad_() for x in inputs[:5]]
    out, lse = exact(*leaves, *inputs[5:], None, *options)
    return torch.autograd.grad([out, lse], leaves, [grad_out.double(), grad_lse.double()], materialize_grads=True)


def check_gradients(shape, options, serve, device, error, dtype=torch.float32):
    inputs = make(shape, device, dtype)
    grad_out = torch.randn(*inputs[0].transpose(1, 2).shape, device=device).to(dtype).transpose(1, 2)
    grad_lse = torch.randn(inputs[0].shape[:3], device=device)
    got = gradients(serve, inputs, options, grad_out, grad_lse)
    want = exact_gradients(inputs, options, grad_out, grad_lse)
    for name, g, w, x in zip(("q", "k", "v", "kc", "vc"), got, want, inputs, strict=False):
        assert g.dtype == dtype and g.shape == x.shape and g.is_contiguous()
        if w.abs().max() < 1e-12:
            assert g.abs().max() < 1e-5, name
        else:
            assert error(g, w) < GRADIENT[dtype], name


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape, serve, device, error):
    check_gradients(shape, OPTIONS[0], serve, device, error)


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_gradients_of_options(options, serve, device, error):
    check_gradients((1, 1, 1, 260, 16, 16, 2, 2), options, serve, device, error)


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_in_low_precision(dtype, serve, device, error):
    check_gradients((1, 2, 1, 83, 16, 16, 1, 3), OPTIONS[0], serve, device, error, dtype)


def test_queries_of_the_coarsest_level_in_parts(device, error, monkeypatch):
    monkeypatch.setattr(launches, "LEAST_PART", 64)
    check_gradients((1, 1, 1, 260, 16, 16, 2, 2), OPTIONS[1], m.launch, device, error)


def test_pieces_of_the_reference(device, error, monkeypatch):
    monkeypatch.setattr(plain, "GATHER_BYTES", 1 << 14)
    monkeypatch.setattr(plain, "SCORES", 1 << 11)
    for shape in SHAPES[1:4]:
        check_gradients(shape, OPTIONS[1], m.reference, device, error)
        inputs = make(shape, device)
        agree(m.reference(*inputs), exact(*inputs), error)


@pytest.mark.parametrize(("dtype", "d"), [(torch.float64, 16), (torch.float32, 144)])
def test_launcher_hands_what_it_cannot_take_to_the_reference(dtype, d, device, error):
    inputs = make((1, 1, 1, 50, d, 16, 1, 2), device, dtype)
    out, lse = m.launch(*inputs)
    want = exact(*inputs)
    assert out.dtype == dtype and lse.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert error(out, want[0]) < (1e-12 if dtype == torch.float64 else 2e-6)
    grads = m.launch_backward(out, lse, *inputs[:7], out, lse, 16, 1, None, True, True, False)
    assert error(grads[0], exact_gradients(inputs, OPTIONS[0], out, lse)[0]) < 5e-6


def test_custom_op():
    inputs = list(make(SHAPES[1], "cpu"))
    inputs[:5] = [x.requires_grad_() for x in inputs[:5]]
    torch.library.opcheck(m.hierarchical_sparse, tuple(inputs))
    out, lse = m.hierarchical_sparse(*inputs)
    backward = (out.detach(), lse.detach(), *(x.detach() for x in inputs[:7]), out.detach(), lse.detach(), *inputs[7:])
    torch.library.opcheck(m.hierarchical_sparse_backward, (*backward, None, True, True, True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.update(k=a["k"][:, :, :-1]), "do not fit"),
        (lambda a: a.update(kc=a["kc"][:, :, :-1]), "all 1 levels of 83"),
        (lambda a: a.update(levels=2), "all 2 levels of 83"),
        (lambda a: a.update(v=a["v"].half()), "one float dtype"),
        (lambda a: a.update(idx=a["idx"][:, :, 1:]), "must have"),
        (lambda a: a.update(idx=a["idx"].flip(-1), cnt=a["cnt"] * 0 + 3), "ascend"),
        (lambda a: a.update(idx=a["idx"] + 6), "outside 0..5"),
        (lambda a: a.update(cnt=a["cnt"] + 3), "more than 3"),
        (lambda a: a.update(block=24), "multiple of 16"),
        (lambda a: a.update(levels=4), "levels 1 to 3"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, words):
    names = ("q", "k", "v", "kc", "vc", "idx", "cnt", "block", "levels")
    inputs = dict(zip(names, make(SHAPES[1], "cpu"), strict=True))
    change(inputs)
    with pytest.raises(ValueError, match=words):
        m.hierarchical_sparse(**inputs)


def test_example_and_specs(device, error):
    inputs = m.example(600, device, torch.float32)
    assert error(m.hierarchical_sparse(*inputs)[0], exact(*inputs)[0]) < 2e-6
    assert m.example(4200, device, torch.float16)[8] == 2
    for spec in launches.aot_specs():
        kernel = getattr(launches, spec["kernel"])
        assert {*spec["args"], *spec["const"]} == set(inspect.signature(kernel.fn).parameters)
