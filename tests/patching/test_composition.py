"""Our nodes beside each other, beside LoRA and beside what core itself puts on a MODEL."""

import random

import comfy.context_windows as context_windows
import comfy_extras.nodes_context_windows as windows
import comfy_extras.nodes_easycache as easycache
import comfy_extras.nodes_slg as slg
import pytest
import torch
from comfy.controlnet import ControlBase
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from nodes_helper import Job, error, facts, kinds, model_of, run_node, taylor, watching
from tiny_models import conds

from tessera.nodes.attention.local_window_attention import LocalWindowAttention

LEVEL = pytest.mark.parametrize("level", ["last_block", "output"])
WHOLE = {"radius": 64, "temporal_radius": 64}
SPANS = {"the window spans the picture"}


def window(model, **inputs):
    return run_node(LocalWindowAttention, model=model, **{"radius": 2, "min_tokens": 0, **inputs})[0]


@pytest.mark.parametrize("name", ["flux", "wan_meta", "sd3", "ltxv_meta", "lumina2", "cosmos_predict2"])
@LEVEL
def test_a_cache_and_an_attention_in_both_orders(name, level):
    model, spec = model_of(name)
    job, alone = Job(spec), taylor(model, level=level)
    want = job(alone)
    for reach in (WHOLE, {}):
        one = window(taylor(model, level=level), **reach)
        two = taylor(window(model, **reach), level=level)
        with watching(model) as watch:
            first = job(one)
        assert torch.equal(job(two), first) and torch.isfinite(first).all()
        for patched in (one, two):
            told = facts(patched, "Local Window Attention")
            assert told["calls"] > 0 and (set(told["declined"]) == SPANS if reach is WHOLE else not told["declined"])
            assert kinds(patched) == "ffppfppf" and facts(patched)["blocks_computed"] == watch.blocks
        assert torch.equal(first, want) == (reach is WHOLE)


@LEVEL
def test_two_caches_are_refused(level):
    model, _ = model_of("flux")
    for other in ("last_block", "output"):
        with pytest.raises(ValueError, match="found a Taylor Cache on this MODEL already.*Remove one of them"):
            taylor(taylor(model, level=level), level=other)


@LEVEL
@pytest.mark.parametrize("node", [easycache.EasyCacheNode, easycache.LazyCacheNode])
@pytest.mark.parametrize("core_first", [False, True])
def test_core_caches_are_refused_with_ours(level, node, core_first):
    model, spec = model_of("flux")
    plain = Job(spec)(model)
    both = taylor(run_node(node, model=model)[0], level=level) if core_first else (
        run_node(node, model=taylor(model, level=level))[0]
    )  # fmt: skip
    with pytest.raises(ValueError, match="core's EasyCache or LazyCache are on the same MODEL.*Remove one of them"):
        Job(spec)(both)
    assert torch.equal(Job(spec)(model), plain)
    assert torch.isfinite(Job(spec)(taylor(model, level=level))).all()


@pytest.mark.parametrize("node", [easycache.EasyCacheNode, easycache.LazyCacheNode])
@pytest.mark.parametrize("core_first", [False, True])
def test_core_caches_work_beside_an_attention_node(node, core_first):
    model, spec = model_of("flux", "bf16")  # in fp32 EasyCache adds into the sampler's own latent
    settings = {"reuse_threshold": 1.0, "start_percent": 0.1}
    with watching(model) as alone:
        want = Job(spec)(run_node(node, model=model, **settings)[0])
    if core_first:
        both = window(run_node(node, model=model, **settings)[0], **WHOLE)
    else:
        both = run_node(node, model=window(model, **WHOLE), **settings)[0]
    with watching(model) as watch:
        got = Job(spec)(both)
    told = facts(both, "Local Window Attention")
    assert alone.blocks < 8 * 4 and watch.each == alone.each
    assert told["calls"] == watch.blocks and torch.equal(got, want)


@pytest.mark.parametrize("core_first", [True, False])
@pytest.mark.parametrize("node", [easycache.EasyCacheNode, easycache.LazyCacheNode])
@LEVEL
def test_core_caches_work_beside_a_cache_that_is_off(level, node, core_first):
    model, spec = model_of("flux", "bf16")
    settings = {"reuse_threshold": 1.0, "start_percent": 0.1}
    want = Job(spec)(run_node(node, model=model, **settings)[0])
    if core_first:
        both = taylor(run_node(node, model=model, **settings)[0], level=level, interval=1)
    else:
        both = run_node(node, model=taylor(model, level=level, interval=1), **settings)[0]
    assert torch.equal(Job(spec)(both), want)


