"""Every prediction about token order is checked on the running model: move one patch of the latent, and see which
token's value in attention moves."""

import dataclasses
import math
import random

import pytest
import torch

from tessera.archs import all_archs, find, layout_of, obscured

NOT_ODD = {  # these need sides of whole patches, a camera of the same size or a fixed number of tokens
    "hunyuan_video", "pixart", "mochi", "cosmos", "kandinsky5", "wan_vace", "wan_camera", "triposplat",
}  # fmt: skip
PIXELS = {"chroma_radiance", "pixeldit", "lumina_pixels", "pid"}


def copies(value):
    return tuple(copies(v) for v in value) if isinstance(value, tuple) else value.clone()


def isolated(blocks, index, streams, proceed):
    """around: the block computes, but hands on what it received, so that tokens never meet before a block."""
    kept = copies(streams)
    out = proceed(streams)
    return out if isinstance(out[0], tuple) and not isinstance(kept[0], tuple) else kept  # VACE returns two tensors


def moved(a: torch.Tensor, b: torch.Tensor) -> list[int]:
    """Indices of the tokens (axis 0) that differ."""
    distance = (a - b).abs().flatten(1).amax(dim=1)
    return (distance > 1e-5 * distance.max()).nonzero().flatten().tolist() if distance.max() > 0 else []


def layout(case, record, call, blocks, references=0):
    pad = case.arch.pad(case.diffusion_model)
    return layout_of(case.arch, record.grid, blocks.calls[call.nth], call.queries, call.keys, references, pad)


def first_calls(record, blocks):
    """(call, call of the same place) of image attention in the first block of a list."""
    return [c for c in record.calls if c.block == (blocks.path, 0) and blocks.calls[c.nth] in ("self", "joint")]


def assert_order(case, spec=None, extra=None, references=0, paths=None):
    """In the first block of every list, the token at image.start + index moves in attention, and no other. Away from
    the first row and column: models fill ragged edges with what stands there."""
    before, checked = case.run(isolated, None, None, extra, spec), 0
    pick, (frames, rows, columns) = random.Random(case.name), before.grid
    row, column = pick.randrange(min(1, rows - 1), rows), pick.randrange(min(1, columns - 1), columns)
    index = (pick.randrange(frames) * rows + row) * columns + column
    after = case.run(isolated, None, index, extra, spec)
    for blocks in case.arch.blocks:
        if paths is not None and blocks.path not in paths:
            continue
        for a, b in zip(first_calls(before, blocks), first_calls(after, blocks), strict=True):
            found = layout(case, before, a, blocks, references)
            assert found is not None, (blocks.path, a.queries, before.grid)
            assert found.total == a.queries and found.others == a.queries - math.prod(before.grid)
            assert moved(a.value, b.value) == [found.image.start + index], (blocks.path, found, index)
            checked += 1
    return checked


def stream_tokens(case, blocks, record, streams):
    """Tokens of the list's first stream, read with its axes."""
    stream = streams[0] if isinstance(streams, tuple) else streams
    stream = stream[0] if isinstance(stream, tuple) else stream
    assert stream.ndim == len(blocks.axes)
    return math.prod(n for n, axis in zip(stream.shape, blocks.axes, strict=True) if axis in "NTHW")


