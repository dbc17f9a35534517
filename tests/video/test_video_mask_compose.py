"""Video Mask Compose: the algebra of masks, and two plans made one."""

import pytest
import torch
from comfy.utils import reshape_mask
from nodes_helper import run_node

from nodes import SetLatentNoiseMask
from tessera.methods.video.mask_plan import OPERATIONS, compose, plan
from tessera.nodes.video.video_mask_compose import VideoMaskCompose
from tessera.nodes.video.video_mask_plan import VideoMaskPlan

SHAPE = (5, 4, 4)


def planned(shape=SHAPE, **options):
    return run_node(VideoMaskPlan, latent={"samples": torch.randn(1, 16, *shape)}, causal_stride=1, **options)[0]


@pytest.mark.parametrize(
    ("operation", "rule"),
    [
        ("union", lambda a, b: a or b),
        ("intersection", lambda a, b: a and b),
        ("difference", lambda a, b: a and not b),
        ("either_one", lambda a, b: a != b),
    ],
)
def test_operations_on_hard_masks(operation, rule):
    a, b = (torch.randint(0, 2, SHAPE).float() for _ in range(2))
    want = torch.tensor([float(bool(rule(bool(x), bool(y)))) for x, y in zip(a.flatten(), b.flatten(), strict=True)])
    assert torch.equal(compose(a, b, operation).flatten(), want)


def test_identities_of_soft_masks():
    a, b = torch.rand(SHAPE), torch.rand(SHAPE)
    for operation in OPERATIONS:
        assert 0 <= float(compose(a, b, operation).min()) <= float(compose(a, b, operation).max()) <= 1
        if operation != "difference":
            assert torch.equal(compose(a, b, operation), compose(b, a, operation))
    assert torch.equal(compose(a, a, "union"), a) and torch.equal(compose(a, torch.ones(SHAPE), "intersection"), a)
    assert torch.equal(compose(a, torch.zeros(SHAPE), "difference"), a)
    assert torch.equal(1 - compose(a, b, "union"), compose(1 - a, 1 - b, "intersection"))


def test_two_plans_become_one():
    a, b = planned(task="predict", given=2), planned(task="spatial", ratio=0.5, seed=3)
    out = run_node(VideoMaskCompose, a=a, b=b, operation="intersection")
    made, mask, preview = out
    want = torch.minimum(plan("predict", SHAPE, 2, causal=1), plan("spatial", SHAPE, ratio=0.5, seed=3))
    assert torch.equal(mask, want) and torch.equal(made["noise_mask"][0, 0], want) and 0 < float(want.mean()) < 0.5
    assert made["samples"] is a["samples"] and preview.shape[-1] == 3 and out.ui["images"]
    bare = {"samples": a["samples"]}
    assert torch.equal(run_node(VideoMaskCompose, a=bare, b=b, operation="intersection")[1], b["noise_mask"][0, 0])
    flat = {**a, "noise_mask": a["noise_mask"][0, 0]}  # a MASK itself
    assert torch.equal(run_node(VideoMaskCompose, a=flat, b=b, operation="intersection")[1], want)
    batch = {**b, "noise_mask": torch.cat([b["noise_mask"], 1 - b["noise_mask"]])}
    assert run_node(VideoMaskCompose, a=a, b=batch, operation="union")[0]["noise_mask"].shape == (2, 1, *SHAPE)


def test_what_does_not_fit_is_refused():
    a, other = planned(given=2), planned(shape=(6, 4, 4), given=2)
    with pytest.raises(ValueError, match=r"a's mask \[1, 5, 4, 4\] and b's \[1, 6, 4, 4\] differ"):
        run_node(VideoMaskCompose, a=a, b=other)
    with pytest.raises(ValueError, match="difference leaves nothing to make"):
        run_node(VideoMaskCompose, a=a, b=a, operation="difference")
    with pytest.raises(ValueError, match="is not that of a latent"):
        run_node(VideoMaskCompose, a={**a, "noise_mask": torch.ones(1, 1, 3, 4, 4)}, b=a)


def test_masks_of_cores_own_node():
    """Set Latent Noise Mask leaves [T, 1, H, W], in pixels where the mask was a picture."""
    a = planned(task="predict", given=2)
    for size in ((5, 4, 4), (5, 32, 32), (1, 32, 32)):
        mask = torch.zeros(size)
        mask[:, :, : size[2] // 2] = 1.0
        b = SetLatentNoiseMask().set_mask({"samples": a["samples"]}, mask)[0]
        made = run_node(VideoMaskCompose, a=a, b=b, operation="intersection")[0]["noise_mask"]
        want = torch.minimum(a["noise_mask"], reshape_mask(b["noise_mask"], (1, 1, *SHAPE)))
        assert torch.equal(made, want) and 0 < float(made.mean()) < 0.5
    with pytest.raises(ValueError, match="is not that of a latent"):
        wrong = SetLatentNoiseMask().set_mask({"samples": a["samples"]}, torch.ones(3, 4, 4))[0]
        run_node(VideoMaskCompose, a=wrong, b=a)
