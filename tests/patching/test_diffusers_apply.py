"""Our methods on pipelines of diffusers in a script: what they do there, and what they leave behind."""

import copy
import weakref

import diffusers
import diffusers_helper as tiny
import pytest
import torch
from attention_helper import Exact, Refuses

from tessera.methods.attention.rettention import Rettention
from tessera.methods.attention.window_3d import Window3D
from tessera.patching.diffusers import Cache, apply, remove

STEPS = 8
SIGMAS = [1 - i / STEPS for i in range(STEPS)]
EMPTY = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
FLUX, WAN, COG, PIXART, SANA, LATTE, SD3 = (
    "FluxTransformer2DModel", "WanTransformer3DModel", "CogVideoXTransformer3DModel", "PixArtTransformer2DModel",
    "SanaTransformer2DModel", "LatteTransformer3DModel", "SD3Transformer2DModel",
)  # fmt: skip
SIZES = {
    FLUX: (64, 96),
    WAN: (32, 48),
    COG: (32, 48),
    PIXART: (64, 96),
    SANA: (192, 128),
    LATTE: (64, 32),
    SD3: (64, 96),
}
MORE = {"tokenizer_2": None, "text_encoder_2": None}
KINDS = {
    FLUX: ("FluxPipeline", MORE, {}),
    WAN: ("WanPipeline", {}, {"num_frames": 9}),
    COG: ("CogVideoXPipeline", {}, {"num_frames": 9}),
    PIXART: ("PixArtAlphaPipeline", {}, {"use_resolution_binning": False, "prompt": None, "negative_prompt": None}),
    SANA: (
        "SanaPipeline",
        {},
        {"use_resolution_binning": False, "complex_human_instruction": None, "negative_prompt": None},
    ),
    LATTE: ("LattePipeline", {}, {"video_length": 3, "mask_feature": False, "negative_prompt": None}),
    SD3: ("StableDiffusion3Pipeline", {**MORE, "tokenizer_3": None, "text_encoder_3": None}, {}),
}


def pipeline(name: str):
    """(pipeline, function that runs it and gives its latent)."""
    kind, parts, extra = KINDS[name]
    pipe = getattr(diffusers, kind)(**EMPTY, **parts, scheduler=tiny.scheduler(name), transformer=tiny.plain(name))
    pipe.set_progress_bar_config(disable=True)
    yes, no = tiny.conditions(name), tiny.conditions(name, seed=tiny.NEGATIVE)
    given = {"prompt_embeds": yes["cross_attn"]}
    if name != FLUX:
        given["negative_prompt_embeds"] = no["cross_attn"]
    if "pooled_output" in yes:
        given["pooled_prompt_embeds"] = yes["pooled_output"]
        given |= {} if name == FLUX else {"negative_pooled_prompt_embeds": no["pooled_output"]}
    if "attention_mask" in yes:
        given |= {
            "prompt_attention_mask": yes["attention_mask"],
            "negative_prompt_attention_mask": no["attention_mask"],
        }
    start = tiny.noise(name)
    start = start.transpose(1, 2) if name == COG else start
    start = pipe._pack_latents(start, 1, 16, 8, 12) if name == FLUX else start
    height, width = SIZES[name]

    def run(**changes):
        return pipe(
            **{**given, **extra, "latents": start.clone(), "num_inference_steps": STEPS, "height": height, "width": width,
               "output_type": "latent", "return_dict": False, "guidance_scale": 3.0, **changes}
        )[0]  # fmt: skip

    return pipe, run


@pytest.fixture(params=KINDS)
def case(request):
    pipe, run = pipeline(request.param)
    yield request.param, pipe, run
    remove(pipe)


def error(got, want):
    return ((got - want).norm() / want.norm()).item()


def test_nothing_applied_and_removed_change_no_bit(case):
    name, pipe, run = case
    plain, kind = run(), type(pipe)
    processors = [m.get_processor() for m in pipe.transformer.modules() if hasattr(m, "get_processor")]
    attention = () if name == SANA else Refuses()
    applied = apply(pipe, attention=attention, cache=Cache(interval=1, level="output"), min_tokens=0)
    assert torch.equal(run(), plain) and applied.facts[0]["forecast"] == 0 and applied.facts[0]["steps"] == STEPS
    remove(pipe)
    remove(pipe)
    assert type(pipe) is kind and torch.equal(run(), plain) and "step" not in pipe.scheduler.__dict__
    assert all("forward" not in m.__dict__ and "_tessera_applied" not in m.__dict__ for m in pipe.transformer.modules())
    assert processors == [m.get_processor() for m in pipe.transformer.modules() if hasattr(m, "get_processor")]


