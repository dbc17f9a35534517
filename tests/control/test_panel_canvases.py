"""The canvas of panels: what is in it, what is held, and which ones are refused."""

import pytest
import torch
from nodes_helper import Job, error, model_of
from panels_helper import made, panels
from tiny_models import conds


@pytest.mark.parametrize("size", [(7, 6), (9, 2), (1, 10)])
def test_the_other_side_may_be_odd(size):
    model, spec = model_of("flux")
    patched, canvas, _ = panels(model, {"samples": torch.zeros(1, 16, *size)})
    assert canvas.shape[-2:] == (size[0], 2 * size[1])
    assert torch.isfinite(Job(spec, steps=1, latent=canvas)(patched)).all()
    tall, canvas, _ = panels(model, {"samples": torch.zeros(1, 16, *size[::-1])}, axis="height")
    assert canvas.shape[-2:] == (2 * size[1], size[0]) and torch.isfinite(Job(spec, steps=1, latent=canvas)(tall)).all()


def test_clean_panels_are_kept_behind_a_mask():
    model, spec = model_of("flux")
    given = torch.randn(2, 16, 8, 6, generator=torch.Generator().manual_seed(1))
    patched, canvas, mask = panels(
        model, {"samples": torch.zeros(2, 16, 8, 6)}, panels=3, clean_panels="2,0", clean={"samples": given}
    )
    assert mask.shape[-2:] == (8, 18) and mask.chunk(3, -1)[1].min() == 1
    assert not mask.chunk(3, -1)[0].any() and not mask.chunk(3, -1)[2].any()
    out = Job(spec, steps=3, latent=canvas, mask=mask)(patched)
    for row in out:
        parts = row.chunk(3, -1)
        assert torch.allclose(parts[2], given[0], atol=1e-5) and torch.allclose(parts[0], given[1], atol=1e-5)
    free = Job(spec, steps=3, latent=torch.zeros_like(canvas))(patched)
    assert error(out[0].chunk(3, -1)[1], free[0].chunk(3, -1)[1]) > 1e-3, "the drawn panel sees the given ones"
    both = panels(model, panels=2, clean_panels="0,1", clean={"samples": given[:1]})[1]
    assert torch.equal(both, torch.cat((given[:1], given[:1]), -1)), "one for all"


def test_a_mask_of_the_panel_is_on_every_drawn_panel():
    model, _ = model_of("flux")
    mask = torch.zeros(1, 64, 48)
    mask[:, :32] = 1
    latent = {"samples": torch.ones(1, 16, 8, 6), "noise_mask": mask, "batch_index": [4]}
    given = {"samples": torch.full((1, 16, 8, 6), 2.0)}
    out = made(model, latent, panels=3, clean_panels="1", clean=given)
    parts = out["noise_mask"].chunk(3, -1)
    assert out["batch_index"] == [4] and not parts[1].any() and torch.equal(parts[0], parts[2])
    assert parts[0][..., :4, :].min() == 1 and not parts[0][..., 4:, :].any()
    assert out["samples"].chunk(3, -1)[1].unique().tolist() == [2.0]


def test_an_empty_latent_of_another_model_fits_as_in_the_sampler():
    """Stable Diffusion's empty latent has 4 channels, and FLUX.2's cells are twice as large."""
    model, spec = model_of("flux2")
    latent = {"samples": torch.zeros(1, 4, 8, 6), "downscale_ratio_spacial": 8}
    out = made(model, latent, panels=2)
    ratio = 8 / model.get_model_object("latent_format").spacial_downscale_ratio
    assert out["samples"].shape == (1, 128, round(8 * ratio), 2 * round(6 * ratio))
    assert "downscale_ratio_spacial" not in out, "or the sampler would scale it again"


@pytest.mark.parametrize("name", ["chroma", "sd3", "qwen_image", "wan"])
def test_another_model_is_refused(name):
    model, spec = model_of(name)
    with pytest.raises(ValueError, match="moves positions that FLUX.1, FLUX.2 and their kin hand out, and .* does not"):
        panels(model, {"samples": torch.zeros(spec.latent)})


def test_canvases_that_do_not_fit_are_refused():
    model, spec = model_of("flux")
    with pytest.raises(
        ValueError, match=r"panel of 8 x 7 latent cells .* joins 2 .* width a multiple of 2 cells, such as 8"
    ):
        panels(model, {"samples": torch.zeros(1, 16, 8, 7)})
    patched, canvas, _ = panels(model)
    with pytest.raises(ValueError, match=r"canvas of 4 x 7 tokens .* into 2 equal panels .*multiple of 2 tokens"):
        Job(spec, steps=1, latent=torch.zeros(1, 16, 8, 14))(patched)
    larger = Job(spec, steps=1, latent=torch.zeros(1, 16, 16, 24))(patched)
    assert torch.isfinite(larger).all(), "an enlarged canvas still has its panels"
    positive, negative = conds(spec)
    area = [[positive[0][0], {**positive[0][1], "area": (8, 6, 0, 0)}]]
    with pytest.raises(ValueError, match=r"covers \[8, 6\] of the canvas of \[8, 12\].*Set Mask"):
        Job(spec, steps=1, latent=canvas, positive=area)(patched)
    with pytest.raises(ValueError, match="takes pictures of this MODEL.*latent is a latent \\[1, 16, 1, 8, 6\\]"):
        panels(model, {"samples": torch.ones(1, 16, 1, 8, 6)})


def test_inputs_that_cannot_be_read_are_refused():
    model, _ = model_of("flux")
    clean = {"samples": torch.ones(1, 16, 8, 6)}
    for given, sentence in (
        ({"clone": "0,0,1"}, "clone: '0,0,1' is not a list of 2 whole numbers from 0 to 1"),
        ({"clone": "0,2"}, "clone: '0,2'"),
        ({"index_per_panel": "0,-1"}, "index_per_panel: '0,-1'"),
        ({"clean_panels": "2", "clean": clean}, "clean_panels: '2' is not a list of different panels from 0 to 1"),
        ({"clean_panels": "0,0", "clean": clean}, "clean_panels: '0,0'"),
        ({"clean_panels": "0"}, r"hold panels \[0\] clean, and no LATENT clean is connected"),
        ({"clean": clean}, "Name its panels in clean_panels"),
        (
            {"clean_panels": "0", "clean": {"samples": torch.ones(1, 16, 4, 6)}},
            "8 x 6 latent cells, and clean has 1 of 4 x 6",
        ),
        ({"clean_panels": "0,1", "clean": {"samples": torch.ones(3, 16, 8, 6)}}, "holds 2 panels .* clean has 3"),
    ):
        with pytest.raises(ValueError, match=sentence):
            panels(model, **given)
    with pytest.raises(ValueError, match="is on this MODEL already"):
        panels(panels(model)[0])


def test_positions_that_another_node_moved_are_refused():
    model, spec = model_of("flux")
    moved = model.clone()
    moved.set_model_post_input_patch(lambda given: {**given, "img_ids": given["img_ids"].flip(1)})
    patched, canvas, _ = panels(moved)
    with pytest.raises(
        ValueError, match="Another node moved the positions of this picture before In-Context Panels could"
    ):
        Job(spec, steps=1, latent=canvas)(patched)
