"""Panels that share positions: stock where none are moved, equal logits where they are, panels that may change places."""

import gc
import weakref

import comfy.samplers
import pytest
import torch
from comfy.ldm.flux.math import apply_rope
from nodes_helper import Job, error, facts, model_of, run_node, taylor, watching
from panels_helper import PANEL, by_hand, panels, spied
from tiny_models import conds

from tessera.methods.control.panels import Panels
from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.nodes.attention.resonance_yarn_rope import ResonanceYarnRope
from tessera.nodes.attention.sparse_linear_attention import SparseLinearAttention

NAME = "In-Context Panels"


@pytest.mark.parametrize("name", PANEL)
def test_none_cloned_is_stock_on_the_tiled_latent_bit_for_bit(name):
    model, spec = model_of(name)
    for axis, clone in (("width", "none"), ("height", "0,1")):
        patched, canvas, mask = panels(model, {"samples": torch.zeros(PANEL[name])}, clone=clone, axis=axis)
        job = Job(spec, steps=3, latent=canvas)
        assert mask is None and torch.equal(job(patched), job(model))
        assert facts(patched, NAME)["calls"] > 0, "the patch was there"
    one, canvas, _ = panels(model, {"samples": torch.zeros(PANEL[name])}, panels=1)
    assert torch.equal(Job(spec, steps=2, latent=canvas)(one), Job(spec, steps=2, latent=canvas)(model))


@pytest.mark.parametrize(
    ("count", "axis", "clone", "index"),
    [(2, "width", "all", ""), (2, "height", "all", "0,1"), (3, "width", "0,0,1", "1,0,0"), (3, "height", "2,0,1", "")],
)
@pytest.mark.parametrize("name", PANEL)
def test_the_positions_are_those_of_the_definition(name, count, axis, clone, index):
    model, spec = model_of(name)
    job = {"panels": count, "axis": axis, "clone": clone, "index_per_panel": index}
    patched, canvas, _ = panels(model, {"samples": torch.zeros(PANEL[name])}, **job)
    after, seen = spied(patched)
    Job(spec, steps=1, latent=canvas, batch=2)(after)
    patch = model.model.diffusion_model.patch_size
    grid = (1, canvas.shape[-2] // patch, canvas.shape[-1] // patch)
    places = [0] * count if clone == "all" else [int(n) for n in clone.split(",")]
    firsts = [int(n) for n in index.split(",")] if index else [0] * count
    want = by_hand(grid, places, firsts, axis, seen[0].shape[-1], count)
    assert seen and all(torch.equal(row, want) for ids in seen for row in ids)
    told = facts(after, NAME)
    assert told["tokens"] == [
        grid[1] // (count if axis == "height" else 1),
        grid[2] // (count if axis == "width" else 1),
    ]


def test_logits_between_cloned_panels_are_those_within_a_panel():
    """Through the stock embedder and rotation, for equal queries and keys in each panel."""
    model, _ = model_of("flux")
    high, wide, count = 4, 3, 3
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(float(high)), torch.arange(float(wide * count)))[None]
    embed = model.get_model_object("diffusion_model.pe_embedder")
    q, k = torch.randn(2, 1, 1, high, 1, wide, 128).expand(2, 1, 1, high, count, wide, 128)

    def logits(layout):
        turned = apply_rope(
            *(t.reshape(1, 1, -1, 128) for t in (q, k)), embed(layout.moved(ids, (1, high, wide * count)))
        )
        made = (turned[0] @ turned[1].transpose(-1, -2)).reshape(high, count, wide, high, count, wide)
        return made.permute(1, 4, 0, 2, 3, 5)  # [panel, panel, i, j, i', j']

    cloned = logits(Panels((0, 0, 0), (0, 0, 0)))
    assert (cloned - cloned[0, 0]).abs().max() < 1e-5
    apart = logits(Panels((0, 1, 2), (0, 0, 0)))
    assert (apart[0, 1] - apart[0, 0]).abs().max() > 0.1
    part = logits(Panels((0, 0, 0), (0, 0, 1)))
    assert (part[0, 1] - part[0, 0]).abs().max() < 1e-5 and (part[2, 2] - part[0, 0]).abs().max() < 1e-4
    assert (part[0, 2] - part[0, 0]).abs().max() > 0.1, "the first axis tells panel 2 from the others"


