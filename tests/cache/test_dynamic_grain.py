"""Dynamic Grain on stock models: off is off, blocks really see fewer tokens, and what is merged comes back."""

import contextlib
import gc
import math

import comfy.model_management
import pytest
import torch
from nodes_helper import Job, error, facts, model_of, run_node

from tessera import archs
from tessera.nodes.cache.dynamic_grain import DynamicGrain
from tessera.patching.dynamic_grain import GrainState, Lane

CASES = [
    ("flux", "fp32"), ("flux", "bf16"), ("wan_meta", "fp32"), ("wan_meta", "bf16"), ("sd3", "fp32"),
    ("lumina2", "fp32"), ("z_image", "fp32"), ("qwen_image", "fp32"), ("hunyuan_video", "fp32"), ("wan_vace", "fp32"), ("aura", "fp32"),
]  # fmt: skip
EVERY = pytest.mark.parametrize("name, dtype", CASES, ids=lambda v: v)
NEAR = {"fp32": 1e-4, "bf16": 0.1}
IMAGE = {"wan_meta": 5 * 24, "hunyuan_video": 3 * 16, "wan_vace": 3 * 16}  # the others have 24 image tokens
LEFT = {24: 15, 120: 75, 48: 30}  # half of the 2 x 2 cells merged


def grain(model, **inputs):
    return run_node(DynamicGrain, model=model, **{"start_percent": 0.0, "end_percent": 1.0, **inputs})[0]


def told(model):
    return facts(model, "Dynamic Grain")


def kinds(model) -> str:
    return "".join(d["kind"][0] for d in told(model)["decisions"])


