import comfy.latent_formats
import pytest
import torch

from tessera.methods.digits import codec

FORMATS = {4: comfy.latent_formats.Flux(), 5: comfy.latent_formats.Wan21()}
SHAPES = [(3, 8, 12), (2, 128, 128), (2, 5, 8, 12), (1, 8, 32, 32)]  # [B, H, W] and [B, T, H, W]


@pytest.fixture(params=SHAPES, ids=str)
def pixels(request):
    return torch.rand(request.param, generator=torch.Generator().manual_seed(0))


def test_constants_are_comfyuis():
    assert (FORMATS[4].shift_factor, FORMATS[4].scale_factor) == (codec.FLUX_SHIFT, codec.FLUX_SCALE)
    assert torch.equal(torch.tensor(codec.WAN_MEAN), FORMATS[5].latents_mean.flatten())
    assert torch.equal(torch.tensor(codec.WAN_STD), FORMATS[5].latents_std.flatten())
    assert FORMATS[5].scale_factor == 1


def test_model_sees_pixels_from_minus_one_to_one(pixels):
    latent = codec.encode(pixels)
    inside = FORMATS[latent.ndim].process_in(latent)
    for place in [(0, 0), (2, 1), (3, 3)]:  # pixel (y, x) of every 4x4 square is channel 4y + x
        want = pixels[..., place[0] :: 4, place[1] :: 4] * 2 - 1
        torch.testing.assert_close(inside[:, 4 * place[0] + place[1]], want, atol=1e-5, rtol=0)


def test_round_trip_is_lossless(pixels):
    latent = codec.encode(pixels)
    cells = (pixels.shape[-2] // 4, pixels.shape[-1] // 4)
    assert latent.shape == (len(pixels), 16, *pixels.shape[1:-2], *cells)
    torch.testing.assert_close(codec.decode(latent), pixels, atol=2e-6, rtol=0)
    bytes_in, bytes_out = ((p * 255).round().to(torch.uint8) for p in (pixels, codec.decode(latent)))
    assert torch.equal(bytes_in, bytes_out)


def test_decode_clamps():
    assert codec.decode(torch.full((1, 16, 2, 2), 1e3)).eq(1).all()
    assert codec.decode(torch.full((1, 16, 2, 2), -1e3)).eq(0).all()


def test_sides_that_are_no_multiple_of_four_are_refused():
    with pytest.raises(ValueError, match="multiples of 4, got 12x10"):
        codec.encode(torch.zeros(1, 10, 12))


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 16, 8), (1, 128, 2, 8, 8)])
def test_other_latents_are_refused_with_their_shape(shape):
    with pytest.raises(ValueError, match=r"16 channels.*got \[1, "):
        codec.decode(torch.zeros(shape))
