"""Stretched positions: stock within the trained size bit for bit, the released formula beyond it on the long axes alone,
in every family whose positions can be reached."""

import math

import pytest
import torch
from nodes_helper import Job, error, facts, model_of, run_node, taylor
from tiny_models import conds

from tessera.kernels.rope.tables import frequencies
from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.nodes.attention.resonance_yarn_rope import METHODS, ResonanceYarnRope

NAME = "Resonance YaRN RoPE"
FAMILIES = ("flux", "flux2", "chroma", "chroma_radiance", "wan_meta", "wan_vace", "qwen_image", "mage_flow", "lumina2", "z_image",
            "hunyuan_video", "krea2", "lens")  # fmt: skip
PATHS = {"wan_meta": "rope_embedder", "wan_vace": "rope_embedder", "lumina2": "rope_embedder", "z_image": "rope_embedder",
         "lens": "pos_embed"}  # fmt: skip


def yarn(model, **inputs):
    return run_node(ResonanceYarnRope, model=model, **inputs)[0]


def path_of(name):
    return f"diffusion_model.{PATHS.get(name, 'pe_embedder')}"


def released(pair, dim, theta, window, span, method="code", resonance=True):
    """(turning speed, length) of one pair, scalar by scalar from the formulas."""
    w = theta ** (-2 * pair / dim)
    s = span / window
    if s <= 1 or method == "base":
        return w, 1.0
    turns = window * w / (2 * math.pi)
    if resonance and method == "paper":
        w = 2 * math.pi * max(1, math.floor(turns + 0.5)) / window
    elif resonance and turns >= 1:
        w = 2 * math.pi * round(turns) / window
    if method == "paper":
        keep = min(max((window * w / (2 * math.pi) - 1) / 31, 0), 1)
        return (1 - keep) * w / s + keep * w, 0.1 * math.log(s) + 1
    ntk = (theta * s ** (dim / (dim - 2))) ** (math.log(w) / math.log(theta))
    if method != "code":
        return {"linear": w / s, "ntk": ntk}[method], 1.0

    def ramp(first, last):
        at = [dim * math.log(window / (2 * math.pi * x)) / (2 * math.log(theta)) for x in (first, last)]
        low, high = max(math.floor(at[0]), 0), min(math.ceil(at[1]), dim - 1, dim // 2)
        return 1 - min(max((pair - low) / (high - low if high != low else 1e-3), 0), 1)

    slow, fast = ramp(1.25, 0.75), ramp(16, 2)
    return (w / s * (1 - slow) + ntk * slow) * (1 - fast) + w * fast, 0.1 * math.log(s) + 1


class ByHand(torch.nn.Module):
    """The embedder written down from the formulas, for one size: windows and spans by column of the positions."""

    def __init__(self, stock, windows, spans, text_from=None, method="code"):
        super().__init__()
        self.dim, self.theta, self.axes_dim = stock.dim, stock.theta, stock.axes_dim
        self.windows, self.spans, self.text_from, self.method = windows, spans, text_from, method

    def forward(self, ids):
        parts = []
        for column in range(ids.shape[-1]):
            dim, at = self.axes_dim[column], ids[..., column].double()
            told = [
                released(i, dim, self.theta, self.windows[column], self.spans[column], self.method)
                for i in range(dim // 2)
            ]
            speed, length = (torch.tensor(x, dtype=torch.float64) for x in zip(*told, strict=True))
            angle = at[..., None] * speed
            if self.text_from is not None:
                text = (ids == ids[..., :1]).all(-1) & (ids[..., 0] >= self.text_from)
                plain = torch.tensor([self.theta ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
                moved = self.text_from * speed + (at - self.text_from)[..., None] * plain
                angle = torch.where(text[..., None], moved, angle)
            cos, sin = angle.cos() * length, angle.sin() * length
            parts.append(torch.stack((cos, -sin, sin, cos), -1).unflatten(-1, (2, 2)))
        return torch.cat(parts, -3).float()[:, None]


def by_hand(model, name, windows, spans, text_from=None):
    patched = model.clone()
    patched.add_object_patch(path_of(name), ByHand(model.get_model_object(path_of(name)), windows, spans, text_from))
    return patched


def positions(height, width, text=5):
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(float(height)), torch.arange(float(width)))
    return torch.cat((torch.zeros(text, 3), grid))[None]


@pytest.mark.parametrize("method", METHODS)
def test_within_the_trained_size_it_is_the_stock_embedder_bit_for_bit(method):
    model, _ = model_of("flux")
    stock = model.get_model_object(path_of("flux"))
    mine = yarn(model, method=method).get_model_object(path_of("flux"))
    for size in ((64, 64), (1, 64), (17, 40)):
        assert torch.equal(mine(positions(*size)), stock(positions(*size)))


@pytest.mark.parametrize("long", [65, 96, 128, 160, 256])
@pytest.mark.parametrize("method", ["code", "paper", "ntk", "linear"])
def test_beyond_it_the_formula_on_the_long_axis_alone(long, method):
    """Height and width differ; text stands at 0 and keeps its rotation but for the length."""
    model, _ = model_of("flux")
    stock = model.get_model_object(path_of("flux"))
    mine = yarn(model, method=method).get_model_object(path_of("flux"))
    for size in ((long, 40), (33, long), (long, 70)):
        ids = positions(*size)
        got, want = mine(ids), ByHand(stock, (1, 64, 64), (1, *size), method=method)(ids)
        assert got.shape == want.shape and (got - want).abs().max() < 1e-5
        spans = torch.tensor([16, 56, 56]).cumsum(0) // 2
        for column, length in ((0, 1), (1, size[0]), (2, size[1])):
            part = slice(int(spans[column]) - (8, 28, 28)[column], int(spans[column]))
            same = torch.equal(got[..., part, :, :], stock(ids)[..., part, :, :])
            assert same == (length <= 64), "only the axes beyond the trained size change"


def test_plain_yarn_without_resonance_and_without_the_length():
    model, _ = model_of("flux")
    ids = positions(128, 8)
    mine = yarn(model, resonance=False, mscale=False).get_model_object(path_of("flux"))
    speed = torch.tensor([released(i, 56, 1e4, 64, 128, resonance=False)[0] for i in range(28)], dtype=torch.float64)
    want = (ids[..., 1].double()[..., None] * speed).cos()
    assert (mine(ids)[0, 0, :, 8:36, 0, 0] - want[0]).abs().max() < 1e-5


def test_the_length_of_twice_the_size():
    model, _ = model_of("flux")
    got = yarn(model).get_model_object(path_of("flux"))(positions(128, 64))
    assert got[0, 0, :, 8:36, :, 0].norm(dim=-1).sub(1.0693).abs().max() < 1e-4
    assert got[0, 0, :, 36:, :, 0].norm(dim=-1).sub(1).abs().max() < 1e-6


def test_resonance_gives_whole_waves_over_the_trained_size():
    """Squeezed to the trained size, every pair that makes a whole turn there makes a whole number of them."""
    model, _ = model_of("flux")
    for resonance in (True, False):
        patched = yarn(model, method="linear", resonance=resonance)
        axes = patched.get_model_object(path_of("flux")).feature.axes((1, 128, 64), (0, 1, 2), [16, 56, 56], 1e4)
        turns = (frequencies(axes[1])[0] * 128 / (2 * math.pi)).tolist()
        assert list(axes) == [1] and all(abs(t - round(t)) < 1e-9 for t in turns[:8]) == resonance
    assert turns[7] > 1 > turns[8]


def sizes_of(name, spec):
    """(grid, columns of the positions that hold height and width)."""
    from tessera import archs

    model, _ = model_of(name)
    diffusion_model = model.model.diffusion_model
    arch = archs.find(diffusion_model)
    return arch.grid(diffusion_model, torch.zeros(spec.latent))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_stretched_while_it_samples(name):
    """Against the formulas in place of the model's embedder: both axes beyond their windows."""
    model, spec = model_of(name)
    job, grid = Job(spec, steps=2, cfg=1.0), sizes_of(name, spec)
    windows, spans = (1e9, 2, 3, 1e9), (1, *grid[1:], 1)
    text_from = max(grid[1] // 2, grid[2] // 2) if name in ("qwen_image", "lens") else None
    patched = yarn(model, base_h_tokens=2, base_w_tokens=3)
    plain = job(model)
    got = job(patched)
    assert error(got, job(by_hand(model, name, windows, spans, text_from))) < 1e-4
    assert error(got, plain) > 1e-4 and torch.equal(job(patched), got)
    told = facts(patched, NAME)
    assert told["calls"] > 0 and told["tokens"] == list(grid) and told["window"] == [21, 2, 3]
    assert torch.equal(job(model), plain), "the stock embedder is back"
    assert torch.equal(job(yarn(model, base_h_tokens=grid[1], base_w_tokens=grid[2])), plain)
    assert torch.equal(job(yarn(model, method="base", base_h_tokens=1, base_w_tokens=1)), plain)


def test_what_it_replaced_is_put_back():
    model, spec = model_of("flux")
    before = model.get_model_object(path_of("flux"))
    patched = yarn(model, base_h_tokens=2)
    Job(spec, steps=1)(patched)
    assert type(model.model.diffusion_model.pe_embedder).__name__ == "StretchedRope"
    patched.unpatch_model()
    assert model.model.diffusion_model.pe_embedder is before is model.get_model_object(path_of("flux"))
    keys = set(model.model.state_dict())
    patched.patch_model()
    assert set(model.model.state_dict()) == keys
    patched.unpatch_model()


def test_time_is_stretched_when_asked_to():
    model, spec = model_of("wan_meta")
    job = Job(spec, steps=2, cfg=1.0)
    plain = job(model)
    assert torch.equal(job(yarn(model, base_t_tokens=2)), plain)
    patched = yarn(model, axes="thw", base_t_tokens=2)
    want = job(by_hand(model, "wan_meta", (2, 1e9, 1e9), (5, 1, 1)))
    assert error(job(patched), want) < 1e-4 and error(want, plain) > 1e-4


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen_image"])
def test_reference_latents_do_not_count_as_size(name):
    """The picture's own size decides; a larger reference beside it turns by the same speeds."""
    model, spec = model_of(name)
    job, grid = Job(spec, steps=1, cfg=1.0), sizes_of(name, spec)
    reference = torch.randn(*spec.latent[:-2], 20, 16, generator=torch.Generator().manual_seed(0))
    positive, negative = (
        [[t, {**extra, "reference_latents": [reference]}] for t, extra in side] for side in conds(spec)
    )
    job.positive, job.negative = positive, negative
    plain = job(model)
    patched = yarn(model, base_h_tokens=2, base_w_tokens=64)
    text_from = max(grid[1] // 2, grid[2] // 2) if name == "qwen_image" else None
    want = job(by_hand(model, name, (1e9, 2, 1e9, 1e9), (1, grid[1], 1, 1), text_from))
    assert error(job(patched), want) < 1e-4 and error(want, plain) > 1e-4
    assert torch.equal(job(yarn(model, base_h_tokens=grid[1], base_w_tokens=grid[2])), plain)


def test_positions_that_core_scales_count_as_they_are():
    model, spec = model_of("flux")
    scaled = model.clone()
    scaled.model_options["transformer_options"]["rope_options"] = {"scale_y": 0.5, "scale_x": 2.0}
    patched, job = yarn(scaled, base_h_tokens=3, base_w_tokens=8), Job(spec, steps=1, cfg=1.0)
    want = job(by_hand(scaled, "flux", (1e9, 3, 8), (1, 2.5, 11)))
    assert error(job(patched), want) < 1e-4 and facts(patched, NAME)["tokens"] == [1.0, 2.5, 11.0]


def test_batches_bf16_and_odd_sizes():
    model, spec = model_of("flux")
    for size in ((1, 3), (9, 31), (40, 7)):
        job = Job(spec, steps=1, cfg=1.0, batch=2, latent=torch.zeros(1, 16, *size))
        spans = (1, -(-size[0] // 2), -(-size[1] // 2))
        want = job(by_hand(model, "flux", (1, 2, 3), tuple(max(n, 1) for n in spans)))
        assert error(job(yarn(model, base_h_tokens=2, base_w_tokens=3)), want) < 1e-4
    half, _ = model_of("flux", "bf16")
    job = Job(spec, steps=2, cfg=1.0)
    hand = by_hand(half, "flux", (1, 2, 3), (1, 4, 6))
    near, far = (error(job(m), job(hand)) for m in (yarn(half, base_h_tokens=2, base_w_tokens=3), half))
    assert near < 5e-3 < 1e-2 < far


def test_beside_attention_nodes_caches_and_loras():
    """They see q and k after RoPE: the same as over an embedder written by hand."""
    model, spec = model_of("flux")
    model.add_patches(
        {"diffusion_model.double_blocks.0.img_attn.qkv.weight": ("diff", (torch.full((384, 128), 1e-3),))}
    )
    job = Job(spec, steps=4, cfg=1.0)

    def window(patched):
        return run_node(LocalWindowAttention, model=patched, radius=2, min_tokens=0)[0]

    stretched, hand = yarn(model, base_h_tokens=2, base_w_tokens=3), by_hand(model, "flux", (1, 2, 3), (1, 4, 6))
    for onto in (window, lambda m: taylor(m, interval=2, warmup=1), lambda m: taylor(window(m), interval=2, warmup=1)):
        assert error(job(onto(stretched)), job(onto(hand))) < 1e-4
    assert error(job(yarn(window(model), base_h_tokens=2, base_w_tokens=3)), job(window(hand))) < 1e-4


def test_an_interrupted_run_leaves_nothing_behind():
    model, spec = model_of("flux")
    patched, job = yarn(model, base_h_tokens=2), Job(spec, steps=2)
    plain, first = job(model), job(patched)

    def stop(step):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        Job(spec, steps=2, on_step=stop)(patched)
    Job(spec, steps=1, latent=torch.zeros(1, 16, 20, 6))(patched)
    assert torch.equal(job(patched), first) and torch.equal(job(model), plain)


@pytest.mark.parametrize("name", ["sd3", "pixart"])
def test_a_model_without_such_positions_says_so(name):
    model, spec = model_of(name)
    with pytest.raises(ValueError, match="does not know how .* embeds positions"):
        yarn(model)
    job = Job(spec, steps=1)
    assert torch.equal(job(yarn(model, unsupported="warn")), job(model))


def test_what_cannot_be_is_refused():
    model, _ = model_of("flux")
    with pytest.raises(ValueError, match="paper_fast 1.0 must be above paper_slow 2.0"):
        yarn(model, paper_slow=2.0, paper_fast=1.0)
    with pytest.raises(ValueError, match="sets the positions of this MODEL already"):
        yarn(yarn(model))
    with pytest.raises(ValueError, match="Another node put its ByHand"):
        yarn(by_hand(model, "flux", (1, 2, 3), (1, 4, 6)))
    told = yarn(model).get_model_object(path_of("flux")).feature
    assert "made elsewhere" in told.line(told.facts([]))
    assert told.line(told.facts([(1, 64, 64)])) == "within the trained size: unchanged"
    assert told.line(told.facts([(1, 128, 64)])) == "stretched: height 128 of 64 tokens"