@contextlib.contextmanager
def tokens_of(model, block: int = -1):
    """How many tokens of all streams the linear layers of a block met, call by call."""
    diffusion_model, seen = model.model.diffusion_model, []
    spec = [s for s in archs.find(diffusion_model).blocks if s.stack][-1]
    module = archs.block_modules(diffusion_model, spec)[block][1]
    layers = [m for m in module.modules() if hasattr(m, "in_features")]
    handles = [m.register_forward_hook(lambda m, x, y: seen.append(x[0].shape[-2])) for m in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@EVERY
def test_off_is_bit_equal(name, dtype):
    model, spec = model_of(name, dtype)
    job = Job(spec, steps=3)
    patched = grain(model, coarse_fraction=0.0)
    assert torch.equal(job(patched), job(model)) and kinds(patched) == "fff" and told(patched)["flops_saved"] == 0


@EVERY
def test_blocks_see_the_merged_tokens(name, dtype):
    model, spec = model_of(name, dtype)
    job, patched = Job(spec), grain(model)
    with tokens_of(model) as plain:
        want = job(model)
    with tokens_of(model) as seen:
        got = job(patched)
    image = IMAGE.get(name, 24)
    assert kinds(patched) == "fmmmmmmm" and not told(patched)["declined"]  # the first knows no estimate yet
    each = len(plain) // 8
    short = [n - image + LEFT[image] if n >= image and i >= each else n for i, n in enumerate(plain)]
    assert seen == short and short != plain
    assert told(patched)["tokens"] * (image + 7 * LEFT[image]) == told(patched)["tokens_computed"] * 8 * image
    assert told(patched)["flops_saved"] > 0 and told(patched)["flops_fraction"] < 0.8
    assert 1e-6 < error(got, want) < 1.0 and torch.isfinite(got).all()
    assert torch.equal(job(patched), got) and torch.equal(job(model), want)


@pytest.mark.parametrize("name", ["flux", "wan_meta", "sd3", "qwen_image", "hunyuan_video", "lumina2"])
def test_a_flat_latent_is_merged_without_loss(name, monkeypatch):
    """Where all tokens of a cell hold the same, at the same place, the merged model is the model."""
    model, spec = model_of(name)
    kind = type(model.model.diffusion_model)
    if name != "sd3":  # SD3 adds its places to the tokens, the others turn by them
        embedder = getattr(model.model.diffusion_model, archs.find(model.model.diffusion_model).rope)
        monkeypatch.setattr(type(embedder), "forward", still(type(embedder).forward))
    else:
        monkeypatch.setattr(kind.__mro__[1], "cropped_pos_embed", lambda self, *a, **k: torch.zeros(1, 1, 1))
    noise = torch.randn(*spec.latent[:2], *[1] * (len(spec.latent) - 2)).expand(spec.latent).contiguous()
    job = Job(spec, noise=noise)
    want = job(model)
    for cell in ("2x2", "2x2x2"):
        patched = grain(model, coarse_fraction=0.95, cell=cell)
        assert error(job(patched), want) < 1e-4 and "m" in kinds(patched)
    if name != "wan_meta":  # where image tokens attend to themselves alone, equal ones weigh nothing
        assert error(job(grain(model, coarse_fraction=0.95, mass_correction=False)), want) > 1e-5


def still(forward):
    """Every token at place 0."""
    return lambda self, ids: forward(self, torch.zeros_like(ids))


def test_mass_is_that_of_the_formula(monkeypatch):
    """The override that the blocks meet adds log 4 to merged keys and nothing to others."""
    model, spec = model_of("wan_meta")
    seen = []

    def spy(func, *args, mask=None, **kwargs):
        seen.append((args[0].shape, args[1].shape, mask))
        return func(*args, mask=mask, **kwargs)

    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = spy
    Job(spec, steps=2)(grain(model))
    masks = [mask for _, _, mask in seen if mask is not None]
    assert len(masks) == 3  # one evaluation of three blocks; none in attention onto the text
    for mask in masks:
        assert mask.shape == (1, 1, 1, 75) and mask[..., :60].abs().max() == 0
        assert torch.allclose(mask[..., 60:], torch.tensor(math.log(4)))
    seen.clear()
    Job(spec, steps=2)(grain(model, mass_correction=False))
    assert seen and all(mask is None for _, _, mask in seen)


def test_more_grain_costs_more_quality():
    model, spec = model_of("wan_meta")
    job = Job(spec, steps=12, cfg=1.0)
    want = job(model)
    errors = [error(job(grain(model, coarse_fraction=f)), want) for f in (0.2, 0.5, 0.95)]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("latent", [(1, 16, 10, 14), (1, 16, 6, 18), (1, 16, 2, 2), (1, 16, 9, 7)], ids=str)
@pytest.mark.parametrize("cell", ["2x2", "4x4", "2x2x2"])
def test_every_size_is_legal(latent, cell):
    model, spec = model_of("flux")
    patched = grain(model, cell=cell, measure="entropy")
    assert torch.isfinite(Job(spec, steps=3, latent=torch.zeros(latent))(patched)).all()
    h, w = (-(-n // 2) for n in latent[-2:])
    side = int(cell[0])
    merged = (h // side) * (w // side) // 2
    left = h * w - merged * (side * side - 1)
    assert told(patched)["tokens_computed"] == told(patched)["tokens"] // 3 // (h * w) * (h * w + 2 * left)


def test_a_mask_keeps_cells_fine():
    model, spec = model_of("flux")
    job, want = Job(spec), Job(spec)(model)
    whole = grain(model, coarse_fraction=0.95, mask=torch.ones(1, 8, 12))
    assert torch.equal(job(whole), want) and kinds(whole) == "f" * 8
    half = torch.zeros(1, 8, 12)
    half[..., 6:] = 1
    patched = grain(model, coarse_fraction=0.95, mask=half)
    assert not torch.equal(job(patched), want)
    assert told(patched)["tokens_computed"] == told(patched)["tokens"] // 8 // 24 * (24 + 7 * (24 - 2 * 3))


def test_blocks_and_percents():
    model, spec = model_of("flux")
    patched = grain(model, blocks="1,3", start_percent=0.3, end_percent=0.7)
    Job(spec, steps=10)(patched)
    sampling = model.get_model_object("model_sampling")
    start, end = sampling.percent_to_sigma(0.3), sampling.percent_to_sigma(0.7)
    assert kinds(patched) == "".join("m" if end <= d["sigma"] <= start else "f" for d in told(patched)["decisions"])
    assert "m" in kinds(patched) and told(patched)["tokens"] == kinds(patched).count("m") * 2 * 2 * 24


@EVERY
def test_separate_cfg_is_as_joined_cfg(name, dtype, monkeypatch):
    model, spec = model_of(name, dtype)
    patched, job = grain(model), Job(spec)
    joined, first = job(patched), told(patched)
    monkeypatch.setattr("comfy.model_patcher.ModelPatcher.get_free_memory", lambda self, d: 0)
    assert error(job(patched), joined) < NEAR[dtype]
    assert (
        told(patched)["decisions"] == first["decisions"]
        and told(patched)["tokens_computed"] == first["tokens_computed"]
    )


@EVERY
def test_a_batch_is_its_pictures(name, dtype):
    model, spec = model_of(name, dtype)
    patched = grain(model)
    noises = [torch.randn(spec.latent, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    single = [Job(spec, noise=noise)(patched) for noise in noises]
    assert error(Job(spec, noise=torch.cat(noises), batch=2)(patched), torch.cat(single)) < NEAR[dtype]


@pytest.mark.parametrize("name", ["flux", "wan_meta", "lumina2"])
def test_interrupt_then_rerun_and_nothing_is_held(name):
    model, spec = model_of(name)
    patched, met = grain(model), []
    want = Job(spec)(grain(model))

    def on_step(step):
        met.append(sum(type(o) is Lane for o in gc.get_objects()))
        if step == 2:
            raise comfy.model_management.InterruptProcessingException

    try:
        Job(spec, on_step=on_step)(patched)
    except comfy.model_management.InterruptProcessingException as stopped:
        stopped.__traceback__ = None
    gc.collect()
    assert met[-1] and not [o for o in gc.get_objects() if type(o) in (Lane, GrainState)]
    assert torch.equal(Job(spec)(patched), want)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "heunpp2", "euler_ancestral"])
def test_samplers(sampler):
    model, spec = model_of("flux")
    job, patched = Job(spec, sampler=sampler, steps=5), grain(model)
    got = job(patched)
    assert torch.isfinite(got).all() and kinds(patched).count("m") >= 4 and torch.equal(job(patched), got)


def test_partial_denoise_and_a_restart():
    model, spec = model_of("flux")
    latent = torch.randn(spec.latent, generator=torch.Generator().manual_seed(3))
    patched = grain(model)
    assert torch.isfinite(Job(spec, denoise=0.4, latent=latent)(patched)).all() and kinds(patched) == "fmmmmmmm"
    Job(spec, sigmas=torch.tensor([1.0, 0.8, 0.6, 0.9, 0.5, 0.2, 0.0]))(patched)
    assert kinds(patched) == "fmmfmm"


def test_branches_do_not_meet():
    model, spec = model_of("flux")
    job, one, two = Job(spec), grain(model), grain(model, coarse_fraction=0.9)
    plain, first, second = job(model), job(one), job(two)
    for patched, want in ((one, first), (model, plain), (two, second), (one, first)):
        assert torch.equal(job(patched), want)