def lora(model, strength: float):
    patched = model.clone()
    key = "diffusion_model.double_blocks.0.img_mlp.0.weight"
    weight = model.model_state_dict()[key]
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)) * 0.2
    assert patched.add_patches({key: ("diff", (change,))}, strength) == [key]
    return patched


@LEVEL
def test_lora_before_after_and_changed_between_runs(level):
    model, spec = model_of("flux")
    job, off = Job(spec), taylor(model, level=level, interval=1)
    plain = job(model)
    for strength in (1.0, 0.5):
        want = job(lora(model, strength))
        assert error(want, plain) > 1e-3
        assert torch.equal(job(lora(off, strength)), want)
        assert torch.equal(job(taylor(lora(model, strength), level=level, interval=1)), want)
        after, before = lora(taylor(model, level=level), strength), taylor(lora(model, strength), level=level)
        assert torch.equal(job(after), job(before)) and kinds(after) == kinds(before) == "ffppfppf"
    assert torch.equal(job(off), plain)


class Control(ControlBase):
    """A ControlNet for the tiny Flux: the same residuals at every step. Core adds them in place to what blocks return."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        generator = torch.Generator().manual_seed(6)
        return {k: [torch.randn(1, 24, 128, generator=generator) for _ in range(2)] for k in ("input", "output")}


@LEVEL
def test_controlnet(level):
    model, spec = model_of("flux")
    plain = Job(spec)(model)
    positive, negative = ([[c, {**extra, "control": Control()}]] for ((c, extra),) in conds(spec))
    job = Job(spec, positive=positive, negative=negative)
    want = job(model)
    assert error(want, plain) > 0.01
    assert torch.equal(job(taylor(model, level=level, interval=1)), want)
    patched = taylor(model, level=level)
    assert torch.isfinite(job(patched)).all() and kinds(patched) == "ffppfppf"


def test_control_residuals_are_added_once_to_a_forecast():
    """What is stored is the block's output before the residual: else it would be added again at every skip."""
    model, spec = model_of("flux")
    positive, negative = ([[c, {**extra, "control": Control()}]] for ((c, extra),) in conds(spec))
    patched, seen = taylor(model, order=0, interval=3, warmup=1), []
    handle = model.model.diffusion_model.final_layer.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].clone())
    )
    Job(spec, steps=6, cfg=1.0, positive=positive, negative=negative)(patched)
    handle.remove()
    assert kinds(patched) == "fppfpf"
    assert torch.equal(seen[1], seen[0]) and torch.equal(seen[2], seen[0]) and torch.equal(seen[4], seen[3])
    assert not torch.equal(seen[3], seen[0])


def clip(frames: int):
    model, spec = model_of("wan_meta")
    noise = torch.randn(1, 16, frames, 4, 6, generator=torch.Generator().manual_seed(3))
    return model, lambda **more: Job(spec, noise=noise, latent=torch.zeros_like(noise), **more)


SCHEDULES = ["standard_static", "standard_uniform", "looped_uniform", "batched"]


