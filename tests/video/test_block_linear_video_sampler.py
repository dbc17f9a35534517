"""Block Linear Video Sampler: clips of SANA-Video made chunk by chunk through ComfyUI's sampling."""

import gc
import weakref

import comfy.samplers
import diffusers_helper as tiny
import pytest
import torch
from nodes_helper import error, facts, model_of, run_node, taylor
from sana_helper import NAME, empty, model, sampled
from video_state_helper import own_folders, saved

from tessera.methods.video import blocks as plan
from tessera.networks.sana_layers import CHUNK
from tessera.nodes.video.block_linear_video_sampler import BlockLinearVideoSampler
from tessera.nodes.video.load_video_state import LoadVideoState
from tessera.patching import block_stop
from tessera.patching.block_memory import CURRENT, Block
from tessera.patching.block_sampler import renoising
from tessera.patching.linear_memory import LinearMemory
from tessera.patching.run import RUN

STEPS = "1000,500"


def made(plain=None, **inputs):
    """(MODEL, SAMPLER, SIGMAS, state) of the node."""
    inputs = {"frames_per_block": 2, "denoise_steps": STEPS, **inputs}
    return tuple(run_node(BlockLinearVideoSampler, model=model() if plain is None else plain, **inputs)[:4])


def clip(frames: int = 6, plain=None, node=None, **more):
    """What the node's own outputs make; inputs of it and of the sampling."""
    own = {
        key: more.pop(key)
        for key in list(more)
        if key not in ("cfg", "batch", "callback", "positive", "negative", "latent", "seed")
    }
    patched, sampler, sigmas, state = node or made(plain, **own)
    return sampled(patched, sampler, frames, sigmas, **more), state, patched


def test_noise_levels_are_the_steps_through_the_shift():
    sigmas = made(denoise_steps="1000,750,500,250", timestep_shift=3.0)[2]
    assert torch.allclose(sigmas, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))
    released = made(denoise_steps="1000,750,500,250", timestep_shift=8.0)[2]
    assert torch.allclose(1000 * released[:4], torch.tensor([1000.0, 960.0, 889.0, 727.0]), atol=0.5)
    with pytest.raises(ValueError, match="denoise_steps '500,1000' must be falling"):
        made(denoise_steps="500,1000")


def test_one_chunk_is_the_whole_clip_at_once():
    sigmas = made()[2]
    want = sampled(model(), comfy.samplers.KSAMPLER(renoising), 5, sigmas, cfg=2.0)
    got, _, _ = clip(5, frames_per_block=5, cfg=2.0)
    assert error(got, want) < 1e-5
    parts, _, _ = clip(5, frames_per_block=2, cfg=2.0)
    assert error(parts, want) > 1e-2


def test_it_has_its_own_levels_whatever_the_graph_s_sigmas_are():
    patched, sampler, _, _ = made()
    assert torch.equal(sampled(patched, sampler, 6, torch.tensor([1.0, 0.3, 0.0])), clip()[0])


def test_chunks_go_on_from_what_is_kept():
    """The second chunk by hand: a pass over the first one, clean, then two steps from the sums of it."""
    got, _, patched = clip(5, frames_per_block=2)
    net = patched.model.diffusion_model
    c, bounds, sigmas = tiny.conditions(NAME), [0, 3, 5], made()[2]
    own = {name: c[name] for name in ("cross_attn", "attention_mask")}
    held = LinearMemory("test", 2, 0, "fp32", {})

    def x0(x, sigma, number, commit):
        block = Block(number, bounds[number], bounds[number + 1], 5, bounds, commit)
        options = {CURRENT: block}
        held.open(options, block)
        t = torch.full((1,), 1000.0 * sigma)
        v = net.denoise(x, t, own["cross_attn"], own["attention_mask"], options)
        if commit:
            held.finished(block)
        return x - sigma * v

    x0(got[:, :, :3], 0.0, 0, True)
    noise = comfy.sample.prepare_noise(empty(5), 1)[:, :, 3:]
    first = x0(noise, 1.0, 1, False)
    again = plan.renoise(first, float(sigmas[1]), 3, 1, 0)
    assert error(x0(again, float(sigmas[1]), 1, False), got[:, :, 3:]) < 1e-4


@pytest.mark.parametrize(("window", "frames"), [(-1, 8), (2, 8)])
def test_a_clip_that_is_stopped_and_continued_has_the_same_bits(window, frames):
    settings = {"num_cached_blocks": window, "context_noise": 0.1}
    whole, _, _ = clip(frames, batch=2, cfg=2.0, **settings)

    def stop(step, x0, x, total):
        if step == 2:  # in the second chunk
            block_stop.stop()

    first, state, _ = clip(frames, batch=2, cfg=2.0, callback=stop, keep_state=True, **settings)
    assert first.shape[2] == 4 and torch.equal(first, whole[:, :, :4])
    rest, _, _ = clip(frames, batch=2, cfg=2.0, state=state, **settings)
    assert torch.equal(rest, whole)


def test_a_window_forgets():
    all_, one = clip(8)[0], clip(8, num_cached_blocks=1)[0]
    assert torch.equal(all_[:, :, :4], one[:, :, :4]) and error(one[:, :, 4:], all_[:, :, 4:]) > 1e-3
    assert error(clip(8, num_cached_blocks=9)[0], all_) < 1e-5


