"""A pose on DynamiCtrl's MODEL: what the release's forward gives, one chain a step for all rows, and nothing where it
does not act."""

from dataclasses import replace

import pytest
import torch
from dynamictrl_helper import KINDS, SAMPLE, SIGMAS, apart, called, loaded, pose, posed, spec
from nodes_helper import Job, error, facts, run_node

import tessera.methods.control.dynamictrl as method
from tessera.kernels.norm.pose_modulate import pose_modulate
from tessera.nodes.control.apply_pose_control import ApplyPoseControl
from tessera.patching.dynamictrl import tokens

NAME = "Apply Pose Control"


@pytest.fixture
def counted(monkeypatch):
    """Every link of a chain that is computed, by the shape of its pose tokens."""
    calls = []

    def spy(c, *args):
        calls.append(tuple(c.shape))
        return pose_modulate(c, *args)

    monkeypatch.setattr(method, "pose_modulate", spy)
    return calls


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_the_release_computes(kind, cache):
    model, official = loaded(kind)
    text = 226 if kind == "learned" else 10
    patched = posed(model, pose(kind), strength=0.8, cache_per_step=cache)
    z = model.model.process_latent_in(pose(kind)["samples"])
    seen = called(patched, Job(spec(kind, text), sigmas=SIGMAS[2:5]))
    assert len(seen) == 2
    for (x, timestep, context, ofs), out in seen:
        want = official(x, context, timestep, z.expand(len(x), -1, -1, -1, -1), ofs, strength=0.8)
        assert error(out, want) < 1e-5
        assert error(out, official(x, context, timestep, None, ofs)) > 1e-2, "the pose is seen"


def test_strength_0_and_steps_outside_are_the_model_bit_for_bit():
    model, _ = loaded()
    job = Job(spec(), steps=6)
    plain = job(model)
    off = posed(model, strength=0.0)
    assert torch.equal(job(off), plain) and facts(off, NAME) == {"strength": 0.0, "calls": 0, "chains": 0, "steps": 0}
    outputs = {}
    for start, end in ((0.0, 0.5), (0.5, 1.0), (0.0, 1.0)):
        patched = posed(model, start_percent=start, end_percent=end)
        outputs[start, end] = job(patched)
        assert (facts(patched, NAME)["calls"] == 6) == ((start, end) == (0.0, 1.0)) and facts(patched, NAME)[
            "calls"
        ] > 0
    late = called(posed(model, start_percent=0.5), replace(job, cfg=1.0))
    stock = called(model, replace(job, cfg=1.0))
    assert torch.equal(late[0][1], stock[0][1]) and not torch.equal(late[-1][1], stock[-1][1])
    assert error(outputs[0.0, 0.5], plain) > 1e-3 and error(outputs[0.5, 1.0], outputs[0.0, 1.0]) > 1e-3
    assert torch.equal(job(model), plain)


def test_the_chain_of_one_row_serves_a_batch():
    """Computed with batch 1 and broadcast: what two rows of the same pose give each for itself."""
    model, _ = loaded()
    network = model.model.diffusion_model
    c = torch.randn(1, 72, 128, generator=torch.Generator().manual_seed(0))
    norms, temb = posed(model).get_attachment("tessera_dynamictrl").norms, torch.randn(1, 32)
    base = torch.randn(2, 72, 128)
    for norm in norms:
        one, after = norm(c, temb, base, 0.5)
        two, both = norm(c.expand(2, -1, -1), temb.expand(2, -1), base, 0.5)
        assert torch.allclose(one, two, atol=1e-6) and torch.allclose(after.expand(2, -1, -1), both, atol=1e-6)
        c = after
    z = torch.randn(2, 16, 3, *SAMPLE)
    each = torch.cat([tokens(network, row[None], torch.float32) for row in z])
    assert torch.allclose(tokens(network, z, torch.float32), each, atol=1e-5)
    job = Job(spec(), steps=2, batch=2)
    twice = {"samples": pose()["samples"].repeat(2, 1, 1, 1, 1)}
    assert error(job(posed(model)), job(posed(model, twice))) < 1e-6


def test_the_chain_is_computed_once_a_step(counted):
    model, _ = loaded()
    job = Job(spec(), steps=4)
    for batch in (1, 3):
        counted.clear()
        patched = posed(model)
        replace(job, batch=batch)(patched)
        assert counted == [(1, 72, 128)] * 2 * 4, "2 blocks, 4 steps, one row for cond and uncond of all pictures"
        assert facts(patched, NAME) == {"strength": 1.0, "calls": 4, "chains": 4, "steps": 8}
    for cache, chains in ((True, 4), (False, 8)):
        counted.clear()
        patched = apart(posed(model, cache_per_step=cache))
        job(patched)
        assert len(counted) == 2 * chains and facts(patched, NAME)["calls"] == 8, (
            "cond and uncond in calls of their own"
        )


def test_equal_timesteps_share_a_chain(counted):
    model, _ = loaded()
    patched = posed(model)
    Job(spec(), steps=3, sampler="heun")(patched)
    told = facts(patched, NAME)
    assert told["calls"] == 5 and told["chains"] == 3, "heun's second evaluation is at the next step's timestep"


def test_text_rows_of_the_attention_input_are_unchanged():
    """The same hidden states into one norm1, with and without the pose."""
    model, _ = loaded()
    found, job = {}, Job(spec(), steps=1)
    for name, patched in (("plain", model), ("posed", posed(model, strength=0.7))):
        network = patched.model.diffusion_model
        handle = network.blocks[0].norm1.register_forward_hook(
            lambda _, args, out, name=name: found.update({name: (args, out)})
        )
        try:
            job(patched)
        finally:
            handle.remove()
    (given, plain), (same, out) = found["plain"], found["posed"]
    assert all(torch.equal(a, b) for a, b in zip(given, same, strict=True))
    assert torch.equal(out[1], plain[1]) and all(torch.equal(a, b) for a, b in zip(out[2:], plain[2:], strict=True))
    added = (out[0] - plain[0]) / 0.7
    assert added.abs().max() > 0.1 and torch.allclose(added[0], added[1], atol=1e-4), "the same to every row"


class Vae:
    """Frames to a latent a fourth as long and an eighth as wide."""

    def encode(self, pixels):
        t, h, w, _ = pixels.shape
        mean = pixels.mean(-1)[None, None, ::4].expand(1, 16, -1, -1, -1)
        return torch.nn.functional.interpolate(mean, (1 + (t - 1) // 4, h // 8, w // 8))


def test_a_pose_video_goes_through_the_vae():
    model, _ = loaded()
    video = torch.rand(9, SAMPLE[0] * 8, SAMPLE[1] * 8, 3)
    made_of = run_node(ApplyPoseControl, model=model, pose_video=video, vae=Vae())[0]
    job = Job(spec(), steps=2)
    assert torch.equal(job(made_of), job(posed(model, {"samples": Vae().encode(video)})))
    with pytest.raises(ValueError, match="needs a VAE"):
        run_node(ApplyPoseControl, model=model, pose_video=video)
    for both in ({}, {"pose_video": video, "latent": pose()}):
        with pytest.raises(ValueError, match="from a pose_video or from a latent, and (both are|neither is) connected"):
            run_node(ApplyPoseControl, model=model, **both)


def test_the_line():
    model, _ = loaded()
    patched = posed(model)
    feature = patched.model_options["transformer_options"]["tessera_features"][-1]
    assert feature.line(feature.facts(None)).startswith("it did not act")
    Job(spec(), steps=2)(patched)
    assert feature.line(facts(patched, NAME)) == "pose in 2 calls of the model, 2 chains computed"
