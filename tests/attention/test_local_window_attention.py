"""The node on tiny models: nothing changes where the window spans the picture, and elsewhere exactly the pairs inside
the window act, whatever stands before or after it."""

import pytest
import torch
from nodes_helper import Job, error, facts, model_of, run_node

from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.patching.attention import AttentionFeature
from tessera.patching.run import attach
from tessera.patching.widgets import parse_blocks

NAME = "Local Window Attention"
SERVED = ("flux", "wan_meta", "sd3", "ltxv_meta", "qwen_image", "lumina2", "cosmos_predict2", "hunyuan_video", "lens")


class Masked:
    """The same window as an explicit mask on dense attention: slow, and plainly right."""

    def __init__(self, radius, metric, temporal):
        self.radius, self.metric, self.temporal = radius, metric, temporal

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
        out = torch.nn.functional.scaled_dot_product_attention(call.q, k, v, bias.to(call.q.dtype), scale=call.scale)
        return Answer(out, 0.0, 0.0)


def window(model, **inputs):
    return run_node(LocalWindowAttention, model=model, **{"min_tokens": 0, **inputs})[0]


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


def test_bf16():
    model, spec = model_of("flux", "bf16")
    job = Job(spec, steps=2)
    masked = attach(model, AttentionFeature(None, "Masked", method=Masked(2, "circle", 0), min_tokens=0))
    assert error(job(window(model, radius=2)), job(masked)) < 3e-2


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
