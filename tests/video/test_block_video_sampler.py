"""Block Video Sampler: equal to core's block-causal sampler, to the plain run in one block, and to a masked model."""

import dataclasses
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from block_helper import SIGMAS, clip, euler, made, masked, node, sampled
from nodes_helper import error, facts, kinds, model_of, run_node, taylor, watching
from profile_helper import profiled
from tiny_models import conds, load, write_checkpoint
from tiny_specs import SPECS

import comfy.sample  # isort: skip
import comfy.samplers  # isort: skip
import folder_paths  # isort: skip
from comfy_extras.nodes_easycache import LazyCacheNode  # isort: skip
from comfy.model_management import InterruptProcessingException  # isort: skip

from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.nodes.control.tiled_latents import TiledLatents
from tessera.patching.block_features import feature_of
from tessera.patching.block_memory import Block
from tessera.patching.run import Run


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(core's causal model, the stock one of the same weights, their spec)."""
    folder, causal = tmp_path_factory.mktemp("blocks"), SPECS["wan_ar"]
    plain = dataclasses.replace(causal, metadata={k: v for k, v in causal.metadata.items() if k != "causal_ar"})
    models = []
    for name, spec in (("causal", causal), ("plain", plain)):
        write_checkpoint(spec, folder / f"{name}.safetensors")
        models.append(load(folder / f"{name}.safetensors"))
    names = [type(model.model.diffusion_model).__name__ for model in models]
    assert names == ["CausalWanModel", "WanModel"]
    return *models, causal


@pytest.fixture(scope="module")
def core(pair):
    """What core's sampler makes of 6 frames in blocks of 2."""
    return sampled(pair[0], pair[2], comfy.samplers.ksampler("ar_video", {"num_frame_per_block": 2}), frames=6)


@pytest.mark.parametrize("which", [0, 1], ids=["causal class", "stock class"])
def test_it_equals_cores_sampler(pair, core, which):
    assert error(made(pair[which], pair[2], run={"frames": 6}), core) < 1e-5


def test_a_start_image_is_that_of_cores_node(pair):
    ar, plain, spec = pair
    start, found = torch.randn(1, 16, 1, 8, 8), []
    core = comfy.samplers.ksampler("ar_video", {"num_frame_per_block": 2})
    for model, sampler in ((ar, core), node(plain)[:2]):
        model = model.clone()
        model.model_options["transformer_options"]["ar_config"] = {"initial_latent": start}
        found.append(sampled(model, spec, sampler, frames=5))
    assert error(found[1], found[0]) < 1e-5 and error(found[1][:, :, :1], start) < 1e-5


def test_one_block_is_the_plain_run(pair):
    want = sampled(*pair[1:], euler(), cfg=3.0)
    assert error(made(*pair[1:], frames_per_block=4, sampler=euler(), run={"cfg": 3.0}), want) < 1e-6


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize(("window", "sink"), [(0, 0), (1, 0), (1, 1), (2, 3)])
def test_it_equals_a_masked_model(pair, cfg, window, sink):
    """Of 7 frames by 2: blocks of 3, 2 and 2."""
    got = made(*pair[1:], window_blocks=window, sink_frames=sink, run={"frames": 7, "cfg": cfg})
    want = masked(*pair[1:], [0, 3, 5, 7], cfg, window, sink)
    assert error(got, want) < 1e-5
    if window == 1 and not sink:
        assert error(got, masked(*pair[1:], [0, 3, 5, 7], cfg)) > 1e-3  # the window matters


def test_keys_on_the_cpu_change_nothing(pair):
    run = {"frames": 6, "cfg": 3.0}
    assert torch.equal(made(*pair[1:], keep_keys_on="cpu", run=run), made(*pair[1:], run=run))


@pytest.mark.parametrize(("stored", "bound"), [("fp8_e4m3", 2e-3), ("int8", 5e-4)])
def test_keys_of_8_bits(pair, core, stored, bound):
    patched, sampler, _ = node(pair[1], key_dtype=stored)
    got = sampled(patched, pair[2], sampler, frames=6)
    assert 1e-5 < error(got, core) < bound
    plain, sampler, _ = node(pair[1])
    sampled(plain, pair[2], sampler, frames=6)
    held = [facts(model, "Block Video Sampler")["peak_bytes"] for model in (patched, plain)]
    assert held[0] < 0.35 * held[1]


def test_memory_is_flat_behind_a_window(pair):
    held = []
    for frames in (8, 24):
        patched, sampler, _ = node(pair[1], window_blocks=1, sink_frames=1)
        sampled(patched, pair[2], sampler, frames=frames)
        held.append(facts(patched, "Block Video Sampler")["peak_bytes"])
    assert held[0] == held[1] > 0


def test_a_batch_is_its_clips(pair):
    both = made(*pair[1:], run={"frames": 4, "batch": 2})
    assert torch.isfinite(both).all() and error(both[0], both[1]) > 0.1


def test_a_plan_sees_finished_frames_as_frames(pair):
    """A window that spans the clip is dense attention; one of a frame's neighbours leaves the pairs of far frames out."""
    run = {"frames": 6, "cfg": 3.0}
    want = made(*pair[1:], run=run)
    found = {}
    for reach in (8, 1):
        patched, sampler, _ = node(pair[1])
        patched = run_node(LocalWindowAttention, model=patched, radius=8, temporal_radius=reach, min_tokens=0)[0]
        found[reach] = error(sampled(patched, pair[2], sampler, **run), want), facts(patched, "Local Window Attention")
    assert found[8][0] < 1e-5 < 1e-3 < found[1][0]
    told = found[1][1]
    assert told["served"] == 2 * (
        3 + 3
    )  # of two blocks of the model, the evaluations of the second and third of the clip
    assert told["pairs_fraction"] < 0.8 and told["declined"]["outside the chosen steps"] == 4  # the commit passes


def test_a_cache_skips_inside_blocks_but_never_a_commit_pass(pair):
    sigmas = torch.linspace(1, 0, 13)
    run = {"frames": 6, "sigmas": sigmas}
    want = made(*pair[1:], sampler=euler(), run=run)
    patched, sampler, _ = node(pair[1], sampler=euler())
    patched = taylor(patched, tail_full=0)
    with watching(patched) as watch:
        got = sampled(patched, pair[2], sampler, **run)
    told = facts(patched)
    assert told["restarts"] == 2 and told["forecast"] == 3 * kinds(patched)[:12].count("p") > 0
    assert len(told["decisions"]) == 36 and watch.each == [told["full"] + 2] * 2  # and two commit passes in full
    assert 0 < error(got, want) < 0.2


def test_another_packs_override_gets_the_keys_too(pair):
    seen = []

    def theirs(func, q, k, v, *args, **kwargs):
        seen.append((q.shape[-2], k.shape[-2]))
        return func(q, k, v, *args, **kwargs)

    patched, sampler, _ = node(pair[1])
    patched.model_options["transformer_options"]["optimized_attention_override"] = theirs
    got = sampled(patched, pair[2], sampler)
    assert error(got, made(*pair[1:])) == 0 and (32, 64) in seen


def test_an_interrupt_leaves_nothing(pair):
    patched, sampler, _ = node(pair[1])
    kept = []

    def stop(step, x0, x, total):
        run = next(o for o in gc.get_objects() if type(o) is Run and o.states)
        memory = next(iter(run.states.values()))
        if memory.chunks:
            kept.extend([weakref.ref(memory), weakref.ref(next(iter(memory.chunks.values())))])
            raise InterruptProcessingException

    with pytest.raises(InterruptProcessingException):
        sampled(patched, pair[2], sampler, frames=6, callback=stop)
    gc.collect()
    assert len(kept) == 2 and all(ref() is None for ref in kept)
    options = patched.model_options["transformer_options"]
    assert not {"tessera_block", "tessera_run", "rope_options", "context_window"} & set(options)
    assert "context_handler" not in patched.model_options


def test_wrong_models_get_a_sentence(pair):
    with pytest.raises(ValueError, match="Flux does not let it do"):
        node(model_of("flux")[0])
    with pytest.raises(ValueError, match="its own time step, which LTX"):
        node(model_of("ltxv_meta")[0], memory="frames")
    with pytest.raises(ValueError, match="which VaceWanModel does not take"):
        node(model_of("wan_vace")[0], memory="frames")
    with pytest.raises(ValueError, match="does not come from the same node"):
        sampled(pair[1], pair[2], node(pair[1])[1])
    with pytest.raises(ValueError, match="on this MODEL already"):
        node(node(pair[1])[0])
    with pytest.raises(ValueError, match="computes them in parts"):
        run_node(TiledLatents, model=node(pair[1])[0])
    patched, sampler, _ = node(pair[1])
    patched = LazyCacheNode.execute(patched, 0.2, 0.15, 0.95, False).args[0]
    with pytest.raises(ValueError, match="EasyCache and LazyCache compare"):
        sampled(patched, pair[2], sampler)


@pytest.mark.parametrize("sink", [0, 1])
def test_frames_stay_in_the_sequence_clean(pair, sink):
    """Of 6 frames by 2 behind a window of 2: the bare network with its own time step for each frame."""
    _, model, spec = pair
    network, positive = model.model.diffusion_model, conds(spec)[0][0][0]
    got = made(model, spec, memory="frames", sink_frames=sink, sampler=euler(), run={"frames": 6})
    x = noise = comfy.sample.prepare_noise(clip(spec, 6), 1)
    with torch.inference_mode():
        for past, first, last in (([], 0, 4), ([0] * sink + [2, 3], 4, 6)):
            block = noise[:, :, first:last]
            for sigma, following in zip(SIGMAS.tolist(), SIGMAS.tolist()[1:], strict=False):
                times = torch.tensor([[0.0] * len(past) + [sigma * 1000] * (last - first)])
                v = network(torch.cat([x[:, :, past], block], 2), times, positive, transformer_options={})
                block = block + (following - sigma) * v[:, :, len(past) :]
            x = torch.cat([x[:, :, :first], block], 2)
    assert error(got, model.model.process_latent_out(x)) < 1e-5


def test_other_families_in_one_block():
    model, spec = model_of("kandinsky5")
    want = sampled(model, spec, euler(), frames=4, cfg=3.0)
    assert error(made(model, spec, frames_per_block=4, sampler=euler(), run={"cfg": 3.0}), want) < 1e-6
    patched, sampler, _ = node(model)
    cut = sampled(patched, spec, sampler, cfg=3.0)
    assert facts(patched, "Block Video Sampler")["frames_kept"] == 2 and error(cut[:, :, 2:], want[:, :, 2:]) > 1e-3


def test_a_model_with_frame_times_of_its_own_keeps_them():
    """Wan 2.2 TI2V tells a time step for each frame where a mask is connected."""
    feature = feature_of("frames", None, 2, 1, 0, "model dtype", "device")
    block = Block(1, 4, 6, 6, [0, 4, 6], prefix=[2, 3])
    for told in (torch.tensor([700.0, 700.0]), torch.tensor([[700.0, 700.0, 0.0, 700.0]] * 2)):
        forward = SimpleNamespace(options={"tessera_block": block}, inputs={"timestep": told})
        got = feature.other_inputs(None, forward)["timestep"]
        last = [[700.0, 700.0], [0.0, 700.0]][told.ndim - 1]
        assert got.tolist() == [[0.0, 0.0, *last]] * 2
    assert feature.other_inputs(None, SimpleNamespace(options={}, inputs={"timestep": told})) == {}


def test_noise_in_the_context_is_seeded(pair):
    run = {"frames": 6}
    clean, noisy, again = (made(*pair[1:], context_noise=level, run=run) for level in (0.0, 0.4, 0.4))
    assert torch.equal(noisy, again) and torch.equal(noisy[:, :, :2], clean[:, :, :2])
    assert error(noisy[:, :, 2:], clean[:, :, 2:]) > 1e-3


def test_further_prompts_of_the_node(pair):
    other, spec = [[torch.randn_like(conds(pair[2])[0][0][0]), {}]], pair[2]
    plain = made(*pair[1:], run={"frames": 6})
    changed = made(*pair[1:], prompt_2=other, prompt_blocks="2", run={"frames": 6})
    assert torch.equal(plain[:, :, :4], changed[:, :, :4]) and error(changed[:, :, 4:], plain[:, :, 4:]) > 1e-3
    same = made(*pair[1:], prompt_2=conds(spec)[0], prompt_blocks="1", run={"frames": 6, "cfg": 3.0})
    assert torch.equal(same, made(*pair[1:], run={"frames": 6, "cfg": 3.0}))  # its keys are those of the first prompt
    for blocks, sentence in (("one", "not numbers"), ("", "names 0 blocks for 1"), ("0", "must rise from 1")):
        with pytest.raises(ValueError, match=sentence):
            node(pair[1], prompt_2=other, prompt_blocks=blocks)
    with pytest.raises(ValueError, match="must rise from 1"):
        node(pair[1], prompt_2=other, prompt_3=other, prompt_blocks="2, 2")


@pytest.mark.parametrize("memory", ["keys", "frames"])
def test_a_report_tells_what_the_last_block_looked_back_on(pair, memory):
    patched, sampler, _ = node(pair[1], memory=memory, window_blocks=1)
    sampled(patched, pair[2], sampler, frames=7)
    assert facts(patched, "Block Video Sampler")["frames_kept"] == 2


@pytest.mark.parametrize("mode", ["analytic", "events", "trace"])
def test_profile_model_measures_its_blocks(pair, mode, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    patched, sampler, _ = node(pair[1], sampler=euler())
    told = profiled(patched, pair[2], mode=mode, sampler=sampler, latent={"samples": clip(pair[2], 6)})
    assert {row["queries"] for row in told["attention"]} == {2 * 16}  # a block of 2 frames, not the clip
