import pytest
import torch

from tessera.kernels.quant import rotate as m

ERROR = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CASES = [("sylvester", 2), ("sylvester", 32), ("sylvester", 128), ("regular", 4), ("regular", 16), ("regular", 64)]
CASES += [("regular", 256), ("sylvester", 1), ("regular", 1024)]
SERVE = pytest.mark.parametrize("serve", [m.launch, m.reference], ids=["kernel", "reference"])


def dense(kind, block):
    """The matrix, by its definition."""
    small = [[1.0, 1], [1, -1]] if kind == "sylvester" else (1 - 2 * torch.eye(4).flip(1)).tolist()
    small, h = torch.tensor(small).double(), torch.ones(1, 1).double()
    while len(h) < block:
        h = torch.kron(h, small)
    return h / block**0.5


def inputs(block, device, dtype=torch.float32):
    """Strided rows whose number of columns is no power of two, and signs."""
    k = 3 * block
    x = torch.randn(2, 5, 2, k, device=device).to(dtype)[:, :, 1]
    return x, torch.randint(0, 2, (k,), device=device).to(dtype) * 2 - 1


@SERVE
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize(("kind", "block"), CASES, ids=str)
def test_it_is_the_dense_matrix(kind, block, dtype, serve, device, error):
    x, signs = inputs(block, device, dtype)
    matrix = torch.block_diag(*[dense(kind, block)] * 3).to(device)
    for back in (False, True):
        got = serve(x, signs, block, kind, back)
        want = (x.double() @ matrix) * signs.double() if back else (x.double() * signs.double()) @ matrix
        assert got.dtype == dtype and got.is_contiguous() and error(got, want) < ERROR[dtype]
    assert error(serve(x, None, block, kind), x.double() @ matrix) < ERROR[dtype]


@SERVE
@pytest.mark.parametrize(("kind", "block"), CASES[:-1], ids=str)
def test_the_inverse_undoes_it(kind, block, serve, device, error):
    x, signs = inputs(block, device)
    assert error(serve(serve(x, signs, block, kind), signs, block, kind, True), x) < 1e-6


@pytest.mark.parametrize("block", [4, 16, 64, 256])
def test_the_regular_matrix_is_comfy_kitchens(block, error):
    ours = pytest.importorskip("comfy_kitchen.backends.eager.convrot_w4a4")
    assert torch.equal(ours._build_hadamard(block), dense("regular", block).float())
    x = torch.randn(7, 2 * block)
    assert error(m.launch(x, None, block), ours._rotate_activation(x, ours._build_hadamard(block), block)) < 1e-6


@SERVE
def test_equal_values_keep_their_size_in_a_regular_rotation_only(serve, device):
    x = torch.full((1, 256), 3.0, device=device)
    assert serve(x, None, 256, "regular").abs().max() == pytest.approx(3.0)
    assert serve(x, None, 256, "sylvester").abs().max() == pytest.approx(48.0)


@SERVE
@pytest.mark.parametrize("block", [1, 4, 16, 64])
def test_the_input_is_left_alone(block, serve, device):
    x = torch.randn(3, 64, device=device)
    before = x.clone()
    out = serve(x, None, block)
    assert torch.equal(x, before) and out.data_ptr() != x.data_ptr()


def test_double_wide_blocks_and_no_rows(device, error):
    x, signs = inputs(64, device, torch.float64)
    assert error(m.launch(m.launch(x, signs, 64), signs, 64, "regular", True), x) < 1e-14
    x = torch.randn(2, 8192, device=device)
    assert error(m.launch(m.launch(x, None, 8192, "sylvester"), None, 8192, "sylvester"), x) < 1e-6
    assert m.launch(x[:0], None, 64).shape == (0, 8192)


def test_custom_op_and_gradient(device, error):
    x, signs = inputs(16, device)
    torch.library.opcheck(m.rotate, (x.detach().requires_grad_(), signs, 16, "regular", True))
    x, g = x.detach().requires_grad_(), torch.randn(2, 5, 48, device=device)
    got = torch.autograd.grad(m.rotate(x, signs, 16), x, g)[0]
    want = torch.autograd.grad((x * signs).reshape(-1, 16) @ dense("regular", 16).float().to(device), x, g.view(-1, 16))
    assert error(got, want[0]) < 1e-6


@SERVE
def test_mismatches_are_named(serve, device):
    x = torch.randn(2, 96, device=device)
    for given, words in [
        ((None, 64), "Blocks of 64 do not divide 96"),
        ((None, 32), "4, 16, 64, 256 and so on, got 32"),
        ((None, 48, "sylvester"), "powers of two, got 48"),
        ((None, 0, "sylvester"), "got 0"),
        ((None, 16, "random"), "random"),
        ((torch.ones(95, device=device), 16), r"96 columns, and the signs are \[95\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            serve(x, *given)


def test_example(device):
    assert m.launch(*m.example(2, device, torch.bfloat16)).isfinite().all()
