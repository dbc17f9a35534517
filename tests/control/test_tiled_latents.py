"""Tiled Latents: one tile is the plain MODEL, several are the blend of plain MODELs on their crops, and everything beside it
sees a tile as its whole picture."""

import comfy.model_patcher
import pytest
import torch
from dit4sr_helper import SPEC as RESTORED
from dit4sr_helper import Port, Vae, base, control, model_of_base, tiny_adapter
from nodes_helper import Job, conds, error, facts, model_of, run_node, taylor

from tessera.methods.control.tiles import Blend, bell, spans
from tessera.nodes.cache.region_adaptive_sampling import RegionAdaptiveSampling
from tessera.nodes.control.apply_dit4sr import ApplyDit4sr
from tessera.nodes.control.tiled_latents import TiledLatents
from tessera.patching.control import ControlFeature
from tessera.patching.dit4sr import enlarged
from tessera.patching.forward import Part
from tessera.patching.run import Run, attach, features_of
from tessera.patching.tiles import Cut, TileFeature

SIDES = 20, 28


def tiled(model, tile=16, overlap=6):
    return run_node(TiledLatents, model=model, tile=tile, overlap=overlap)[0]


def job(spec, noise, sigmas=(1.0, 0.0), **settings):
    return Job(spec, sigmas=torch.tensor(sigmas), noise=noise, latent=torch.zeros_like(noise), **settings)


def noise_of(*sides, batch=1):
    return torch.randn(batch, 16, *sides, generator=torch.Generator().manual_seed(2))


def blended(made, parts, sides):
    """The tiles under Gaussians, in double precision, place by place."""
    total = weight = 0
    for tile, (rows, columns) in zip(made, parts, strict=True):
        h, w = tile.shape[-2:]
        y, x = ((torch.arange(n).double() - (n - 1) / 2) / n for n in (h, w))
        one = torch.exp(-(y[:, None] ** 2 + x**2) / 0.02)
        edges = columns.start, sides[1] - columns.stop, rows.start, sides[0] - rows.stop
        total = total + torch.nn.functional.pad(tile.double() * one, edges)
        weight = weight + torch.nn.functional.pad(one, edges)
    return total / weight


PARTS = [(slice(a, a + 16), slice(b, b + 16)) for a in (0, 4) for b in (0, 10, 12)]  # of SIDES, tile 16, overlap 6


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "starts"),
    [
        (64, 64, 24, [0]), (40, 64, 24, [0]), (65, 64, 24, [0, 1]), (104, 64, 24, [0, 40]), (128, 64, 24, [0, 40, 64]),
        (144, 64, 24, [0, 40, 80]), (30, 10, 0, [0, 10, 20]),
    ],
)  # fmt: skip
def test_spans(size, tile, overlap, starts):
    got = spans(size, tile, overlap)
    assert [s.start for s in got] == starts and {s.stop - s.start for s in got} == {min(size, tile)}
    assert got[-1].stop == size


def test_a_blend_of_equal_parts_is_the_picture():
    picture, blend = torch.randn(2, 3, 20, 30), Blend()
    for rows in spans(20, 8, 3):
        for columns in spans(30, 12, 5):
            blend.add(picture[..., rows, columns], (rows, columns), (20, 30))
    assert (blend.made(torch.float32) - picture).abs().max() < 1e-6
    assert torch.equal(bell(9), bell(9).flip(0)) and bell(9).argmax() == 4


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_one_tile_is_the_plain_model(name):
    model, spec = model_of(name)
    patched = tiled(model, 16, 6)
    run = Job(spec, steps=3)
    assert torch.equal(run(patched), run(model))
    assert facts(patched, "Tiled Latents") == {"calls": 3, "tiles": 1, "sides": [8, 12]}


@pytest.mark.parametrize("name", ["flux", "sd3"])
@pytest.mark.parametrize("batch", [1, 2])
def test_several_tiles_are_the_blend_of_plain_pictures(name, batch, monkeypatch):
    model, spec = model_of(name)
    noise = noise_of(*SIDES, batch=batch)
    want = blended([job(spec, noise[..., a, b])(model) for a, b in PARTS], PARTS, SIDES)
    patched = tiled(model)
    assert error(job(spec, noise)(patched), want) < 1e-5
    assert facts(patched, "Tiled Latents") == {"calls": 1, "tiles": 6, "sides": [*SIDES]}
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 0)
    assert error(job(spec, noise)(patched), want) < 1e-5
    assert facts(patched, "Tiled Latents")["calls"] == 2


STEPS = (1.0, 0.8, 0.65, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)


