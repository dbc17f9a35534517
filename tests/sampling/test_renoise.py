"""The kernel that takes a prediction back to an earlier noise level."""

import pytest
import torch

from tessera.kernels.sampling import renoise as m

SHAPES = [(1,), (2, 16, 3, 5, 7), (1, 1030)]  # one element; no power of two; a block and a tail
ERROR = {torch.float32: 1e-6, torch.bfloat16: 8e-3}  # the interpreter truncates to bf16, hardware rounds


def made(shape, device, dtype=torch.float32):
    """Slices of a longer clip, as a block's frames are."""
    return [torch.randn(*shape[:-1], shape[-1] + 3, device=device).to(dtype)[..., 1:-2] for _ in range(3)]


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("velocity", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_matches_reference(shape, velocity, dtype, device, error):
    x, v, e = made(shape, device, dtype)
    v = v if velocity else None
    got, want = m.launch(x, v, e, 0.75, 0.4), m.reference(x, v, e, 0.75, 0.4)
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
    assert error(got, want) < ERROR[dtype]
    clean = x.double() - (0.75 * v.double() if velocity else 0)
    assert error(want, 0.6 * clean + 0.4 * e.double()) < ERROR[dtype]


@pytest.mark.parametrize("serve", [m.launch, m.reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_no_noise_is_the_clean_latent_bit_for_bit(serve, dtype, device):
    x, _, e = made((2, 65), device, dtype)
    got = serve(x, None, e, 1.0, 0.0)
    assert torch.equal(got, x) and got.data_ptr() != x.data_ptr()
    assert torch.equal(serve(x, None, e, 1.0, 1.0), e)


@pytest.mark.parametrize("serve", [m.launch, m.reference], ids=["kernel", "reference"])
def test_other_shapes_are_refused(serve, device):
    x, v, _ = made((2, 65), device)
    with pytest.raises(ValueError, match=r"x and noise of one shape and device, got \[2, 65\]"):
        serve(x, v, x[:1], 1.0, 0.5)
    with pytest.raises(ValueError, match="floating point"):
        serve(x.int(), None, x, 1.0, 0.5)


@pytest.mark.parametrize("velocity", [False, True])
def test_custom_op(velocity, device):
    x, v, e = made((2, 65), device)
    torch.library.opcheck(m.renoise, (x, v if velocity else None, e, 0.75, 0.4))
