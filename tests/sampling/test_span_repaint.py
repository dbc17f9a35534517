"""Span Repaint: the rest of the clip stays, the span is the published loop's, and times that make no sense are refused."""

import math

import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from flow_helper import guider_of, sample, schedule
from nodes_helper import conds, error, facts, model_of, run_node, taylor

from tessera.methods.sampling.span import Span, first_step, span_of, turned
from tessera.nodes.sampling.omega_euler import OmegaEuler
from tessera.nodes.sampling.rf_solver_sampler import RfSolverSampler
from tessera.nodes.sampling.span_repaint import SpanRepaint

EULER = comfy.samplers.sampler_object("euler")


def clip(spec):
    return torch.randn(spec.latent, generator=torch.Generator().manual_seed(3))


def repaint(samples, sigmas=None, kind=None, **inputs):
    latent = {"samples": samples, **({"type": kind} if kind else {})}
    inputs = {"start_s": 1.0, "end_s": 2.0, "rate": 1.0, **inputs}
    return run_node(SpanRepaint, latent=latent, noise=Noise_RandomNoise(7), sigmas=schedule(4) if sigmas is None else sigmas,
                    **inputs)  # fmt: skip


def painted(model, spec, sampler, made, cfg=3.0):
    latent, noise, sigmas = made[0], made[1], made[2]
    guider = guider_of(model, *conds(spec), cfg)
    return sample(guider, sampler, sigmas, latent["samples"], noise=noise, mask=latent["noise_mask"])


@pytest.mark.parametrize("sampler", ["euler", "rf_solver", "omega", "dpmpp_2m"])
def test_the_rest_is_the_source_at_the_end(sampler):
    model, spec = model_of("wan")
    source = clip(spec)
    chosen = {"rf_solver": lambda: run_node(RfSolverSampler)[0], "omega": lambda: run_node(OmegaEuler)[0]}
    one = chosen.get(sampler, lambda: comfy.samplers.sampler_object(sampler))()
    out = painted(model, spec, one, repaint(source))
    rest = [i for i in range(source.shape[2]) if i != 1]
    assert error(out[:, :, rest], source[:, :, rest]) < 1e-5 and error(out[:, :, 1], source[:, :, 1]) > 0.05


def test_it_is_the_published_loop():
    """Start at z_src of the first step that is run; after each Euler step the noised source comes back outside."""
    model, spec = model_of("wan")
    source, variance, sigmas = clip(spec), 0.5, schedule(4)
    made = repaint(source, sigmas, variance=variance)
    got = painted(model, spec, EULER, made)
    x0 = model.model.process_latent_in(source)
    noise = made[1].generate_noise({"samples": source})
    own, other = (torch.randn(source.shape, generator=torch.Generator().manual_seed(s)) for s in (7, 1))
    angle = variance * math.pi / 2
    assert error(noise[:, :, 1], (math.cos(angle) * own + math.sin(angle) * other)[:, :, 1]) < 1e-6
    assert torch.equal(noise[:, :, [0, *range(2, source.shape[2])]], own[:, :, [0, *range(2, source.shape[2])]])
    mask = torch.zeros_like(x0)
    mask[:, :, 1] = 1
    begin = first_step(4, variance)
    assert torch.equal(made[2], sigmas[begin:]) and begin == 2

    class Loop(comfy.samplers.Sampler):
        def sample(self, model_wrap, points, extra_args, *rest, **more):
            x = (1 - points[0]) * x0 + points[0] * noise
            for at, to in zip(points, points[1:], strict=False):
                x = x + (to - at) * (x - model_wrap(x, at.expand(1), **extra_args)) / at
                x = torch.where(mask.bool(), x, (1 - to) * x0 + to * noise)
            return x

    want = sample(guider_of(model, *conds(spec), 3.0), Loop(), sigmas[begin:], source)
    assert error(got, want) < 1e-5


