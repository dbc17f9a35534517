"""What Profile Model counts, against closed forms and torch's own counter; what it makes of the numbers."""

import functools

import comfy.ldm.flux.model
import comfy.ldm.wan.model
import pytest
import torch
from nodes_helper import Job, model_of
from profile_helper import profiled
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tessera import archs
from tessera.methods.measure import profile as rules
from tessera.methods.measure.bars import bars
from tessera.patching.profile_meter import KINDS
from tessera.patching.profile_shapes import ShapeMeter, shapes, twin

FLUX = dict(  # noqa: C408
    image_model="flux", in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0,
    num_heads=24, depth=19, depth_single_blocks=38, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True,
    guidance_embed=True, txt_ids_dims=[],
)  # fmt: skip
WAN = dict(  # noqa: C408
    model_type="t2v", patch_size=(1, 2, 2), text_len=512, in_dim=16, dim=5120, ffn_dim=13824, freq_dim=256, text_dim=4096,
    out_dim=16, num_heads=40, num_layers=40,
)  # fmt: skip


@functools.cache
def large(kind):
    """(mode, network without memory) of FLUX.1 or Wan 14B."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return mode, twin(mode, kind, {**(FLUX if kind is comfy.ldm.flux.model.Flux else WAN), "dtype": torch.bfloat16})


CLOSED = [  # (class, latent, TFLOP of a step, share of attention, its lengths and calls): TaylorSeer's and the paper's
    (comfy.ldm.flux.model.Flux, (1, 16, 128, 128), 74.4, 0.20, {(4608, 4608): 57}),
    (comfy.ldm.flux.model.Flux, (1, 16, 256, 256), 418.0, 0.48, {(16896, 16896): 57}),
    (comfy.ldm.wan.model.WanModel, (1, 16, 21, 60, 104), 1680.0, 0.53, {(32760, 32760): 40, (32760, 512): 40}),
    (comfy.ldm.wan.model.WanModel, (1, 16, 21, 90, 160), 6520.0, 0.72, {(75600, 75600): 40, (75600, 512): 40}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "latent", "tera", "attention", "lengths"), CLOSED, ids=lambda v: str(v)[:24])
def test_the_closed_forms_of_large_models_without_computing(kind, latent, tera, attention, lengths):
    mode, network = large(kind)
    meter = ShapeMeter(archs.find(network))
    given = {"x": torch.empty(latent, device="meta"), "timestep": torch.ones(1), "context": torch.empty(1, 512, 4096)}
    if kind is comfy.ldm.flux.model.Flux:
        given |= {"y": torch.empty(1, 768), "guidance": torch.ones(1)}
    given = {k: v.to(torch.bfloat16) if v.numel() > 1 else v for k, v in given.items()}
    shapes(mode, meter, network, (), given)
    flops = {k: sum(c.flops for (_, kind, _), c in meter.cells.items() if kind == k) for k in KINDS}
    assert sum(flops.values()) == pytest.approx(tera * 1e12, rel=0.01)
    assert flops["attention"] / sum(flops.values()) == pytest.approx(attention, abs=0.01)
    assert dict(meter.lengths) == lengths and not meter.handles


NAMES = [
    "flux",
    "wan_meta",
    "sd3",
    "ltxv_meta",
    "lumina2",
    "pixart",
    "ernie",
    "chroma_radiance",
    "hidream",
    "ltxav_meta",
]


PAIRS = {  # 4 B H N M D of each attention call, two prompts
    "flux": 4 * 2 * 34**2 * 128 * 4, "chroma_radiance": 4 * 2 * 34**2 * 128 * 3, "pixart": 4 * 2 * 320 * (320 + 10) * 1152,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_those_of_torch(name):
    model, spec = model_of(name)
    report = profiled(model, spec, steps=1, mode="analytic")
    with FlopCounterMode(display=False) as counter:
        Job(spec, steps=1)(model)
    assert report["step_flops"] == pytest.approx(counter.get_total_flops(), rel=2e-3)
    assert sum(row["flops_share"] for row in report["classes"].values()) == pytest.approx(1, abs=1e-4)
    assert report["step_seconds"] is None and report["measured_steps"] == 0
    computed = name in ("pixart", "hidream")
    assert (
        report["counted"] == ("one computed evaluation" if computed else "shapes") and bool(report["notes"]) == computed
    )
    assert sum(row["flops"] for row in report["by_block"]) <= report["step_flops"] * (1 + 1e-9)
    assert len(report["by_block"]) == report["blocks"] > 0 and all(row["flops"] > 0 for row in report["by_block"])
    if name in PAIRS:
        assert report["classes"]["attention"]["flops"] == PAIRS[name]


def test_shapes_are_told_after_a_run_of_another_clone_in_another_precision():
    """Its compute dtype stays on the shared network until the next clone is loaded."""
    Job(model_of("sd3", "bf16")[1], steps=1)(model_of("sd3", "bf16")[0])
    model, spec = model_of("sd3")
    report = profiled(model, spec, steps=1, mode="analytic")
    assert report["counted"] == "shapes" and not report["notes"]


@pytest.mark.parametrize(
    ("flops", "times", "intensity", "offloaded", "want"),
    [
        ({"attention": 0.2, "linear": 0.8}, None, 500.0, False, "compute"),
        ({"attention": 0.6, "linear": 0.4}, None, 500.0, False, "attention"),
        ({"attention": 0.2, "linear": 0.8}, None, 5.0, False, "memory"),
        ({"attention": 0.2, "linear": 0.8}, None, 500.0, True, "memory"),
        ({"attention": 0.2, "linear": 0.8}, {"attention": 0.1, "linear": 0.3, "outside": 0.6}, 500.0, False, "outside"),
        ({"attention": 0.2, "linear": 0.8}, {"attention": 0.1, "linear": 0.2, "other": 0.7}, 500.0, False, "elementwise"),
    ],
)  # fmt: skip
def test_the_bottleneck(flops, times, intensity, offloaded, want):
    found, why = rules.bottleneck(rules.Measured(flops, times, intensity, "cuda", offloaded))
    assert found == want and len(why) > 20


def test_text_and_vae_are_the_bottleneck_where_they_take_longer_than_sampling():
    flops = {"attention": 0.6, "linear": 0.4}
    assert rules.bottleneck(rules.Measured(flops, flops, 500.0, "cuda", around=0.5))[0] == "outside"
    assert rules.bottleneck(rules.Measured(flops, flops, 500.0, "cuda", around=0.3))[0] == "attention"


def test_bars():
    picture = bars(
        ["title"], [("time", [("attention", 0.5, "50 %"), ("linear", 0.0, "0 %")])], [("blocks", [0.0, 1.0])]
    )
    assert picture.shape[0] == 1 and picture.shape[3] == 3 and 0 <= picture.min() < picture.max() <= 1
    red = (picture[0] - torch.tensor([196, 68, 58]) / 255).abs().sum(-1) < 1e-3
    assert red.any(0).sum() == 240  # half of the widest bar