def test_dense_attention_as_a_method(case):
    name, pipe, run = case
    plain = run()
    if name == SANA:
        with pytest.raises(ValueError, match="its self-attention is linear"):
            apply(pipe, attention=Exact())
        return
    applied = apply(pipe, attention=Exact(), min_tokens=0)
    assert error(run(), plain) < 1e-5
    (facts,) = applied.facts
    stack = len(pipe.transformer.blocks if name == WAN else pipe.transformer.transformer_blocks)
    a_call = {FLUX: stack + 2, SD3: stack + 1}.get(name, stack)
    assert facts["served"] == facts["calls"] * a_call and not facts["declined"]
    assert facts["calls"] == STEPS * (2 if name == WAN else 1)


def test_windows(case):
    name, pipe, run = case
    if name == SANA:
        return
    plain = run()
    apply(pipe, attention=Window3D(64, 64, 64, global_every=0), min_tokens=0)
    assert error(run(), plain) < 1e-5
    remove(pipe)
    applied = apply(pipe, attention=Window3D(1, 1, 2, global_every=0), min_tokens=0, blocks=[0], dense_steps=(2, 1))
    assert error(run(), plain) > 1e-4
    (facts,) = applied.facts
    calls = facts["calls"] // STEPS
    times = 2 if name == SD3 else 1  # its first block attends to the image twice
    assert facts["served"] == times * calls * (STEPS - 3)
    assert facts["declined"]["outside the chosen steps"] > 0 and facts["declined"]["outside the chosen blocks"] > 0


def blocks_run(pipe, run):
    """(latent, how often a block of the pipeline's transformer was computed), seen from outside."""
    seen, model = [], pipe.transformer
    lists = [getattr(model, n, []) for n in ("transformer_blocks", "single_transformer_blocks", "blocks")]
    handles = [
        next(iter(block.children())).register_forward_pre_hook(lambda *_: seen.append(1))
        for part in lists
        for block in part
    ]
    try:
        return run(), len(seen)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("level", ["last_block", "output"])
def test_cache(case, level):
    name, pipe, run = case
    plain, every = blocks_run(pipe, run)
    cache = Cache(interval=3, warmup=2, tail_full=1, level=level)
    if name == LATTE and level == "last_block":
        with pytest.raises(ValueError, match=r"temporal blocks of Latte alternate.*level='output'"):
            apply(pipe, cache=cache)
        return
    applied = apply(pipe, cache=cache)
    got, computed = blocks_run(pipe, run)
    (facts,) = applied.facts
    assert facts["forecast"] == 4 and computed == every * 4 // STEPS  # computed: 0, 1, 4, 7
    assert got.isfinite().all() and 0 < error(got, plain) < 1
    assert torch.equal(run(), got)  # the next call starts anew


def test_a_whole_output_by_hand():
    """Level output at order 0: what the transformer gave last."""
    pipe, run = pipeline(SANA)
    applied = apply(pipe, cache=Cache(interval=2, order=0, warmup=1, tail_full=0, level="output"))
    given = []
    pipe.transformer.register_forward_hook(lambda m, a, out: given.append(out[0].clone()))
    run()
    assert applied.facts[0]["forecast"] == STEPS // 2
    for step in range(0, STEPS, 2):
        assert torch.equal(given[step], given[step + 1]) and (
            step == 0 or not torch.equal(given[step], given[step - 1])
        )
    pipe.transformer._forward_hooks.clear()
    remove(pipe)