def test_extending_grows_both_ends_and_starts_from_noise():
    model, spec = model_of("wan")
    source = clip(spec)
    frames = source.shape[2]
    for start, end, span in ((-2.0, 1.0, (0, 3)), (frames - 1.0, frames + 2.0, (frames - 1, frames + 2))):
        made = repaint(source, start_s=start, end_s=end, extend=True, variance=0.2)
        out = painted(model, spec, EULER, made)
        assert out.shape[2] == frames + 2 and len(made[2]) == 5
        kept = [i for i in range(frames + 2) if not span[0] <= i < span[1]]
        assert error(out[:, :, kept], made[0]["samples"][:, :, kept]) < 1e-5
        inside = made[1].generate_noise(made[0])[:, :, span[0] : span[1]]
        assert not torch.equal(inside, Noise_RandomNoise(7).generate_noise(made[0])[:, :, span[0] : span[1]])


@pytest.mark.parametrize(
    ("shape", "kind", "rate", "axis"),
    [((1, 8, 16, 108), "audio", 0.0, 3), ((1, 64, 250), "audio", 25.0, 2), ((1, 16, 9, 4, 4), None, 4.0, 2)],
)
def test_time_of_sound_and_clips(shape, kind, rate, axis):
    samples = torch.randn(shape)
    mask = repaint(samples, kind=kind, rate=rate)[0]["noise_mask"]
    per = rate or 44100 / 4096
    inside = [i for i in range(shape[axis]) if mask.select(axis, i).any()]
    assert inside == list(range(round(per), round(2 * per))) and set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask.shape[2:] == samples.shape[2:]


def test_beside_taylor_cache_and_in_bfloat16():
    model, spec = model_of("wan")
    cached = taylor(model)
    made = repaint(clip(spec), schedule(16), variance=0.5)
    out = painted(cached, spec, EULER, made)
    assert torch.equal(out, painted(cached, spec, EULER, made)) and facts(cached)["blocks_skipped"] > 0
    half, _ = model_of("wan", "bf16")
    assert (
        error(painted(half, spec, EULER, repaint(clip(spec))), painted(model, spec, EULER, repaint(clip(spec)))) < 0.05
    )


def test_a_batch_keeps_its_own_clips():
    model, spec = model_of("wan")
    two = torch.cat([clip(spec), -clip(spec)])
    out = painted(model, spec, EULER, repaint(two))
    assert error(out[:, :, 0], two[:, :, 0]) < 1e-5 and error(out[:1], out[1:]) > 0.1


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"start_s": 2.0, "end_s": 2.2}, "holds no latent frame"),
        ({"start_s": -1.0}, "goes beyond the clip"),
        ({"start_s": 40.0, "end_s": 50.0, "extend": True}, "does not touch the clip"),
        ({"rate": 0.0}, "Set rate"),
    ],
)
def test_spans_that_make_no_sense_are_refused(inputs, says):
    with pytest.raises(ValueError, match=says):
        repaint(torch.zeros(1, 16, 9, 4, 4), **inputs)


def test_latents_without_time_and_with_a_mask_are_refused():
    with pytest.raises(ValueError, match="needs a latent that has time"):
        repaint(torch.zeros(1, 16, 8, 8))
    latent = {"samples": torch.zeros(1, 16, 9, 4, 4), "noise_mask": torch.ones(1, 1, 9, 4, 4)}
    with pytest.raises(ValueError, match="has a noise mask already"):
        run_node(SpanRepaint, latent=latent, noise=Noise_RandomNoise(7), sigmas=schedule(4), rate=1.0)


def test_steps_and_noise():
    assert [first_step(10, v) for v in (1.0, 0.5, 0.3, 0.01)] == [0, 5, 7, 9]
    assert span_of(20, -0.4, 1.0, 5.0, True) == Span(2, 0, 0, 7)
    a, b = torch.randn(2, 1 << 14)
    assert torch.equal(turned(a, b, 0.0), a) and error(turned(a, b, 1.0), b) < 1e-6
    assert all(abs(turned(a, b, v).std().item() - 1) < 0.03 for v in (0.2, 0.5, 0.8))


def test_noise_stays_of_its_strength_where_both_seeds_are_one():
    """Two equal draws on the quarter circle would add up to 1.41 times the noise."""
    made = run_node(SpanRepaint, latent={"samples": torch.zeros(1, 8, 16, 100), "type": "audio"}, noise=Noise_RandomNoise(2**64 - 1),
                    sigmas=schedule(4), start_s=0.0, end_s=9.0, variance=0.5, retake_seed=2**64 - 1)  # fmt: skip
    noise = made[1].generate_noise(made[0])
    assert float(noise[..., :96].std()) == pytest.approx(1.0, abs=0.03)
