"""The node on tiny models: nothing changes where the window spans the picture, and elsewhere exactly the pairs inside
the window act, whatever stands before or after it."""

import math

import pytest
import torch
from nodes_helper import Job, error, facts, model_of, run_node, taylor

from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.nodes.attention.resonance_yarn_rope import ResonanceYarnRope
from tessera.patching.attention import AttentionFeature
from tessera.patching.report import latest_record
from tessera.patching.run import attach
from tessera.patching.widgets import parse_blocks

NAME = "Local Window Attention"
SERVED = ("flux", "wan_meta", "sd3", "ltxv_meta", "qwen_image", "lumina2", "cosmos_predict2", "hunyuan_video", "lens")


class Masked:
    """The same window as an explicit mask on dense attention: slow, and plainly right."""

    def __init__(self, radius, metric, temporal, factor=0, every=False, stretch=1.0):
        self.radius, self.metric, self.temporal = radius, metric, temporal
        self.factor, self.every, self.stretch = factor, every, stretch

    def begin(self):
        return None

    def attend(self, state, call):
        from tessera.methods.attention.call import Answer

        frames, height, width = call.layout.grid
        at = torch.stack(
            torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij"), -1
        ).reshape(-1, 3)
        dt, dy, dx = (at[:, None] - at[None, :]).abs().unbind(-1)
        near = dy**2 + dx**2 < self.radius**2 if self.metric == "circle" else (dy < self.radius) & (dx < self.radius)
        allowed = torch.ones(call.layout.total, call.layout.total, dtype=torch.bool)
        allowed[call.layout.image, call.layout.image] = near & (dt <= self.temporal)
        groups = call.q.shape[1] // call.k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (call.k, call.v))
        bias = torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))[None, None]
        if call.mask is not None:
            bias = bias + call.key_bias()[:, None, None]
        if self.factor and not allowed.all():  # a window that spans the picture leaves nothing to pool
            image, total = call.layout.image, call.layout.total
            number = torch.stack([at[:, 0], at[:, 1] // self.factor, at[:, 2] // self.factor], 1)
            _, patch, counts = number.unique(dim=0, return_inverse=True, return_counts=True)
            held = torch.nn.functional.one_hot(patch).T / counts[:, None]
            k, v = (torch.cat([x, (held @ x[:, :, image].float()).to(x.dtype)], 2) for x in (k, v))
            extra = torch.full((total, len(counts)), float("-inf"))
            extra[image] = counts.log() if self.every else 0.0
            bias = torch.cat([bias, extra.expand(len(bias), 1, -1, -1)], -1)
        scale = call.scale * self.stretch
        out = torch.nn.functional.scaled_dot_product_attention(call.q, k, v, bias.to(call.q.dtype), scale=scale)
        return Answer(out, 0.0, 0.0)


def window(model, **inputs):
    return run_node(
        LocalWindowAttention, model=model, **{"min_tokens": 0, "temporal_radius": 0, "down_factor": 0, **inputs}
    )[0]


@pytest.mark.parametrize("name", SERVED)
def test_a_window_that_spans_the_picture_changes_nothing(name):
    model, spec = model_of(name)
    job = Job(spec, steps=3)
    patched = window(model, radius=64, temporal_radius=64)
    assert torch.equal(job(patched), job(model))
    told = facts(patched, NAME)
    assert told["calls"] == told["declined"]["the window spans the picture"] > 0 and told["pairs_fraction"] == 1


@pytest.mark.parametrize("metric", ["circle", "square"])
@pytest.mark.parametrize("name", SERVED)
def test_equals_the_explicit_mask(name, metric):
    model, spec = model_of(name)
    job = Job(spec, steps=2)
    patched = window(model, radius=2, metric=metric, temporal_radius=1)
    masked = attach(model, AttentionFeature(None, "Masked", method=Masked(2, metric, 1), min_tokens=0))
    got, want = job(patched), job(masked)
    assert error(got, want) < 1e-4
    assert error(got, job(model)) > 1e-4, "the window must act"


@pytest.mark.parametrize(("factor", "counts"), [(2, "one"), (3, "all")])
@pytest.mark.parametrize("name", SERVED)
def test_pooled_keys_equal_the_explicit_mask(name, factor, counts):
    model, spec = model_of(name)
    job = Job(spec, steps=2, cfg=1.0)
    inputs = {"radius": 2, "temporal_radius": 1}
    patched = window(model, down_factor=factor, pooled_counts_as=counts, **inputs)
    method = Masked(2, "circle", 1, factor, counts == "all")
    got, want = job(patched), job(attach(model, AttentionFeature(None, "Masked", method=method, min_tokens=0)))
    assert error(got, want) < 1e-4
    assert error(got, job(window(model, **inputs))) > 1e-4, "the pooled keys must act"


def test_bf16():
    model, spec = model_of("flux", "bf16")
    job = Job(spec, steps=2)
    for factor in (0, 2):
        method = Masked(2, "circle", 0, factor, True)
        masked = attach(model, AttentionFeature(None, "Masked", method=method, min_tokens=0))
        assert error(job(window(model, radius=2, down_factor=factor)), job(masked)) < 3e-2


def test_the_new_inputs_are_off_by_default_bit_for_bit():
    model, spec = model_of("flux")
    job = Job(spec, steps=2)
    want = job(window(model, radius=2))
    for off in ({"down_factor": 0}, {"down_factor": 1}, {"proportional": True, "base_tokens": 10 + 4 * 6}):
        assert torch.equal(job(window(model, radius=2, **off)), want)


def test_proportional_scale_reaches_every_call():
    """Also where the window spans the picture: the scale alone acts then."""
    model, spec = model_of("flux")
    job = Job(spec, steps=2, cfg=1.0)
    stretch = math.log(10 + 4 * 6, 8) ** 0.5
    for radius in (2, 64):
        method = Masked(radius, "circle", 0, stretch=stretch)
        want = job(attach(model, AttentionFeature(None, "Masked", method=method, min_tokens=0)))
        got = window(model, radius=radius, proportional=True, base_tokens=8)
        assert error(job(got), want) < 1e-4 and facts(got, NAME)["served"] == facts(got, NAME)["calls"]


def test_ntk_factor_is_another_theta():
    """CLEAR's: all positions turn with theta times the factor, whatever the size; and it does not join another node's."""
    from comfy.ldm.flux.layers import EmbedND

    model, spec = model_of("flux")
    job = Job(spec, steps=2, cfg=1.0)
    hand = model.clone()
    hand.add_object_patch("diffusion_model.pe_embedder", EmbedND(128, 100000, [16, 56, 56]))
    want = job(window(hand, radius=2))
    assert error(job(window(model, radius=2, ntk_factor=10.0)), want) < 1e-4 < error(job(window(model, radius=2)), want)
    assert torch.equal(job(window(model, radius=2, ntk_factor=1.0)), job(window(model, radius=2)))
    with pytest.raises(ValueError, match="sets the positions of this MODEL already"):
        window(run_node(ResonanceYarnRope, model=model)[0], ntk_factor=10.0)
    with pytest.raises(ValueError, match="does not know how .* embeds positions"):
        window(model_of("sd3")[0], ntk_factor=10.0)
    window(model_of("sd3")[0], ntk_factor=10.0, unsupported="warn")


def test_pooled_keys_leave_nothing_behind():
    """Two runs are bit-equal, with another size and an interrupted run in between."""
    model, spec = model_of("flux")
    patched = window(model, radius=2, down_factor=4)
    job = Job(spec, steps=2)
    first = job(patched)
    Job(spec, steps=2, latent=torch.zeros(1, 16, 14, 10))(patched)

    def stop(step):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        Job(spec, steps=2, on_step=stop)(patched)
    assert torch.equal(job(patched), first)


def test_beside_a_cache_a_lora_another_override_and_another_attention_node():
    from attention_helper import Foreign

    model, spec = model_of("flux")
    key = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    model.add_patches({key: ("diff", (torch.full((384, 128), 1e-3),))})
    foreign = Foreign(model)
    lower = window(foreign.onto(model), radius=2, down_factor=2, blocks="0-1")
    both = window(lower, radius=3, down_factor=4, blocks="2")
    job = Job(spec, steps=4, cfg=1.0)
    with foreign.counting():
        job(both)
    assert foreign.image == 4, "block 3 is left to the other pack"
    served = [f["facts"]["served"] for f in latest_record(both)["features"]]
    assert served == [8, 4]
    cached = taylor(both, interval=2, warmup=1)
    assert torch.isfinite(job(cached)).all() and not torch.equal(job(cached), job(both))


@pytest.mark.parametrize("size", [(2, 2), (3, 37), (18, 22), (34, 10)])
def test_any_size(size):
    model, spec = model_of("flux")
    method = Masked(3, "circle", 0, 4, True)
    job = Job(spec, steps=1, cfg=1.0, latent=torch.zeros(2, 16, *size))
    want = job(attach(model, AttentionFeature(None, "Masked", method=method, min_tokens=0)))
    assert error(job(window(model, radius=3, down_factor=4)), want) < 1e-4


def test_min_tokens_blocks_and_steps_decide():
    model, spec = model_of("flux")
    job = Job(spec, steps=4, cfg=1.0)
    plain = job(model)
    few = window(model, radius=2, min_tokens=4096)
    assert torch.equal(job(few), plain)
    assert facts(few, NAME)["declined"] == {"fewer than 4096 image tokens": 16}
    some = window(model, radius=2, blocks="1-2")
    assert not torch.equal(job(some), plain)
    assert facts(some, NAME)["served"] == 8 and facts(some, NAME)["declined"] == {"outside the chosen blocks": 8}
    late = window(model, radius=2, start_percent=1.0)
    assert torch.equal(job(late), plain)


def test_a_model_that_cannot_be_served_says_so():
    model, spec = model_of("hunyuan3d2")
    with pytest.raises(ValueError, match="without places"):
        window(model)
    job = Job(spec, steps=1)
    assert torch.equal(job(window(model, unsupported="warn")), job(model))


def test_the_list_of_blocks():
    assert parse_blocks("all") is None and parse_blocks(" 2-4, 7 ") == {2, 3, 4, 7}
    for wrong in ("4-2", "x", "1,,2", "-3"):
        with pytest.raises(ValueError, match="cannot read"):
            parse_blocks(wrong)


@pytest.mark.parametrize("name", ["hunyuan3d2"])
def test_a_warning_means_that_nothing_acts(name, caplog):
    model, spec = model_of(name)
    patched = window(model, radius=2, unsupported="warn")
    assert "does nothing on this MODEL" in caplog.text
    job = Job(spec, steps=2)
    assert torch.equal(job(patched), job(model)) and facts(patched, NAME)["calls"] == 0