def test_guidance_that_ends_within_a_run():
    """A transformer that is called with another batch starts anew instead of answering in the old shape."""
    transformer = tiny.plain(WAN)
    applied, steps = apply(transformer, cache=Cache(interval=4, warmup=1, tail_full=0)), tiny.scheduler(WAN)
    x, text = tiny.noise(WAN), torch.randn(1, 512, tiny.TEXT)
    steps.set_timesteps(sigmas=SIGMAS)
    with torch.no_grad(), applied.running(steps):
        for i, t in enumerate(steps.timesteps):
            rows = 2 if i < 3 else 1
            made = transformer(
                x.expand(rows, -1, -1, -1, -1), timestep=t.expand(rows), encoder_hidden_states=text.expand(rows, -1, -1)
            ).sample
            assert made.shape[0] == rows
            x = steps.step(made[:1], t, x, return_dict=False)[0]
    remove(transformer)
    assert applied.facts[0]["forecast"] == 5 and applied.facts[0]["steps"] == STEPS  # 1 and 2, then 4, 5 and 6


def test_two_transformers():
    """Wan 2.2: one for the noisy steps, one for the others; each warms up for itself."""
    name = WAN
    parts = {"transformer": tiny.plain(name), "transformer_2": copy.deepcopy(tiny.plain(name))}
    pipe = diffusers.WanPipeline(**EMPTY, **parts, scheduler=tiny.scheduler(name), boundary_ratio=0.5)
    pipe.set_progress_bar_config(disable=True)
    text = tiny.conditions(name)["cross_attn"]
    applied = apply(pipe, attention=Exact(), cache=Cache(interval=2, warmup=1, tail_full=0), min_tokens=0)
    pipe(
        prompt_embeds=text, negative_prompt_embeds=-text, latents=tiny.noise(name), num_inference_steps=STEPS, num_frames=9,
        height=32, width=48, output_type="latent",
    )  # fmt: skip
    early, late = applied.facts
    assert early["calls"] + late["calls"] == 2 * STEPS and min(early["calls"], late["calls"]) >= 6
    for facts in (early, late):
        computed = facts["calls"] // 2 - facts["forecast"]
        assert facts["forecast"] == facts["calls"] // 4 and facts["served"] == 2 * 2 * computed
    remove(pipe)
    assert not any("forward" in m.__dict__ for part in parts.values() for m in part.modules())


def test_nothing_is_left_after_an_error():
    pipe, run = pipeline(FLUX)
    plain = run()
    applied = apply(pipe, attention=Exact(), cache=Cache(), min_tokens=0)
    seen = []

    def stop(pipe, step, *_):
        (part,) = applied.parts
        seen.extend(weakref.ref(history) for history in part.run.histories.values())
        if step == 3:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        run(callback_on_step_end=stop)
    assert seen and not any(ref() for ref in seen)
    assert applied.parts[0].run is None and "step" not in pipe.scheduler.__dict__
    assert applied.facts[0]["steps"] == 4
    got = run()
    assert applied.facts[0]["steps"] == STEPS and error(got, plain) < 1
    remove(pipe)
    assert torch.equal(run(), plain)


def test_outside_a_run_the_transformer_is_plain():
    pipe, _ = pipeline(PIXART)
    plain = tiny.predict(PIXART, tiny.noise(PIXART), torch.tensor(500), tiny.conditions(PIXART))
    apply(pipe, attention=Window3D(1, 1, 1), min_tokens=0)
    assert torch.equal(tiny.predict(PIXART, tiny.noise(PIXART), torch.tensor(500), tiny.conditions(PIXART)), plain)
    remove(pipe)


def test_a_method_that_remembers():
    """Rettention asks for steps, streams and the place of a call."""
    pipe, run = pipeline(COG)
    applied = apply(pipe, attention=Rettention(), min_tokens=0)
    assert run().isfinite().all() and sum(applied.facts[0]["declined"].values()) + applied.facts[0]["served"] > 0
    remove(pipe)


def test_what_is_refused():
    pipe, _ = pipeline(FLUX)
    with pytest.raises(ValueError, match="tokens and blocks of Linear are not known"):
        apply(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="blocks 0 to 3, there is no block 4"):
        apply(pipe, attention=Exact(), blocks=[4])
    with pytest.raises(ValueError, match="Unknown level 'block'"):
        Cache(level="block")
    with pytest.raises(ValueError, match="has no transformer"):
        apply(diffusers.DDPMPipeline(torch.nn.Identity(), diffusers.DDIMScheduler()))
    apply(pipe, attention=Exact())
    with pytest.raises(ValueError, match=r"Call remove\(pipe\) first"):
        apply(pipe, attention=Exact())
    remove(pipe)