@pytest.mark.parametrize("axis", ["width", "height"])
def test_panels_with_equal_positions_may_change_places(axis):
    model, spec = model_of("flux")
    patched, canvas, _ = panels(model, panels=3, axis=axis)
    along = -1 if axis == "width" else -2
    noise = torch.randn(canvas.shape, generator=torch.Generator().manual_seed(5))
    order = (2, 0, 1)
    swapped = torch.cat([noise.chunk(3, along)[i] for i in order], along)
    got, other = (Job(spec, steps=2, latent=canvas, noise=n)(patched) for n in (noise, swapped))
    want = torch.cat([got.chunk(3, along)[i] for i in order], along)
    assert error(other, want) < 1e-5
    stock = [Job(spec, steps=2, latent=canvas, noise=n)(model) for n in (noise, swapped)]
    assert error(stock[1], torch.cat([stock[0].chunk(3, along)[i] for i in order], along)) > 1e-3


def test_references_after_the_image_stay_where_they_were():
    model, spec = model_of("flux")
    reference = torch.randn(1, 16, 8, 6, generator=torch.Generator().manual_seed(0))
    positive, negative = (
        [[t, {**extra, "reference_latents": [reference]}] for t, extra in side] for side in conds(spec)
    )
    patched, canvas, _ = panels(model)
    for each in (model, patched):
        spy, seen = spied(each)
        Job(spec, steps=1, cfg=1.0, latent=canvas, positive=positive, negative=negative)(spy)
        tokens = 4 * 6
        assert seen[0].shape[1] == tokens + 12
        assert torch.equal(seen[0][0, tokens:, 0], torch.ones(12)) and seen[0][0, tokens:, 2].max() == 2
        assert seen[0][0, :tokens, 2].max() == (5 if each is model else 2)


def test_positions_that_core_scales_are_cloned_as_they_are():
    model, spec = model_of("flux")
    scaled = model.clone()
    scaled.model_options["transformer_options"]["rope_options"] = {"scale_y": 0.5, "scale_x": 2.0, "shift_x": 3.0}
    patched, canvas, _ = panels(scaled)
    spy, seen = spied(patched)
    Job(spec, steps=1, latent=canvas)(spy)
    ids = seen[0][0].reshape(4, 6, 3)
    assert torch.equal(ids[:, :3], ids[:, 3:]) and ids[0, :3, 2].tolist() == [3.0, 5.0, 7.0]
    assert spy.model_options["transformer_options"]["rope_options"]["shift_x"] == 3.0


class MovedByHand(torch.nn.Module):
    """In place of the stock embedder: the image's positions, which follow the text's, exchanged for these."""

    def __init__(self, stock, image):
        super().__init__()
        self.stock, self.image = stock, image

    def forward(self, ids):
        text = ids.shape[1] - len(self.image)
        return self.stock(torch.cat((ids[:, :text], self.image.expand(len(ids), -1, -1)), 1))


def test_beside_attention_nodes_and_caches():
    """They see the canvas as one picture, with the positions that an embedder written by hand gives."""
    model, spec = model_of("flux")
    patched, canvas, _ = panels(model)
    hand, path = model.clone(), "diffusion_model.pe_embedder"
    hand.add_object_patch(path, MovedByHand(model.get_model_object(path), by_hand((1, 4, 6), (0, 0), (0, 0))))
    job = Job(spec, steps=6, latent=canvas)

    def window(m):
        return run_node(LocalWindowAttention, model=m, radius=2, min_tokens=0)[0]

    def sparse(m):
        return run_node(SparseLinearAttention, model=m, min_tokens=0)[0]

    for onto in (lambda m: m, window, sparse, taylor, lambda m: taylor(window(m))):
        assert error(job(onto(patched)), job(onto(hand))) < 1e-5
    assert error(job(panels(window(model))[0]), job(window(hand))) < 1e-5, "in either order"
    assert error(job(window(patched)), job(patched)) > 1e-3
    cached = taylor(patched)
    with watching(cached) as watch:
        job(cached)
    full = sum(d["kind"] == "full" for d in facts(cached)["decisions"])
    assert min(watch.each) == full < 6 and torch.equal(job(taylor(patched, interval=1)), job(patched))


