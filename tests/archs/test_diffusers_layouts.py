"""The layouts of bridged diffusers models, checked as those of ComfyUI's own: move one patch of the latent, and see which
token's value in attention moves; and the blocks that they offer."""

import math
from types import SimpleNamespace

import comfy.sample
import diffusers_helper as tiny
import pytest
import torch

from tessera.archs import all_archs, block_modules, find, layout_of
from tessera.patching.diffusers_load import load

LINEAR = ("SanaTransformer2DModel", "SanaVideoTransformer3DModel")
OVERRIDE = "optimized_attention_override"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("models"), {}
    return lambda name: made.setdefault(name, load(str(tiny.save(name, root))))


def moved_patch(x: torch.Tensor, grid, flat: int) -> torch.Tensor:
    """x [1, C, (T,) H, W] with one patch of the grid changed."""
    x, (_, rows, columns) = x.clone(), grid
    t, h, w = flat // (rows * columns), flat // columns % rows, flat % columns
    ph, pw = x.shape[-2] // rows, x.shape[-1] // columns
    part = x[..., h * ph : (h + 1) * ph, w * pw : (w + 1) * pw]
    (part[:, :, t : t + 1] if x.ndim == 5 else part).add_(3)
    return x


def run(model, name: str, change=None, hooks=None):
    """(grid, calls, output) of one evaluation: each call (block_type, block_index, queries, keys, values [tokens, ...]).
    change(x, grid) -> x as the diffusion model gets it."""
    patched, calls, grids = model(name).clone(), [], []
    dm = patched.model.diffusion_model
    arch, original = find(dm), patched.get_model_object("diffusion_model.forward")

    def forward(x, *args, **kwargs):
        grids.append(arch.grid(dm, x))
        return original(x if change is None else change(x, grids[-1]), *args, **kwargs)

    def override(func, q, k, v, *args, **kwargs):
        options = kwargs["transformer_options"]
        calls.append((options.get("block_type"), options.get("block_index"), q.shape[2], k.shape[2], v.clone()))
        return func(q, k, v, *args, **kwargs)

    patched.add_object_patch("diffusion_model.forward", forward)
    options = patched.model_options["transformer_options"]
    options[OVERRIDE] = override
    if hooks is not None:
        options["patches_replace"] = {"dit": hooks}
    start, cond = tiny.noise(name), tiny.conditioning(name)
    with torch.inference_mode():
        out = comfy.sample.sample(
            patched, start, 1, 1.0, "euler", "simple", cond, cond, torch.zeros_like(start), disable_pbar=True, seed=0
        )
    return grids[0], calls, out


def test_every_class_has_a_layout():
    assert {name for home, name in all_archs() if home == "diffusers"} == set(tiny.CLASSES)


@pytest.mark.parametrize("name", [name for name in tiny.CLASSES if name not in LINEAR])
def test_moved_patch_is_the_predicted_token(model, name):
    arch = find(model(name).model.diffusion_model)
    grid, before, _ = run(model, name)
    kinds = {spec.replace.removesuffix("_block"): spec.calls for spec in arch.blocks if spec.stack}
    index = math.prod(grid) * 2 // 3
    _, after, _ = run(model, name, lambda x, grid: moved_patch(x, grid, index))
    first = before[0]
    found = layout_of(arch, grid, kinds["double"][0], *first[2:4])
    assert first[:2] == ("double", 0) and found is not None and found.total == first[2]
    change = (first[4] - after[0][4]).abs().amax((0, 1, 3)) > 1e-6
    assert change.nonzero().flatten().tolist() == [found.image.start + index]