@LEVEL
@pytest.mark.parametrize("fix", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_context_windows(level, schedule, fix):
    model, make = clip(9)
    settings = {
        "context_length": 4, "context_overlap": 1, "context_schedule": schedule, "dim": 2, "causal_window_fix": fix,
        "closed_loop": schedule == "looped_uniform", "freenoise": fix,
    }  # fmt: skip
    cut = lambda m: run_node(windows.ContextWindowsManualNode, model=m, **settings)[0]  # noqa: E731
    job = make()
    want = job(cut(model))
    assert torch.equal(job(cut(taylor(model, level=level, interval=1))), want)
    assert torch.equal(job(taylor(cut(model), level=level, interval=1)), want)
    patched = taylor(cut(model), level=level)
    with watching(model) as watch:
        got = job(patched)
    assert torch.isfinite(got).all() and torch.equal(job(patched), got)
    assert facts(patched)["blocks_computed"] == watch.blocks
    if schedule in ("standard_static", "batched"):  # the others move their windows from step to step
        assert kinds(patched) == "ffppfppf" and facts(patched)["blocks_skipped"] == watch.blocks


@LEVEL
def test_windows_that_moved_away_are_forgotten(level):
    """Core's uniform schedules move their windows from step to step; here none ever comes back."""
    model, make = clip(12)
    settings = {"context_length": 4, "context_overlap": 0, "dim": 2, "causal_window_fix": False}
    cut = run_node(windows.ContextWindowsManualNode, model=taylor(model, level=level), **settings)[0]
    shuffle = random.Random(1)

    def schedule(*_):
        frames = shuffle.sample(range(12), 12)
        return [sorted(frames[i : i + 4]) for i in (0, 4, 8)]

    cut.model_options["context_handler"].context_schedule = context_windows.ContextSchedule("shuffled", schedule)
    held = []
    for steps in (1, 12):
        assert torch.isfinite(make(steps=steps)(cut)).all()
        held.append(facts(cut)["peak_bytes"])
    assert 0 < held[1] <= 3 * held[0] and facts(cut)["blocks_skipped"] == 0


@LEVEL
def test_wan_context_windows_with_their_defaults(level):
    model, make = clip(9)
    cut = run_node(windows.WanContextWindowsManualNode, model=model, context_length=13, context_overlap=4)[0]
    assert torch.equal(make()(taylor(cut, level=level, interval=1)), make()(cut))
    assert torch.isfinite(make()(taylor(cut, level=level))).all()


@LEVEL
@pytest.mark.parametrize("turning", [False, True], ids=["in-order", "turning"])
def test_windows_keep_their_own_history(level, turning):
    """Windows that do not overlap are separate clips; all of them carry the same conditions, in any order."""
    model, make = clip(8)
    cut = run_node(
        windows.ContextWindowsManualNode, model=taylor(model, level=level), context_length=4, context_overlap=0, dim=2,
        causal_window_fix=False,
    )[0]  # fmt: skip
    handler, turns = cut.model_options["context_handler"], []
    in_order = handler.context_schedule.func

    def schedule(*args):
        turns.append(1)
        return in_order(*args)[:: -1 if turning and len(turns) % 2 else 1]

    handler.context_schedule = context_windows.ContextSchedule("turning", schedule)
    job = make()
    together, noise = job(cut), job.noise
    assert kinds(cut) == "ffppfppf"
    halves = []
    for job.noise in noise.chunk(2, dim=2):
        job.latent = torch.zeros_like(job.noise)
        halves.append(job(taylor(model, level=level)))
    assert error(together, torch.cat(halves, dim=2)) < 1e-4


@LEVEL
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_skip_layer_guidance(name, level):
    """Runs the positive a second time through fewer blocks: a stream of its own."""
    model, spec = model_of(name)
    settings = {
        "double_layers": "1", "single_layers": "", "scale": 2.0, "start_percent": 0.0, "end_percent": 0.9,
        "rescaling_scale": 0.0,
    }  # fmt: skip
    job = Job(spec)
    guided = run_node(slg.SkipLayerGuidanceDiT, model=model, **settings)[0]
    want = job(guided)
    assert error(want, job(model)) > 1e-3
    assert torch.equal(job(taylor(guided, level=level, interval=1)), want)
    patched = taylor(guided, level=level)
    assert torch.isfinite(job(patched)).all() and kinds(patched) == "ffppfppf"


@pytest.mark.parametrize(
    "name, level, compiled_first",
    [
        ("flux", "last_block", False),
        ("flux", "last_block", True),
        ("flux", "output", True),
        ("lumina2", "last_block", True),
    ],
)
def test_torch_compile(name, level, compiled_first):
    """Core's node, with the backend that needs no compiler. The graph must not bake one step's decision in."""
    model, spec = model_of(name)
    settings = {"level": level, "interval": 2, "warmup": 1}

    def compiled(m):
        m = m.clone(disable_dynamic=True)
        set_torch_compile_wrapper(m, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
        return m

    torch._dynamo.reset()
    job = Job(spec, steps=5, cfg=1.0)
    plain, want = job(model), job(taylor(model, **settings))
    patched = taylor(compiled(model), **settings) if compiled_first else compiled(taylor(model, **settings))
    got = job(patched)
    torch._dynamo.reset()
    assert kinds(patched) == "fpfpf" and error(got, want) < 1e-4 < error(want, plain)
