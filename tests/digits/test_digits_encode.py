import pytest
import torch

from tessera.methods.digits import codec
from tessera.nodes.digits.digits_decode import DigitsDecode
from tessera.nodes.digits.digits_encode import DigitsEncode


def run(image, kind="image", frames=8):
    return DigitsEncode.execute(image=image, kind=kind, frames=frames).args[0]


@pytest.mark.parametrize(("kind", "shape"), [("image", (6, 16, 2, 3)), ("video", (2, 16, 3, 2, 3))])
def test_decode_undoes_it(kind, shape):
    image = torch.rand(6, 8, 12, 1).repeat(1, 1, 1, 3)
    latent = run(image, kind, 3)
    assert latent["samples"].shape == shape
    torch.testing.assert_close(DigitsDecode.execute(samples=latent).args[0], image, atol=2e-6, rtol=0)


def test_colours_are_averaged_and_transparency_ignored():
    image = torch.rand(1, 8, 8, 4)
    torch.testing.assert_close(run(image)["samples"], codec.encode(image[..., :3].mean(-1)))


def test_pictures_that_do_not_fill_clips_are_refused():
    with pytest.raises(ValueError, match="7 pictures into clips of 3 frames"):
        run(torch.rand(7, 8, 8, 3), "video", 3)


def test_sides_that_are_no_multiple_of_four_are_refused():
    with pytest.raises(ValueError, match="got 10x8"):
        run(torch.rand(1, 8, 10, 3))
