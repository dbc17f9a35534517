import pytest
import torch
from comfy.nested_tensor import NestedTensor

from tessera.methods.digits import codec
from tessera.nodes.digits.digits_decode import DigitsDecode


def run(latent):
    return DigitsDecode.execute(samples={"samples": latent}).args[0]


def test_image_batch():
    pixels = torch.rand(3, 8, 12)
    image = run(codec.encode(pixels))
    assert image.shape == (3, 8, 12, 3)
    for channel in image.unbind(-1):
        torch.testing.assert_close(channel, pixels, atol=2e-6, rtol=0)


def test_clips_come_frame_by_frame_clip_after_clip():
    pixels = torch.rand(2, 5, 8, 12)
    image = run(codec.encode(pixels))
    assert image.shape == (10, 8, 12, 3)
    torch.testing.assert_close(image[7, ..., 0], pixels[1, 2], atol=2e-6, rtol=0)


def test_half_precision_latents_give_fp32_pictures():
    image = run(codec.encode(torch.rand(1, 8, 8)).bfloat16())
    assert image.dtype == torch.float32
    assert image.min() >= 0 and image.max() <= 1


def test_picture_can_be_written_to():
    image = run(torch.zeros(1, 16, 2, 2))
    image[..., 0] = 1  # the next node may paint one colour
    assert image[..., 1].max() < 1


def test_nested_latents_are_refused():
    with pytest.raises(ValueError, match="one latent, got 2 nested"):
        run(NestedTensor([torch.zeros(1, 16, 2, 2), torch.zeros(1, 16, 2, 2)]))


def test_latent_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"16 channels.*got \[1, 4, 8, 8\]"):
        run(torch.zeros(1, 4, 8, 8))