def test_guidance_keeps_a_state_for_each_prompt():
    same = tiny.conditioning(NAME)
    assert error(clip(cfg=3.0, negative=same)[0], clip(cfg=1.0)[0]) < 1e-4
    longer = [[torch.randn(1, 9, tiny.TEXT), {}]]  # of another length: a call of the network of its own
    assert error(clip(cfg=3.0, negative=longer)[0], clip(cfg=1.0)[0]) > 1e-3


def test_rows_of_a_batch_are_apart():
    one, two = clip(latent=empty(6))[0], clip(latent=empty(6, 2))[0]
    assert error(two[:1, :, :2], one[:, :, :2]) < 1e-5 and error(two[0, :, 2:], two[1, :, 2:]) > 1e-3  # fresh noise


def test_a_prompt_takes_over_with_the_state_that_is_held():
    other = [[torch.randn(1, tiny.TOKENS, tiny.TEXT), {}]]
    plain, changed = clip(8)[0], clip(8, prompt_2=other, prompt_blocks="2")[0]
    assert torch.equal(plain[:, :, :4], changed[:, :, :4]) and error(changed[:, :, 4:], plain[:, :, 4:]) > 1e-3


@pytest.mark.parametrize("level", ["last_block", "module", "output"])
def test_caches_act_within_a_chunk_and_the_state_stays_whole(level):
    """The pass that is kept computes every block; a cache in the steps before it changes the frames alone."""
    steps = {"denoise_steps": "1000,900,800,700,600,500"}
    cached = taylor(model(), level=level, interval=2, warmup=1, tail_full=0)
    got, _, patched = clip(6, plain=cached, **steps)
    off = clip(6, plain=taylor(model(), level=level, interval=1), **steps)[0]
    assert torch.equal(off, clip(6, **steps)[0])
    assert facts(patched)["forecast"] > 0 and got.isfinite().all() and 0 < error(got, off) < 1


def test_an_interrupt_leaves_no_state():
    alive = []

    def interrupt(step, x0, x, total):
        alive.extend(weakref.ref(thing) for thing in gc.get_objects() if type(thing) is LinearMemory)
        if step == 3:
            raise KeyboardInterrupt

    node = made(keep_state=True)
    with pytest.raises(KeyboardInterrupt):
        clip(node=node, callback=interrupt)
    gc.collect()
    assert alive and all(ref() is None for ref in alive)
    options = node[0].model_options["transformer_options"]
    assert CHUNK not in options and "rope_options" not in options and RUN not in options
    with pytest.raises(ValueError, match="empty video state"):
        node[3].taken("Save Video State")
    assert torch.equal(clip(node=node)[0], clip()[0])


def test_in_bf16():
    plain = model()
    plain.set_model_compute_dtype(torch.bfloat16)
    try:
        got = clip(4, plain=plain)[0]
    finally:
        plain.model.manual_cast_dtype = None
    assert 0 < error(got, clip(4)[0]) < 0.1


def test_what_it_holds_is_estimated_and_reported():
    for window in (-1, 2):
        _, _, patched = clip(8, num_cached_blocks=window, batch=2, cfg=2.0, keep_state=True)
        told = facts(patched, "Block Linear Video Sampler")
        feature = patched.model_options["transformer_options"]["tessera_features"][-1]
        run = type("Run", (), {"model": patched.model, "dtype": torch.float32})
        estimate = feature.held_bytes(run, (2, 16, 8, 4, 6), {"positive": [1], "negative": [1]})
        assert told["frames_kept"] == 8 and told["peak_bytes"] == estimate
        assert feature.shown((1, 16, 101, 4, 6)) == (1, 16, 3, 4, 6)


def test_a_model_without_linear_attention_gets_a_sentence():
    with pytest.raises(ValueError, match="self-attention is linear, and this MODEL is WanModel"):
        made(model_of("wan_meta")[0])
    patched, _, sigmas, _ = made()
    with pytest.raises(ValueError, match="does not come from the same node"):
        sampled(patched, made()[1], 4, sigmas)


def test_another_run_s_state_gets_a_sentence():
    _, state, _ = clip(4, keep_state=True)
    with pytest.raises(ValueError, match="num_cached_blocks 0, and here it is 2"):
        clip(8, state=state, num_cached_blocks=2)
    with pytest.raises(ValueError, match="kept of the finished frames for negative 1"):
        clip(8, state=state, cfg=2.0)


@pytest.mark.parametrize("window", [-1, 1])
def test_a_saved_clip_goes_on_bit_for_bit(tmp_path, monkeypatch, window):
    own_folders(tmp_path, monkeypatch)
    settings = {"num_cached_blocks": window, "state_dtype": "bf16"}
    stop = lambda step, x0, x, total: block_stop.stop() if step == 2 else None  # noqa: E731
    _, state, _ = clip(8, cfg=2.0, callback=stop, keep_state=True, **settings)
    loaded = run_node(LoadVideoState, file=f"{saved(state)} [output]").args[0]
    assert torch.equal(clip(8, cfg=2.0, state=loaded, **settings)[0], clip(8, cfg=2.0, **settings)[0])