@pytest.mark.parametrize("name", tiny.CLASSES)
def test_calls_of_a_block(model, name):
    """In the declared number and order; a text of 6 tokens, 512 for Wan, in cross-attention or beside the image."""
    dm = model(name).model.diffusion_model
    arch, (grid, calls, _) = find(dm), run(model, name)
    for spec in (spec for spec in arch.blocks if spec.stack):
        for index, _ in enumerate(block_modules(dm, spec)):
            made = [c for c in calls if c[:2] == (spec.replace.removesuffix("_block"), index)]
            assert 1 <= len(made) <= len(spec.calls) and (len(made) == len(spec.calls) or name.startswith("SD3"))
            for kind, (_, _, queries, keys, _) in zip(spec.calls, made, strict=False):
                found = layout_of(arch, grid, kind, queries, keys)
                assert (found is not None) == (kind in ("self", "joint"))
                if kind == "joint":
                    assert found.others == tiny.TOKENS
                if kind == "cross":
                    assert queries == math.prod(grid) and keys == (512 if name.startswith("Wan") else tiny.TOKENS)
    assert not [c for c in calls if c[0] is None]
    outside = [c for c in calls if c[0] == "temporal"]
    assert len(outside) == (len(dm.temporal_transformer_blocks) if name.startswith("Latte") else 0)


@pytest.mark.parametrize("name", tiny.CLASSES)
def test_hooks_around_blocks(model, name):
    """One that passes on changes no bit, in the declared order; blocks that are passed over do not run."""
    dm, seen = model(name).model.diffusion_model, []
    specs = [spec for spec in find(dm).blocks if spec.stack]
    places = [(spec, index) for spec in specs for index, _ in enumerate(block_modules(dm, spec))]

    def passing(spec, index):
        def hook(args, extra):
            assert all(args[stream] is not None for stream in spec.streams)
            seen.append((spec.replace, index))
            return extra["original_block"](args)

        return hook

    grid, calls, plain = run(model, name)
    hooks = {(spec.replace, index): passing(spec, index) for spec, index in places}
    assert torch.equal(run(model, name, hooks=hooks)[2], plain)
    assert seen == [(spec.replace, index) for spec, index in places]
    skipping = {place: lambda args, extra: args for place in hooks}
    _, left, skipped = run(model, name, hooks=skipping)
    assert not [c for c in left if c[0] != "temporal"] and not torch.equal(skipped, plain)
    assert torch.equal(run(model, name)[2], plain)


@pytest.mark.parametrize("name", tiny.CLASSES)
def test_blocks_know_no_places_where_it_is_said(model, name):
    """Where no argument beside the streams belongs to single tokens, a block on shuffled tokens gives its output
    shuffled; rotations, convolutions and the like would tell."""
    dm = model(name).model.diffusion_model
    lists = [spec for spec in find(dm).blocks if spec.stack]
    hooks = {}

    def shuffled(args, extra):
        order = torch.randperm(args["img"].shape[1], generator=torch.Generator().manual_seed(1))
        out = extra["original_block"]({**args, "img": args["img"][:, order]})
        return {**out, "img": out["img"][:, order.argsort()]}

    for spec in lists:
        for index, _ in enumerate(block_modules(dm, spec)):
            hooks[spec.replace, index] = shuffled
    plain, got = run(model, name)[2], run(model, name, hooks=hooks)[2]
    apart = ((got - plain).norm() / plain.norm()).item()
    known = all(spec.per_token is not None for spec in lists)
    assert apart < 1e-5 if known else (apart > 1e-4 or name.startswith("Latte"))


@pytest.mark.parametrize("name", tiny.CLASSES)
def test_mlps_serve_each_token_alone(model, name):
    dm = model(name).model.diffusion_model
    arch = find(dm)
    for spec in (spec for spec in arch.blocks if spec.stack):
        for _, block in block_modules(dm, spec):
            for path in arch.mlps.get(spec.path, ()):
                mlp = getattr(block, path)
                if mlp is None:  # of the text, in the last block of Stable Diffusion 3
                    continue
                x = torch.randn(2, 7, mlp.net[0].proj.in_features)
                with torch.inference_mode():
                    some, every = mlp(x[:, [1, 4]]), mlp(x)
                assert every.shape == x.shape and torch.allclose(some, every[:, [1, 4]], atol=1e-6)


def test_joined_latent_frames():
    """CogVideoX 1.5 joins two frames in a token."""
    config = {**tiny.TINY["CogVideoXTransformer3DModel"].config, "patch_size_t": 2}
    arch = all_archs()["diffusers", "CogVideoXTransformer3DModel"]
    made = SimpleNamespace(config=SimpleNamespace(**config, patch_size=2))
    assert arch.grid(made, torch.zeros(1, 16, 4, 4, 6)) == (2, 2, 3)
