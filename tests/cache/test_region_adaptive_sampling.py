"""Region-Adaptive Sampling as a node, on stock models: off is off, tokens are left out, and a run leaves nothing behind."""

import gc
import weakref

import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from nodes_helper import Job, error, model_of, run_node
from region_helper import ras, steps, told

from tessera import archs
from tessera.methods.cache.profile import Profile
from tessera.nodes.cache.region_adaptive_sampling import RegionAdaptiveSampling
from tessera.patching.region_state import Call, Lane, RegionState, Rows
from tessera.patching.run import Run

SERVED = [
    ("flux", "fp32"), ("flux", "bf16"), ("chroma", "fp32"), ("sd3", "fp32"), ("qwen_image", "fp32"),
    ("wan_meta", "fp32"), ("wan_meta", "bf16"), ("wan_i2v", "fp32"), ("wan_vace", "fp32"), ("hunyuan_video", "fp32"),
    ("lumina2", "fp32"), ("z_image", "fp32"), ("aura", "fp32"),
]  # fmt: skip
EVERY = pytest.mark.parametrize("name, dtype", SERVED, ids=lambda v: v)
FEW = pytest.mark.parametrize("name", ["flux", "wan_meta", "sd3", "lumina2"])


class Lengths:
    """Tokens that the linear layers of the blocks really met, whatever the node says."""

    def __init__(self, model):
        diffusion_model = model.model.diffusion_model
        self.rows, self.handles = 0, []
        for spec in archs.find(diffusion_model).blocks:
            if spec.stack:
                for _, block in archs.block_modules(diffusion_model, spec):
                    for module in block.modules():
                        if isinstance(module, torch.nn.Linear):
                            self.handles.append(module.register_forward_hook(self._count))

    def _count(self, module, args, out):
        self.rows += args[0].shape[:-1].numel() if args[0].ndim > 2 else 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize(
    "name, dtype", [("flux", "fp32"), ("flux", "bf16"), ("wan_meta", "bf16"), ("sd3", "fp32"), ("lumina2", "fp32")]
)
def test_ratio_1_is_bit_equal_and_stores_nothing(name, dtype):
    model, spec = model_of(name, dtype)
    off = ras(model, sample_ratio=1.0)
    assert torch.equal(Job(spec)(off), Job(spec)(model))
    assert told(off)["peak_bytes"] == 0 and told(off)["decisions"] == []


@pytest.mark.parametrize("name, dtype", [*SERVED, ("flux2", "fp32")])
def test_all_tokens_active_is_the_plain_run(name, dtype):
    """The whole way through the caches, with every token in it."""
    model, spec = model_of(name, dtype)
    whole = ras(model, reset_every=0, region_mask=torch.ones(1, 8, 8))
    got, want = Job(spec)(whole), Job(spec)(model)
    assert steps(whole) == "ffrrrrrr" and told(whole)["tokens_fraction"] == 1.0
    assert error(got, want) < (1e-5 if dtype == "fp32" else 0.02)


@EVERY
def test_tokens_are_left_out(name, dtype):
    model, spec = model_of(name, dtype)
    job, patched = Job(spec), ras(model)
    with Lengths(model) as plain:
        want = job(model)
    with Lengths(model) as met:
        got = job(patched)
    assert steps(patched) == "ffrrfrrf" and not told(patched)["computed_in_full"]
    assert 0.7 <= told(patched)["tokens_fraction"] <= 0.8
    assert met.rows < plain.rows and 1e-4 < error(got, want) < 0.5
    assert told(patched)["peak_bytes"] > 0
    assert torch.equal(job(patched), got) and torch.equal(job(model), want)


def test_rows_scale_with_the_ratio():
    """Linear layers of Wan's blocks see the text only in cross-attention: the rest is exactly the share of tokens."""
    model, spec = model_of("wan_meta")
    rows = []
    for ratio in (1.0, 0.75, 0.5, 0.25):
        patched = ras(model, sample_ratio=ratio, round_to=1, reset_every=0)
        with Lengths(model) as met:
            Job(spec)(patched)
        rows.append(met.rows)
    saved = [rows[0] - n for n in rows]
    assert saved[1] > 0 and saved[2:] == [2 * saved[1], 3 * saved[1]]


def test_a_prediction_that_does_not_change_is_exact():
    model, spec = model_of("flux")
    constant = torch.randn(spec.latent, generator=torch.Generator().manual_seed(5))

    def still(apply_model, given):
        apply_model(given["input"], given["timestep"], **given["c"])
        return given["input"] - given["timestep"].reshape(-1, 1, 1, 1) * constant

    toy = model.clone()
    toy.set_model_unet_function_wrapper(still)
    want = Job(spec, cfg=1.0)(toy)
    for ratio in (0.05, 0.3, 0.75):
        patched = ras(toy, sample_ratio=ratio, reset_every=0)
        assert error(Job(spec, cfg=1.0)(patched), want) < 1e-5