def test_moved_patch_is_the_predicted_token(case):
    if case.arch.override:
        assert assert_order(case) >= len(case.arch.blocks)
        return
    seen = []  # attention cannot be observed here: the stream that enters the first block tells

    def keep(blocks, index, streams, proceed):
        seen.append(streams[0].clone())
        return proceed(streams)

    grid = case.run(keep).grid
    index = random.Random(case.name).randrange(math.prod(grid))
    case.run(keep, perturb=index)
    a, b = seen[0], seen[len(seen) // 2]
    found = layout_of(case.arch, grid, case.arch.blocks[0].calls[0], a.shape[1], a.shape[1])
    assert moved(a.movedim(1, 0), b.movedim(1, 0)) == [found.image.start + index]


def odd(case):
    """The spec with a latent whose sides no patch divides."""

    def sides(shape):
        if len(shape) == 3:
            return (1, 51, shape[2]) if case.name == "triposplat" else (*shape[:2], 51)
        near = {"pixart": (33, 41)}.get(case.name, (9, 13))
        return (*shape[:-2], *((n - 3 for n in shape[-2:]) if case.name in PIXELS else near))

    latent = case.spec.latent
    latent = [sides(latent[0]), *latent[1:]] if isinstance(latent, list) else sides(latent)
    return dataclasses.replace(case.spec, latent=latent)


def test_odd_sizes(case):
    spec = odd(case)
    if case.name in NOT_ODD:
        with pytest.raises((RuntimeError, AssertionError)):
            case.run(spec=spec)
    elif case.arch.override:
        assert assert_order(case, spec) >= len(case.arch.blocks)
    else:
        grid, before = case.run(spec=spec).grid, case.record.grid
        assert math.prod(grid) > math.prod(before)


def test_streams_hold_the_tokens_of_the_layout(case):
    """joined streams are as long as joint attention, others as long as the image with its padding."""
    streams = {}

    def keep(blocks, index, values, proceed):
        streams.setdefault(blocks.path, values)
        return proceed(values)

    record = case.run(keep)
    pad = case.arch.pad(case.diffusion_model)
    image = -(-math.prod(record.grid) // pad) * pad
    for blocks in case.arch.blocks:
        tokens = stream_tokens(case, blocks, record, streams[blocks.path])
        calls = first_calls(record, blocks)
        if blocks.joined and calls:
            assert tokens == calls[0].queries > image
        elif blocks.joined:
            assert tokens > image
        else:
            assert tokens == image


def reference(x):
    return torch.randn(*x.shape[:-2], 4, 6, generator=torch.Generator().manual_seed(3))


FOLLOWING = {  # reference images behind the image: how many tokens of them
    "flux": 6, "flux2": 24, "qwen_image": 6, "mage_flow": 24, "krea2": 6, "joyimage": 6,
}  # fmt: skip
LEADING = {"hunyuan_video": "ref_latent", "z_image": "ref_latents", "omnigen2": "ref_latents", "boogu": "ref_latents"}


@pytest.mark.parametrize("name", FOLLOWING)
def test_references_behind_the_image(case_named, name):
    case, counts = case_named(name), []

    def extra(x):
        return {"ref_latents": [reference(x)], "ref_latents_method": "index"}

    record = case.run(extra=extra)
    for call in record.calls:
        if call.block is not None:
            counts.append(sum(call.options.get("reference_image_num_tokens") or ()))
    assert assert_order(case, extra=extra, references=FOLLOWING[name])
    assert set(counts) == {0 if name == "joyimage" else FOLLOWING[name]}


@pytest.mark.parametrize("name", LEADING)
def test_references_before_the_image(case_named, name):
    case, key = case_named(name), LEADING[name]

    def extra(x):
        ref = reference(x)[:, :, :1] if x.ndim == 5 else reference(x)
        return {key: ref if key == "ref_latent" else [ref]}

    lists = [b.path for b in case.lists(stack=True) if b.calls == ("joint",)]
    assert assert_order(case, extra=extra, paths=lists) == len(lists)
    record = case.run(extra=extra)
    if name == "boogu":  # its second call sees reference and image without text
        blocks = next(b for b in case.arch.blocks if b.calls == ("joint", "self"))
        joint, image_only = first_calls(record, blocks)
        assert layout(case, record, joint, blocks) and layout(case, record, image_only, blocks) is None


def test_unknown_tokens_have_no_layout(case_named):
    """Wan with a reference in context and with frames appended; LTX-Video with a guide that lost tokens."""
    wan = case_named("wan")
    for extra in (
        lambda x: {"context_latents": [reference(x)]},
        lambda x: {"time_dim_concat": torch.zeros_like(x[:, :, :1])},
    ):
        record = wan.run(extra=extra)
        (call,) = first_calls(record, wan.arch.blocks[0])
        assert call.queries > math.prod(record.grid) and layout(wan, record, call, wan.arch.blocks[0]) is None

    ltxv = case_named("ltxv_meta")

    def guide(x):
        mask = torch.ones_like(x[:, :1])
        mask[:, :, -1, 0] = -1
        times = torch.full((1, math.prod(x.shape[2:])), 0.5)
        return {"keyframe_idxs": torch.zeros(1, 3, x[0, 0, 0].numel(), 2), "denoise_mask": mask, "timestep": times}

    record = ltxv.run(extra=guide)
    (call,) = first_calls(record, ltxv.arch.blocks[0])
    assert call.queries < math.prod(record.grid) and layout(ltxv, record, call, ltxv.arch.blocks[0]) is None
    assert obscured(ltxv.arch, {"keyframe_idxs": torch.zeros(1)}) == "keyframe_idxs"
    assert obscured(ltxv.arch, {"keyframe_idxs": None, "denoise_mask": 1}) is None


def test_lengths_that_do_not_fit():
    archs = {arch.name: arch for arch in all_archs().values()}
    grid = (1, 4, 6)
    for name, kind, queries, keys, references, pad in [
        ("Wan", "self", 25, 25, 0, 1),  # one token too many for image-only attention
        ("Wan", "self", 23, 23, 0, 1),
        ("Wan", "self", 24, 12, 0, 1),
        ("Wan", "cross", 24, 24, 0, 1),  # as long as the image, but text
        ("Wan", "other", 24, 24, 0, 1),
        ("Flux", "joint", 23, 23, 0, 1),
        ("Flux", "joint", 34, 34, 12, 1),  # more references than fit
        ("Flux", "joint", 34, 30, 0, 1),
        ("Lens", "joint", 20, 20, 0, 1),
        ("Lumina 2", "joint", 60, 60, 0, 32),  # no multiple of the padding
        ("Lumina 2", "self", 24, 24, 0, 32),
        ("Lumina 2", "joint", 64, 64, 0, None),  # padding not told
    ]:
        assert layout_of(archs[name], grid, kind, queries, keys, references, pad) is None, (name, kind, queries)
    assert layout_of(archs["Lumina 2"], grid, "joint", 64, 64, 0, 32).image == slice(32, 56)
    assert layout_of(archs["Lumina 2"], grid, "joint", 34, 34, 0, 1).image == slice(10, 34)
    assert layout_of(archs["Flux"], grid, "joint", 40, 40, 6).image == slice(10, 34)
    assert layout_of(archs["Lens"], grid, "joint", 40, 40).image == slice(0, 24)
    assert layout_of(archs["Wan"], grid, "self", 24, 24).image == slice(0, 24)


def test_unknown_models_are_not_known(case_named):
    flux = case_named("flux").diffusion_model
    assert find(flux).name == "Flux"
    derived = type("Flux", (type(flux),), {"__module__": "comfy.ldm.flux.model2"})
    elsewhere = type("Flux", (), {"__module__": "some_pack.flux"})
    subclass = type("FluxFaster", (type(flux),), {"__module__": type(flux).__module__})
    assert find(torch.nn.Linear(1, 1)) is None
    assert find(elsewhere()) is None
    assert find(object.__new__(subclass)) is None
    assert find(object.__new__(derived)) is not None  # the package decides, not the file
    assert find(object.__new__(type("MMDiT", (), {"__module__": "comfy.ldm.modules.diffusionmodules.mmdit"}))) is None
