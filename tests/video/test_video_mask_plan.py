"""Video Mask Plan: which latent frames every task gives, and what a sampler makes of it."""

import pytest
import torch
from nodes_helper import Job, error, model_of, run_node, taylor
from tiny_models import empty_latent

from tessera.methods.video.mask_plan import blocks, indices, latent_of, plan, words
from tessera.nodes.video.video_mask_plan import VideoMaskPlan

SHAPE = (13, 4, 6)  # 49 frames behind a stride of 4


def known(mask):
    return [i for i, frame in enumerate(mask) if not frame.any()]


def test_frames_and_latent_frames():
    assert [latent_of(f, 4) for f in (0, 1, 4, 5, 8, 9, 48)] == [0, 1, 1, 2, 2, 3, 12]
    assert [latent_of(f, 1) for f in range(4)] == [0, 1, 2, 3]
    assert indices("0, 8:11, -1", 49) == [0, 8, 9, 10, 11, 48]
    assert words({0, 1, 2, 7, 9, 10}) == "0-2, 7, 9-10" and words([]) == "none"


@pytest.mark.parametrize(
    ("task", "options", "want"),
    [
        ("predict", {"given": 9}, [0, 1, 2]),
        ("predict", {"given": 12}, [0, 1, 2]),  # the last latent frame would hold one frame that is not given
        ("predict", {"given": 1}, [0]),
        ("backward", {"given": 8}, [11, 12]),
        ("backward", {"given": 11}, [11, 12]),
        ("predict", {"given": 5, "causal": 1}, [0, 1, 2, 3, 4]),
        ("backward", {"given": 5, "causal": 1}, [8, 9, 10, 11, 12]),
        ("interpolate", {"stride": 16}, [0, 4, 8, 12]),
        ("interpolate", {"stride": 4, "causal": 1}, [0, 4, 8, 12]),
        ("frames", {"text": "0, 17:20, -1"}, [0, 5, 12]),
        ("unconditional", {}, []),
    ],
)
def test_which_latent_frames_are_given(task, options, want):
    mask = plan(task, SHAPE, **options)
    assert known(mask) == want and set(mask.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("given", [1, 4, 12])
def test_backward_is_predict_in_reverse(given):
    forth, back = (plan(task, SHAPE, given, causal=1) for task in ("predict", "backward"))
    assert torch.equal(forth.flip(0), back)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8])
def test_the_share_that_is_made(ratio):
    for seed in range(5):
        mask = plan("random", (20, 3, 3), ratio=ratio, seed=seed)
        assert float(mask.mean()) == pytest.approx(ratio) and len(known(mask)) == round(20 * (1 - ratio))
        places = plan("spatial", (5, 20, 10), ratio=ratio, seed=seed)
        assert float(places.mean()) == pytest.approx(ratio) and (places == places[:1]).all()
    assert not torch.equal(plan("random", (20, 3, 3), seed=1), plan("random", (20, 3, 3), seed=2))
    assert torch.equal(plan("spatial", SHAPE, seed=3), plan("spatial", SHAPE, seed=3))
    assert {known(plan("single", SHAPE, seed=s))[0] for s in range(60)} == set(range(13))
    assert all(len(known(plan("single", SHAPE, seed=s))) == 1 for s in range(9))


def test_spatial_masks_are_blocks():
    """Few edges for their area, unlike single places drawn at random."""
    mask = blocks(24, 24, 0.5, 0)
    edges = float(mask.diff(dim=0).abs().sum() + mask.diff(dim=1).abs().sum())
    loose = (torch.rand(24, 24) < 0.5).float()
    assert edges < 0.5 * float(loose.diff(dim=0).abs().sum() + loose.diff(dim=1).abs().sum())


def test_a_feather_rises_beside_what_is_given():
    mask = plan("predict", (8, 2, 2), given=3, causal=1, feather=3)
    assert mask[:, 0, 0].tolist() == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    soft, hard = (plan("spatial", (2, 16, 16), seed=4, feather=n) for n in (2, 0))
    assert torch.equal(soft == 0, hard == 0) and 0 < float(soft.sum()) < float(hard.sum())


@pytest.mark.parametrize(
    ("task", "options", "sentence"),
    [
        ("predict", {"given": 60}, "gives every place and leaves nothing to make"),
        ("interpolate", {"stride": 4}, r"13 latent frames \(49 frames at causal_stride 4\) gives every place"),
        ("backward", {"given": 3}, "gives no whole latent frame"),
        ("random", {"ratio": 0.0}, "leaves nothing to make"),
        ("spatial", {"ratio": 1.0}, "gives no whole"),
        ("frames", {"text": ""}, "frame_indices is empty"),
        ("frames", {"text": "0, x"}, "frame_indices 'x' is no frame"),
        ("frames", {"text": "49"}, r"lies outside of the video's 49 frames \(0 to 48\)"),
        ("frames", {"text": "9:3"}, "runs backwards"),
    ],
)
def test_plans_that_cannot_be(task, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan(task, SHAPE, **options)


def test_the_node_and_its_preview():
    latent = {"samples": torch.randn(1, 16, *SHAPE), "batch_index": [3]}
    out = run_node(VideoMaskPlan, latent=latent, given=9)
    got, mask, preview = out
    assert torch.equal(got["samples"], latent["samples"]) and got["batch_index"] == [3] and "noise_mask" not in latent
    assert got["noise_mask"].shape == (1, 1, *SHAPE) and torch.equal(got["noise_mask"][0, 0], mask)
    assert preview.shape[0] == 1 and preview.shape[-1] == 3 and 0 <= preview.min() < preview.max() <= 1
    assert out.ui["images"] and out.ui["tessera_report"][0]["lines"][1] == "given whole: 0-2"
    blue = ((preview[0] * 255 - torch.tensor([58.0, 100.0, 170.0])).abs().sum(-1) < 2).sum()
    assert int(blue) == 3 * 4 * 6 * 11 * 11  # three tiles of 4 x 6 places, 11 pixels each
    with pytest.raises(ValueError, match=r"needs a video latent \[B, C, T, H, W\], got \[1, 16, 8, 8\]"):
        run_node(VideoMaskPlan, latent={"samples": torch.zeros(1, 16, 8, 8)})


@pytest.mark.parametrize("name", ["wan_meta", "ltxv"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_given_frames_stay_in_a_sampled_video(name, dtype):
    model, spec = model_of(name, dtype)
    latent = torch.randn(empty_latent(spec).shape, generator=torch.Generator().manual_seed(5))
    frames = latent.shape[2]
    out = run_node(VideoMaskPlan, latent={"samples": latent}, task="predict", given=1, causal_stride=1)[0]
    job = Job(spec, latent=latent, mask=out["noise_mask"], steps=4)
    made = job(model)
    assert frames > 1 and error(made[:, :, :1], latent[:, :, :1]) < 1e-5 < error(made[:, :, 1:], latent[:, :, 1:])
    assert torch.equal(job(model), made)
    nothing = run_node(VideoMaskPlan, latent={"samples": latent}, task="unconditional")[0]["noise_mask"]
    assert (
        error(Job(spec, latent=latent, mask=nothing, steps=4)(model), Job(spec, latent=latent, steps=4)(model)) < 1e-5
    )
    cached = taylor(model, interval=2)
    assert error(job(cached)[:, :, :1], latent[:, :, :1]) < 1e-5