@pytest.fixture
def low_memory(monkeypatch):
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, d: 0)


@FEW
def test_prompts_apart_choose_the_same_tokens(name, low_memory, monkeypatch):
    model, spec = model_of(name)
    apart = ras(model)
    alone = Job(spec)(apart)
    activity = told(apart)["activity"]
    monkeypatch.undo()
    assert error(Job(spec)(apart), alone) < 1e-5
    assert told(apart)["activity"] == activity


@pytest.mark.parametrize("name", ["flux", "wan_meta"])
def test_a_batch_is_its_pictures(name):
    model, spec = model_of(name)
    patched = ras(model)
    noise = torch.randn(2, *spec.latent[1:], generator=torch.Generator().manual_seed(9))
    both = Job(spec, noise=noise, latent=torch.zeros_like(noise))(patched)
    for i in range(2):
        one = Job(spec, noise=noise[i : i + 1], latent=torch.zeros(1, *spec.latent[1:]))(patched)
        assert error(both[i : i + 1], one) < 1e-4


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "euler_ancestral", "dpmpp_2m"])
def test_samplers(sampler):
    model, spec = model_of("flux")
    patched = ras(model)
    got = Job(spec, sampler=sampler)(patched)
    assert torch.isfinite(got).all() and torch.equal(Job(spec, sampler=sampler)(patched), got)
    by_step: dict[int, set] = {}
    for d in told(patched)["decisions"]:
        by_step.setdefault(d["step"], set()).add(d["kind"])
    assert all(len(kinds) == 1 for kinds in by_step.values()) and {"region"} in by_step.values()


def test_partial_denoise():
    model, spec = model_of("flux")
    latent = torch.randn(spec.latent, generator=torch.Generator().manual_seed(3))
    job, patched = Job(spec, denoise=0.4, latent=latent), ras(model)
    assert torch.equal(job(ras(model, sample_ratio=1.0)), job(model))
    assert torch.isfinite(job(patched)).all() and steps(patched) == "ffrrfrrf"


@FEW
def test_interrupt_then_rerun_and_nothing_held(name):
    model, spec = model_of(name)
    patched = ras(model)
    want, held = Job(spec)(patched), []

    def on_step(step):
        if step == 3:
            found = [o for o in gc.get_objects() if type(o) is Rows]
            held.extend(weakref.ref(row.data) for row in found)
            raise comfy.model_management.InterruptProcessingException

    try:
        Job(spec, on_step=on_step)(patched)
    except comfy.model_management.InterruptProcessingException as stopped:
        stopped.__traceback__ = None
    assert len(held) >= 4  # keys and values, two prompts
    gc.collect()
    assert not [ref for ref in held if ref() is not None]
    assert not [o for o in gc.get_objects() if type(o) in (Rows, RegionState, Lane, Call, Run)]
    assert torch.equal(Job(spec)(patched), want)


def test_two_samplers_share_one_model():
    model, spec = model_of("flux")
    a, b = ras(model), ras(model, keep="low", sample_ratio=0.25)
    first, second = Job(spec)(a), Job(spec, seed=3)(b)
    assert torch.equal(Job(spec)(a), first) and torch.equal(Job(spec, seed=3)(b), second)


def test_resets_ends_and_ratios():
    model, spec = model_of("flux")
    patched = ras(model, reset_steps="3, 5")
    Job(spec)(patched)
    assert steps(patched) == "ffrfrfrr"
    ended = ras(model, end_percent=0.6, reset_every=0)
    Job(spec)(ended)
    assert steps(ended).startswith("ffr") and steps(ended).endswith("ff")
    rising = ras(model, ratio_schedule="linear_up", reset_every=0, round_to=1)
    Job(spec)(rising)
    assert told(rising)["tokens_fraction"] == pytest.approx((2 + 6 * 0.5) / 8, abs=0.02)


def test_keys_and_values_on_the_cpu_and_settings_from_a_profile():
    model, spec = model_of("flux")
    want = Job(spec)(run_node(RegionAdaptiveSampling, model=model, start_step=2, sample_ratio=0.4, round_to=1)[0])
    profile = Profile("Region-Adaptive Sampling", {"sample_ratio": 0.4, "start_step": 2, "round_to": 1}, steps=8)
    profiled = run_node(RegionAdaptiveSampling, model=model, cache_device="cpu", profile=profile)[0]
    assert torch.equal(Job(spec)(profiled), want)
    with pytest.raises(ValueError, match="number of steps 8 and not 6"):
        Job(spec, steps=6)(profiled)
    with pytest.raises(ValueError, match="was given a profile for Taylor Cache"):
        run_node(RegionAdaptiveSampling, model=model, profile=Profile("Taylor Cache", {"interval": 4}))