def test_stretched_positions_count_what_the_panels_cover():
    """Two cloned panels of 3 tokens reach over 3, not 6: Resonance YaRN RoPE leaves them as they are."""
    model, spec = model_of("flux")

    def yarn(m, **inputs):
        return run_node(ResonanceYarnRope, model=m, base_h_tokens=64, **inputs)[0]

    patched, canvas, _ = panels(model)
    job = Job(spec, steps=1, latent=canvas)
    want = job(patched)
    for both in (yarn(patched, base_w_tokens=3), panels(yarn(model, base_w_tokens=3))[0]):
        assert torch.equal(job(both), want) and facts(both, "Resonance YaRN RoPE")["tokens"] == [1, 4, 3]
    stretched = yarn(patched, base_w_tokens=2)
    assert error(job(stretched), want) > 1e-4 and facts(stretched, "Resonance YaRN RoPE")["tokens"] == [1, 4, 3]
    apart = yarn(panels(model, clone="none")[0], base_w_tokens=3)
    assert facts_after(job, apart) == [1, 4, 6]


def facts_after(job, model):
    job(model)
    return facts(model, "Resonance YaRN RoPE")["tokens"]


def test_bf16_batches_and_separate_cfg():
    half, spec = model_of("flux", "bf16")
    patched, canvas, _ = panels(half)
    noise = torch.randn(1, *canvas.shape[1:], generator=torch.Generator().manual_seed(5))
    rows = Job(spec, steps=2, batch=2, latent=canvas, noise=noise.expand(2, -1, -1, -1))(patched)
    assert (
        error(rows[1], rows[0]) < 2e-2
        and error(rows[:1], Job(spec, steps=2, latent=canvas, noise=noise)(patched)) < 2e-2
    )
    plain, _ = model_of("flux")
    patched = panels(plain)[0]
    joined = Job(spec, steps=2, latent=canvas)(patched)
    apart = patched.clone()

    def alone(args):  # cond and uncond in calls of their own
        model, conds_, x, t, options = (args[k] for k in ("model", "conds", "input", "sigma", "model_options"))
        return [comfy.samplers.calc_cond_batch(model, [c], x, t, options)[0] for c in conds_]

    apart.set_model_sampler_calc_cond_batch_function(alone)
    assert error(Job(spec, steps=2, latent=canvas)(apart), joined) < 1e-5


def test_an_interrupted_run_leaves_nothing_behind():
    model, spec = model_of("flux")
    patched, canvas, _ = panels(model)
    job, kept = Job(spec, steps=2, latent=canvas), []
    plain, first = job(model), job(patched)

    def stop(step):
        from tessera.patching.run import features_of

        assert features_of(patched.model_options)
        raise RuntimeError("stopped")

    def keep(given):
        kept.append(weakref.ref(given["transformer_options"]["tessera_forward"]))
        return given

    spy = patched.clone()
    spy.set_model_post_input_patch(keep)
    with pytest.raises(RuntimeError, match="stopped"):
        Job(spec, steps=2, latent=canvas, on_step=stop)(spy)
    gc.collect()
    assert kept and all(ref() is None for ref in kept)
    assert torch.equal(job(patched), first) and torch.equal(job(model), plain) and error(first, plain) > 1e-3


def test_the_line():
    model, spec = model_of("flux")
    patched, canvas, _ = panels(model, panels=3, clone="0,0,1", index_per_panel="1,0,0")
    feature = patched.model_options["transformer_options"]["tessera_features"][-1]
    assert "nothing was moved" in feature.line(feature.facts(None))
    Job(spec, steps=1, latent=canvas)(patched)
    assert feature.line(facts(patched, NAME)) == "3 panels of 4 x 3 tokens, at places 0 0 1, index 1 0 0"