def test_without_overlap_tiles_are_pictures_of_their_own_under_a_cache_too():
    model, spec = model_of("flux")
    noise = noise_of(16, 24)
    halves = [job(spec, half, STEPS)(taylor(model)) for half in noise.chunk(2, -1)]
    for order in (lambda m: taylor(tiled(m, 16, 0)), lambda m: tiled(taylor(m), 16, 0)):
        narrow = order(model)
        got = job(spec, noise[..., :12], STEPS)(narrow)
        assert torch.equal(got, halves[0]), "one tile"
    both = taylor(run_node(TiledLatents, model=model, tile=16, overlap=8)[0])
    square = noise_of(16, 32)
    got = job(spec, square, STEPS)(taylor(tiled(model, 16, 0)))
    want = torch.cat([job(spec, half, STEPS)(taylor(model)) for half in square.chunk(2, -1)], -1)
    assert error(got, want) < 1e-5
    assert torch.isfinite(job(spec, square, STEPS)(both)).all() and facts(both)["forecast"] > 0


@pytest.fixture(scope="module")
def adapter():
    return tiny_adapter()


@pytest.mark.parametrize("order", ["before", "after"])
def test_each_tile_gets_its_own_part_of_the_low_resolution_picture(adapter, order):
    image, model = torch.rand(1, *(2 * n for n in SIDES), 3), model_of_base(base())
    if order == "before":
        model = tiled(model)
    patched = run_node(ApplyDit4sr, model=model, adapter=adapter, image=image, vae=Vae())[0]
    if order == "after":
        patched = tiled(patched)
    noise, port = noise_of(*SIDES), Port({**base(), **control()})
    low = (Vae().encode(enlarged(image, 4, 8)) - 0.0609) * 1.5305
    prompts = [(c, extra["pooled_output"]) for ((c, extra),) in conds(RESTORED)]
    made = [port.sample(noise[..., a, b], low[..., a, b], [1.0, 0.0], prompts, 3.0) for a, b in PARTS]
    assert error(job(RESTORED, noise)(patched), blended(made, PARTS, SIDES)) < 1e-5


@pytest.mark.parametrize("tile", [16, 32])
def test_a_prompt_for_a_part_would_get_the_wrong_part_of_the_low_resolution_picture(adapter, tile):
    image, model = torch.rand(1, *(2 * n for n in SIDES), 3), model_of_base(base())
    patched = tiled(run_node(ApplyDit4sr, model=model, adapter=adapter, image=image, vae=Vae())[0], tile)
    (positive,), negative = conds(RESTORED)
    there = [[positive[0], {**positive[1], "area": (18, 20, 2, 4), "strength": 1.0}]]
    with pytest.raises(ValueError, match="picture of 20 x 28 in latent space, and the model is asked for 18 x 20"):
        job(RESTORED, noise_of(*SIDES), positive=there, negative=negative)(patched)


def test_a_prompt_for_a_part_of_the_picture_is_cut_within_it():
    model, spec = model_of("sd3")
    (positive,), negative = conds(spec)
    there = [[positive[0], {**positive[1], "area": (16, 20, 2, 4), "strength": 1.0}], positive]
    noise = noise_of(*SIDES)
    got = job(spec, noise, positive=there, negative=negative, cfg=1.0)(tiled(model))
    plain = job(spec, noise, positive=[positive], negative=negative, cfg=1.0)(tiled(model))
    inside = job(spec, noise[..., 2:18, 4:24], positive=[positive], negative=negative, cfg=1.0)(tiled(model))
    want = plain.clone()
    want[..., 2:18, 4:24] = (plain[..., 2:18, 4:24] + inside) / 2
    ramp = 4  # core fades an area's edges over a few places
    rows, columns = slice(2 + ramp, 18 - ramp), slice(4 + ramp, 24 - ramp)
    assert error(got[..., rows, columns], want[..., rows, columns]) < 1e-5
    assert torch.equal(got[..., :2, :], plain[..., :2, :])


def called(arguments, tile=4):
    """The arguments of each call that the feature makes of these."""
    made = []

    def compute(args, kwargs, part):
        made.append((args, kwargs, part))
        return args[0]

    args = [arguments.pop("x"), arguments.pop("t")]
    return TileFeature("1", tile=tile, overlap=0).in_parts(Cut(), args, arguments, compute), made


def test_what_core_cuts_with_the_latent_is_cut_and_the_rest_is_whole():
    x, concat = torch.randn(2, 4, 8, 8), torch.randn(2, 1, 8, 8)
    text, options = torch.randn(2, 8, 8), {}
    given = {"x": x, "t": torch.ones(2), "c_concat": concat, "c_crossattn": text, "transformer_options": options}
    out, made = called(given)
    assert len(made) == 4 and (out - x).abs().max() < 1e-6
    args, kwargs, part = made[1]
    assert part == Part(slice(0, 4), slice(4, 8), (8, 8))
    assert torch.equal(args[0], x[..., :4, 4:]) and torch.equal(kwargs["c_concat"], concat[..., :4, 4:])
    assert kwargs["c_crossattn"] is text and kwargs["transformer_options"] is options


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"control": {"output": [torch.ones(1)]}}, "A ControlNet sees the whole picture of 8 x 8"),
        ({"camera_conditions": torch.ones(1, 6, 3, 64, 64)}, r"condition camera_conditions \[1, 6, 3, 64, 64\]"),
        ({"keyframe_idxs": torch.ones(1, 3, 16)}, r"condition keyframe_idxs \[1, 3, 16\]"),
        ({"depth": torch.ones(1, 1, 8, 8)}, r"condition depth \[1, 1, 8, 8\] of the whole picture"),
        ({"x": torch.ones(1, 1, 64)}, r"samples \[1, 1, 64\]"),
    ],
)
def test_what_belongs_to_the_whole_picture_is_refused(more, sentence):
    with pytest.raises(ValueError, match=sentence):
        called({"x": torch.ones(1, 4, 8, 8), "t": torch.ones(1)} | more)
    if "x" not in more:
        assert called({"x": torch.ones(1, 4, 8, 8), "t": torch.ones(1)} | more, tile=8)[1][0][2] is None, "one tile"


