"""What acts on a bridged diffusers model: caches, attention methods, Compare, LoRA, offloaded weights."""

from collections import Counter

import comfy.lora
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import diffusers_helper as tiny
import pytest
import torch
from attention_helper import Exact, plan
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from nodes_helper import facts, run_node, taylor
from torch.utils.flop_counter import FlopCounterMode

from tessera import archs
from tessera.nodes.attention.window_attention_3d import WindowAttention3d
from tessera.nodes.cache.dynamic_grain import DynamicGrain
from tessera.nodes.cache.dynamic_tokens import DynamicTokens
from tessera.nodes.cache.region_adaptive_sampling import RegionAdaptiveSampling
from tessera.nodes.cache.taylor_cache import TaylorCache
from tessera.nodes.measure.compare import Compare
from tessera.patching.diffusers_load import load
from tessera.patching.profile import Asked, measure
from tessera.patching.sampling import Job

LINEAR = ("SanaTransformer2DModel", "SanaVideoTransformer3DModel")
SOFTMAX = [name for name in tiny.CLASSES if name not in LINEAR]
STACKED = [name for name in tiny.CLASSES if not name.startswith("Latte")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("models"), {}
    return lambda name: made.setdefault(name, load(str(tiny.save(name, root)))).clone()


def run(made, name: str, steps: int = 8, cfg: float = 2.0) -> torch.Tensor:
    start = tiny.noise(name)
    with torch.inference_mode():
        return comfy.sample.sample(
            made, start, steps, cfg, "euler", "simple", tiny.conditioning(name), tiny.conditioning(name, seed=tiny.NEGATIVE),
            torch.zeros_like(start), disable_pbar=True, seed=1,
        )  # fmt: skip


def counted(made, name: str) -> tuple[torch.Tensor, int]:
    """The sample, and how often a block of the stack ran."""
    dm, ran = made.model.diffusion_model, Counter()
    handles = [
        # a norm or a table of its own runs in every block that is really computed
        next(iter(block.children())).register_forward_pre_hook(lambda *_, path=path: ran.update([path]))
        for spec in archs.find(dm).blocks
        if spec.stack
        for path, block in archs.block_modules(dm, spec)
    ]
    try:
        return run(made, name), sum(ran.values())
    finally:
        for handle in handles:
            handle.remove()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("name", STACKED)
@pytest.mark.parametrize("level", ["last_block", "block_residual"])
def test_taylor_cache_at_blocks(model, name, level):
    plain, every = counted(model(name), name)
    cached, computed = counted(taylor(model(name), level=level), name)
    full = facts_of(model, name, level)["full"]
    assert 0 < full < 8 and computed == every * full // 8
    assert cached.isfinite().all() and 0 < error(cached, plain) < 1
    assert torch.equal(run(taylor(model(name), level=level, interval=1), name), plain)
    assert torch.equal(run(model(name), name), plain)


def facts_of(model, name: str, level: str) -> dict:
    made = taylor(model(name), level=level)
    run(made, name)
    return facts(made)


@pytest.mark.parametrize("name", tiny.CLASSES)
def test_taylor_cache_at_the_output(model, name):
    plain, made = run(model(name), name), taylor(model(name), level="output")
    assert 0 < error(run(made, name), plain) < 1 and facts(made)["forecast"] > 0


def test_levels_that_cannot_serve(model):
    with pytest.raises(ValueError, match="temporal blocks of Latte alternate"):
        taylor(model("LatteTransformer3DModel"), level="last_block")
    with pytest.raises(ValueError, match="does not know the modules"):
        taylor(model("FluxTransformer2DModel"), level="module")


@pytest.mark.parametrize("name", SOFTMAX)
def test_attention_methods_are_asked(model, name):
    plain, made = run(model(name), name), plan(model(name), Exact())
    assert error(run(made, name), plain) < 1e-5
    dm = made.model.diffusion_model
    blocks = sum(len(archs.block_modules(dm, spec)) for spec in archs.find(dm).blocks if spec.stack)
    twice = sum(getattr(block, "attn2", None) is not None for block in dm.transformer_blocks) if "SD3" in name else 0
    served = facts(made, "Plan")
    evaluations = served["served"] / (blocks + twice)
    assert not served["declined"] and evaluations in (8, 16)  # guidance in one batch or, with unlike masks, in two


@pytest.mark.parametrize("name", SOFTMAX)
def test_window_attention(model, name):
    plain, settings = run(model(name), name), {"min_tokens": 0, "global_every": 0}
    wide = run_node(WindowAttention3d, model=model(name), wt=64, wh=64, ww=64, **settings)[0]
    assert error(run(wide, name), plain) < 1e-5
    small = run_node(WindowAttention3d, model=model(name), wt=1, wh=1, ww=2, **settings)[0]
    assert error(run(small, name), plain) > 1e-3 and facts(small, "Window Attention 3D")["pairs_fraction"] < 1


@pytest.mark.parametrize("name", LINEAR)
def test_linear_attention_is_left_alone(model, name):
    with pytest.raises(ValueError, match="self-attention is linear"):
        run_node(WindowAttention3d, model=model(name))
    warned = run_node(WindowAttention3d, model=model(name), unsupported="warn", min_tokens=0)[0]
    assert torch.equal(run(warned, name), run(model(name), name))


def test_attention_under_a_cache(model):
    name = "FluxTransformer2DModel"
    made = plan(taylor(model(name)), Exact())
    assert error(run(made, name), run(taylor(model(name)), name)) < 1e-5
    assert facts(made, "Plan")["served"] == 4 * facts(made)["full"]


def test_compare(model):
    """The node's own sampling: what a cache saves on a bridged model, and that two plain ones are identical."""
    name = "PixArtTransformer2DModel"
    latent = {"samples": torch.zeros(1, *tiny.TINY[name].latent)}
    inputs = {
        "positive": tiny.conditioning(name), "negative": tiny.conditioning(name, seed=tiny.NEGATIVE), "latent": latent,
        "noise": Noise_RandomNoise(3), "sampler": comfy.samplers.sampler_object("euler"), "repeats": 1, "decode": "none",
        "sigmas": comfy.samplers.calculate_sigmas(model(name).get_model_object("model_sampling"), "simple", 8),
    }  # fmt: skip
    with torch.inference_mode():
        same = run_node(Compare, model_a=model(name), model_b=model(name), **inputs)[3]
        cached = run_node(Compare, model_a=model(name), model_b=taylor(model(name)), **inputs)[3]
    assert same["identical"] and not cached["identical"] and cached["latent_error"] > 0


TOKENS = ["DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel", "LTXVideoTransformer3DModel",
          "FluxTransformer2DModel", "WanTransformer3DModel"]  # fmt: skip


@pytest.mark.parametrize("name", TOKENS)
def test_dynamic_tokens(model, name):
    plain = run(model(name), name)
    made = run_node(DynamicTokens, model=model(name), quantile=0.5, start_percent=0.0)[0]
    assert run(made, name).isfinite().all() and 0 < error(run(made, name), plain) < 1
    assert len({d["kind"] for d in facts(made, "Dynamic Tokens")["decisions"]}) == 2
    every = run_node(DynamicTokens, model=model(name), quantile=0.0, start_percent=0.0)[0]
    assert torch.equal(run(every, name), plain)


@pytest.mark.parametrize("name", TOKENS[:3])
def test_nodes_that_drop_and_merge_tokens(model, name):
    """They act where blocks hold nothing else for single tokens, and refuse elsewhere."""
    plain = run(model(name), name)
    for node in (DynamicGrain, RegionAdaptiveSampling):
        got = run(run_node(node, model=model(name))[0], name)
        assert got.isfinite().all() and 0 < error(got, plain) < 1
    for node in (DynamicGrain, RegionAdaptiveSampling):
        with pytest.raises(ValueError, match="does not know"):
            run_node(node, model=model("WanTransformer3DModel"))


def lora(name: str, prefix: str) -> tuple[dict[str, torch.Tensor], str]:
    """A LoRA on the first linear layer of a block, and the layer's key."""
    keys = [k for k, v in tiny.plain(name).state_dict().items() if k.endswith("to_q.weight") and v.ndim == 2]
    key, rows = keys[0].removesuffix(".weight"), tiny.plain(name).state_dict()[keys[0]].shape
    generator = torch.Generator().manual_seed(2)
    down, up = torch.randn(2, rows[1], generator=generator), torch.randn(rows[0], 2, generator=generator)
    named = key.replace(".", "_") if prefix.endswith("_") else key
    sides = ("lora_down", "lora_up") if prefix.endswith("_") else ("lora_A", "lora_B")
    return {f"{prefix}{named}.{sides[0]}.weight": down, f"{prefix}{named}.{sides[1]}.weight": up}, keys[0]


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", "lora_unet_"])
@pytest.mark.parametrize("name", tiny.CLASSES)
def test_lora_of_diffusers(model, name, prefix):
    plain, (weights, key) = model(name), lora(name, prefix)
    patched = comfy.sd.load_lora_for_models(plain, None, weights, 0.7, 0.0)[0]
    assert list(patched.patches) == [f"diffusion_model.{key}"]
    got, before = run(patched, name, 2), run(plain, name, 2)
    merged = load_merged(name, weights, key)
    assert error(got, run(merged, name, 2)) < 1e-5 and error(got, before) > 1e-4
    assert torch.equal(run(plain, name, 2), before)


def load_merged(name, weights, key):
    import tempfile
    from pathlib import Path

    own, (down, up) = tiny.plain(name).state_dict()[key], weights.values()
    kept = own.clone()
    own.add_(0.7 * up @ down)
    try:
        with tempfile.TemporaryDirectory() as root:
            made = load(str(tiny.save(name, Path(root))))
            made.model.diffusion_model.load_state_dict(
                {k: v.clone() for k, v in made.model.diffusion_model.state_dict().items()}, assign=True
            )
            return made
    finally:
        own.copy_(kept)


@pytest.mark.parametrize("name", tiny.CLASSES)
def test_weights_that_stay_offloaded(model, name):
    """As with too little memory: layers keep their weights on the offload device and cast them when they run, LoRA too."""
    patched = comfy.sd.load_lora_for_models(model(name), None, lora(name, "transformer.")[0], 0.7, 0.0)[0]
    want = run(patched, name, 2)
    patched.detach()
    patched.load(comfy.model_management.get_torch_device(), lowvram_model_memory=1)
    layers = [m for m in patched.model.diffusion_model.modules() if hasattr(m, "comfy_cast_weights")]
    assert patched.lowvram_patch_counter() == 1 and sum(bool(m.weight_function) for m in layers) == 1
    start, positive = tiny.noise(name), tiny.conditioning(name)
    with torch.inference_mode():
        got = comfy.sample.sample(
            patched, start, 2, 2.0, "euler", "simple", positive, tiny.conditioning(name, seed=tiny.NEGATIVE), torch.zeros_like(start),
            disable_pbar=True, seed=1,
        )  # fmt: skip
    patched.detach()
    assert error(got, want) < 1e-5


def test_a_copy_has_weights_of_its_own(model):
    name = "FluxTransformer2DModel"
    first = model(name)
    second = first.clone(force_deepcopy=True)
    assert second.model is not first.model and torch.equal(run(second, name, 2), run(first, name, 2))


def test_off_nodes_change_no_bit(model):
    for name in tiny.CLASSES:
        off = run_node(TaylorCache, model=model(name), interval=1, level="output")[0]
        assert torch.equal(run(off, name, 2), run(model(name), name, 2))


def test_under_torch_compile(model):
    """Graphs around the served attention; a cache goes on deciding at every step."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    name = "FluxTransformer2DModel"
    plain, cached = run(model(name), name, 4), run(taylor(model(name), interval=2, warmup=1), name, 4)
    compiled = model(name)
    set_torch_compile_wrapper(compiled, backend="eager")
    assert error(run(compiled, name, 4), plain) < 1e-5
    both = taylor(compiled, interval=2, warmup=1)
    assert error(run(both, name, 4), cached) < 1e-5 and facts(both)["forecast"] > 0


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel", "SanaTransformer2DModel"])
def test_a_profile_counts_what_torch_counts(model, name):
    """From one computed evaluation: ComfyUI did not build this network."""
    made = model(name)
    job = shared_job(made, name)
    found = measure(made, job, Asked("events", 0))
    with FlopCounterMode(display=False) as counter:
        run(made, name, steps=1)
    assert found.how == "one computed evaluation"
    assert sum(cell.flops for cell in found.counted.cells.values()) == pytest.approx(
        counter.get_total_flops(), rel=2e-3
    )
    total = sum(cell.seconds for cell in found.run.cells.values())
    assert total == pytest.approx(sum(found.run.seconds), rel=0.02) and (name in LINEAR or found.run.lengths)


def shared_job(made, name: str) -> Job:
    start = tiny.noise(name)
    sampler = comfy.samplers.sampler_object("euler")
    sigmas = comfy.samplers.calculate_sigmas(made.get_model_object("model_sampling"), "simple", 2)
    texts = tiny.conditioning(name), tiny.conditioning(name, seed=tiny.NEGATIVE)
    return Job(*texts, {"samples": torch.zeros_like(start)}, sampler, sigmas, Noise_RandomNoise(1), 2.0)