def tiles_of_clip(name, noise, parts, sides, **whole):
    """The blend of plain clips, each with its part of what `whole` holds."""
    model, spec = model_of(name)
    made = []
    for rows, columns in parts:
        part = {key: value[..., rows, columns].contiguous() for key, value in {"noise": noise, **whole}.items()}
        made.append(job(spec, part.pop("noise"), **part)(model))
    return blended(made, parts, sides), tiled(model), spec


def test_a_noise_mask_that_the_model_reads_is_cut():
    noise, mask = torch.randn(1, 128, 3, *SIDES), torch.ones(1, 1, 3, *SIDES)
    mask[:, :, :2, 3:15, 5:20] = 0
    want, patched, spec = tiles_of_clip("ltxv", noise, PARTS, SIDES, mask=mask)
    got = job(spec, noise, mask=mask)(patched)
    assert error(got, want) < 1e-5 and facts(patched, "Tiled Latents")["tiles"] == 6


def test_vace_frames_are_cut():
    model, spec = model_of("wan_vace")
    noise, frames, masks = torch.randn(1, 16, 3, 16, 32), torch.randn(1, 32, 3, 16, 32), torch.rand(1, 64, 3, 16, 32)

    def out(model, noise, columns):
        told = {"vace_frames": [frames[..., columns]], "vace_mask": [masks[..., columns]], "vace_strength": [1.0]}
        positive, negative = ([[c, {**extra, **told}] for c, extra in one] for one in conds(spec))
        return job(spec, noise, positive=positive, negative=negative)(model)

    halves = slice(0, 16), slice(16, 32)
    want = torch.cat([out(model, noise[..., half], half) for half in halves], -1)
    assert error(out(tiled(model, 16, 0), noise, slice(None)), want) < 1e-5


@pytest.mark.parametrize("first", [True, False])
def test_cores_easycache_would_mix_the_tiles(first):
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

    model, spec = model_of("flux")

    def beside(node):
        made = node.execute(model if first else tiled(model), 3.0, 0.0, 1.0, False)[0]
        return tiled(made) if first else made

    with pytest.raises(ValueError, match="EasyCache would give a tile what it kept of the one before"):
        job(spec, noise_of(*SIDES))(beside(EasyCacheNode))
    assert torch.isfinite(job(spec, noise_of(*SIDES), STEPS)(beside(LazyCacheNode))).all()


def test_what_cannot_join_it_is_refused():
    model, _ = model_of("flux")
    patched = tiled(model)
    for other in (lambda m: tiled(m), lambda m: run_node(RegionAdaptiveSampling, model=m)[0]):
        with pytest.raises(ValueError, match="Remove one of the two|one tile after another"):
            other(patched)
    with pytest.raises(ValueError, match="Mine has a condition for the whole picture"):
        attach(patched, ControlFeature("1", "Mine"))
    with pytest.raises(ValueError, match="overlap 8 must be smaller than tile 8"):
        tiled(model, 8, 8)


@pytest.mark.parametrize("sides", [SIDES, (8, 12)], ids=str)
def test_core_is_told_the_memory_of_a_tile(adapter, monkeypatch, sides):
    """And with Apply DiT4SR that of as many tokens again."""
    import comfy.sampler_helpers as helpers

    asked, estimate = [], helpers.estimate_memory
    monkeypatch.setattr(
        helpers, "estimate_memory", lambda m, shape, c: (asked.append([*shape]), estimate(m, shape, c))[1]
    )
    image, model = torch.rand(1, *(2 * n for n in sides), 3), tiled(model_of_base(base()))
    patched = run_node(ApplyDit4sr, model=model, adapter=adapter, image=image, vae=Vae())[0]
    job(RESTORED, noise_of(*sides))(patched)
    tile = [1, 16, *(min(side, 16) for side in sides)]
    assert asked == [tile]
    run = Run(features_of(patched.model_options), None, model.model, {}, None)
    one = run.features[1].held_bytes(run, (1, 16, *sides), {"positive": [{}]})
    assert one == int(model.model.memory_required(tile)) > 0


def test_an_interrupt_stops_between_tiles(monkeypatch):
    import comfy.model_management as management

    model, spec = model_of("flux")
    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted",
                        lambda: (_ for _ in ()).throw(InterruptedError()))  # fmt: skip
    with pytest.raises(InterruptedError):
        job(spec, noise_of(*SIDES))(tiled(model))
