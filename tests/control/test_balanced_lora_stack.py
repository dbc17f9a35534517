"""The stack against dense deltas and core's own Load LoRA, in every key layout, and on quantized weights."""

import comfy.model_management
import pytest
import torch
from lora_helper import PLACES, added, core, loras, stack, target, tensors  # noqa: F401 - a fixture
from nodes_helper import Job, error, model_of
from quantized_helper import folder, quantized  # noqa: F401 - a fixture

from tessera.methods.control.lora_gram import cosines
from tessera.methods.quant.calibration import LayerStatistics, Statistics

SIZES = (1.0, 4.0, 0.2)


def files(loras, name, layout, sizes=SIZES):  # noqa: F811
    held = [tensors(name, layout, seed=i, rank=2 + i, size=size) for i, size in enumerate(sizes)]
    common = tensors(name, layout, seed=9, rank=2)
    for one, size in zip(held, sizes, strict=True):  # a part that all share
        for key in one:
            if not key.endswith("alpha"):
                axis = 1 if one[key].shape[0] > one[key].shape[1] else 0
                share = common[key] * (size if axis else 1)
                one[key] = torch.cat([one[key], share], axis)
    return held, {f"lora_{i + 1}": loras(f"{i}.safetensors", one) for i, one in enumerate(held)}


def spec_sum(model, held, strengths, target_, orthogonal):
    """Sum of D'_i for each tensor, fp64 and dense: the formulas of the method on vectors."""
    made = {}
    each = [added(model, core(model, [one], [1.0])) for one in held]
    for key in each[0]:
        v = torch.stack([one[key].flatten() for one in each])
        n = v.norm(dim=1)
        if target_ == "geomean":
            v = v * (n.log().mean().exp() / n)[:, None]
        elif target_ == "first":
            v = v * (n[0] / n)[:, None]
        v = v * torch.tensor(strengths, dtype=torch.float64)[:, None]
        if orthogonal:
            n = v.norm(dim=1)
            values, vectors = torch.linalg.eigh((v @ v.T) / (n[:, None] * n))
            v = n[:, None] * ((vectors / values.sqrt()) @ vectors.T @ (v / n[:, None]))
            assert (cosines(v @ v.T) - torch.eye(len(n))).abs().max() < 1e-9
        made[key] = v.sum(0).view(each[0][key].shape)
    return made


@pytest.mark.parametrize("place", PLACES, ids="-".join)
def test_fused_deltas_are_those_of_the_formulas(loras, place):  # noqa: F811
    name, layout = place
    model = model_of(name)[0]
    held, names = files(loras, name, layout)
    strengths = [1.0, -0.5, 2.0]
    given = {f"strength_{i + 1}": s for i, s in enumerate(strengths)}
    for goal, where in (("geomean", "off"), ("first", "all"), ("none", "all")):
        got = added(model, stack(model, names, norm_target=goal, orthogonalize=where, **given)[0])
        want = spec_sum(model, held, strengths, goal, where == "all")
        assert got.keys() == want.keys() and len(got) >= 2
        assert max(error(got[key], want[key]) for key in want) < 1e-5
        plain = added(model, core(model, held, strengths))
        assert min(error(got[key], plain[key]) for key in want) > 0.05, "and not what a plain stack adds"


def equal_patches(a, b):
    assert a.patches.keys() == b.patches.keys()
    for key in a.patches:
        mine, theirs = added_one(a, key), added_one(b, key)
        assert torch.equal(mine, theirs)


def added_one(model, key):
    return model.patch_weight_to_device(key, return_weight=True)


@pytest.mark.parametrize("inputs", [
    {"norm_target": "none"}, {"beta": 0.0}, {"norm_target": "none", "orthogonalize": "shallow", "shallow_fraction": 0.0},
], ids=str)  # fmt: skip
def test_off_is_cores_stack_bit_for_bit(loras, inputs):  # noqa: F811
    model, spec = model_of("flux")
    held, names = files(loras, "flux", "kohya")
    got = stack(model, names, strength_2=0.3, **inputs)[0]
    want = core(model, held, [1.0, 0.3, 1.0])
    equal_patches(got, want)
    job = Job(spec, steps=2)
    assert torch.equal(job(got), job(want)) and not torch.equal(job(got), job(model))


@pytest.mark.parametrize("orthogonalize", ["off", "all"])
@pytest.mark.parametrize("layout", ["core", "kohya", "diffusers"])
def test_one_lora_is_the_plain_one_bit_for_bit(loras, layout, orthogonalize):  # noqa: F811
    model, spec = model_of("flux")
    held, names = files(loras, "flux", layout)
    got = stack(model, {"lora_3": names["lora_2"]}, strength_3=0.7, orthogonalize=orthogonalize)[0]
    equal_patches(got, core(model, held[1:2], [0.7]))
    assert torch.equal(Job(spec, steps=2)(got), Job(spec, steps=2)(core(model, held[1:2], [0.7])))


def test_none_and_strength_0_are_the_base(loras):  # noqa: F811
    model, spec = model_of("flux")
    _, names = files(loras, "flux", "core")
    assert not stack(model, {})[0].patches
    off = stack(model, names, strength_1=0.0, strength_2=0.0, strength_3=0.0)[0]
    assert not off.patches and torch.equal(Job(spec, steps=2)(off), Job(spec, steps=2)(model))
    two = added(model, stack(model, names, strength_2=0.0)[0])
    rest = {"lora_1": names["lora_1"], "lora_2": names["lora_3"]}
    assert all(torch.equal(two[k], v) for k, v in added(model, stack(model, rest)[0]).items()), (
        "as if it were not there"
    )


def test_the_weight_is_linear_in_strength(loras):  # noqa: F811
    """W(s) = W + s D, of all strengths together."""
    model = model_of("flux")[0]
    _, names = files(loras, "flux", "core")
    one, half = (
        added(model, stack(model, names, orthogonalize="all", **{f"strength_{i}": s for i in (1, 2, 3)})[0])
        for s in (1.0, -0.5)
    )
    assert max(error(-2 * half[key], one[key]) for key in one) < 1e-6


def test_shallow_leaves_deep_blocks_balanced_only(loras):  # noqa: F811
    model = model_of("wan")[0]
    _, names = files(loras, "wan", "core")
    kinds = {
        where: added(model, stack(model, names, orthogonalize=where, shallow_fraction=0.5)[0])
        for where in ("off", "shallow", "all")
    }
    first, last = (target(model, place)[0] for place in PLACES["wan", "core"])
    assert torch.equal(kinds["shallow"][first], kinds["all"][first])
    assert torch.equal(kinds["shallow"][last], kinds["off"][last])
    assert (
        error(kinds["all"][last], kinds["off"][last]) > 1e-3 and error(kinds["all"][first], kinds["off"][first]) > 1e-3
    )


def test_layouts_mix(loras):  # noqa: F811
    """q and v of one file against the joined qkv of another: one layer."""
    model = model_of("flux")[0]
    fused, apart = tensors("flux", "core"), tensors("flux", "diffusers", seed=1, size=5.0)
    names = {"lora_1": loras("a.safetensors", fused), "lora_2": loras("b.safetensors", apart)}
    report = stack(model, names)[2]
    row = next(r for r in report["layers"] if r["layer"] == "double_blocks.0.img_attn.qkv")
    each = [added(model, core(model, [one], [1.0])) for one in (fused, apart)]
    key = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    n = [float(one[key].norm()) for one in each]
    assert row["norms"] == pytest.approx(n, rel=1e-5)
    assert row["cosines"][0][1] == pytest.approx(float((each[0][key] * each[1][key]).sum() / n[0] / n[1]), abs=1e-6)
    balanced = [a * b for a, b in zip(row["norms"], row["factors"], strict=True)]
    assert balanced[0] == pytest.approx(balanced[1], rel=1e-5)


def test_features_of_recorded_inputs_are_balanced(loras):  # noqa: F811
    """With a calibration, norms are of what the deltas do to real inputs: channels differ in size there."""
    model = model_of("flux")[0]
    held, names = files(loras, "flux", "core")
    layer = PLACES["flux", "core"][0].removeprefix("diffusion_model.")
    recorded = LayerStatistics(128, 32)
    recorded.add(torch.randn(32, 128, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 2, 128))
    calibration = Statistics({layer: recorded}, "any", 2, "euler")
    out = stack(model, names, orthogonalize="all", calibration=calibration)
    x = recorded.rows.double() / 32**0.5
    key = f"diffusion_model.{layer}.weight"
    each = [added(model, core(model, [one], [1.0]))[key] for one in held]
    row, other = (r for r in out[2]["layers"])
    assert row["layer"] == layer and row["norms"] == pytest.approx([float((x @ d.T).norm()) for d in each], rel=1e-5)
    f = torch.stack([(x @ d.T).flatten() for d in each])
    goal = f.norm(dim=1).log().mean().exp()
    values, vectors = torch.linalg.eigh(cosines(f @ f.T))
    turned = goal * ((vectors / values.sqrt()) @ vectors.T @ (f / f.norm(dim=1, keepdim=True)))
    got = sum(factor * d for factor, d in zip(row["factors"], each, strict=True))
    assert error((x @ got.T).flatten(), turned.sum(0)) < 1e-4
    plain = stack(model, names, orthogonalize="all")
    assert plain[2]["layers"][1] == other and plain[2]["layers"][0]["norms"] != row["norms"]
    assert any("1 of 2 layers measured by their effect" in x for x in out.ui["tessera_report"][0]["lines"])
    wrong = Statistics({layer: LayerStatistics(64, 4)}, "any", 2, "euler")
    wrong.layers[layer].add(torch.ones(4, 64))
    with pytest.raises(ValueError, match=r"inputs of 64 channels at .*qkv, whose weight is \[384, 128\]"):
        stack(model, names, calibration=wrong)


def test_on_our_quantized_model(loras, folder):  # noqa: F811
    model, packed, spec, _ = quantized("flux", "int8_row")
    _, names = files(loras, "flux", "core", (0.3, 1.0, 0.1))
    inputs = {"orthogonalize": "all", "norm_target": "geomean"}
    got, want = stack(packed, names, **inputs), stack(model, names, **inputs)
    for a, b in zip(got[2]["layers"], want[2]["layers"], strict=True):
        assert a == b, "low-rank deltas do not depend on how the weight is stored"
    layer = PLACES["flux", "core"][0].removeprefix("diffusion_model.")
    effects = []
    for base, patched in ((packed, got[0]), (model, want[0])):
        comfy.model_management.load_models_gpu([base])
        module = base.model.diffusion_model.get_submodule(layer)
        x = torch.randn(5, module.in_features, generator=torch.Generator().manual_seed(3))
        before = module(x)
        comfy.model_management.load_models_gpu([patched])
        effects.append(patched.model.diffusion_model.get_submodule(layer)(x) - before)
    assert error(*effects) < 2e-2
    job = Job(spec, steps=2)
    assert torch.isfinite(job(got[0])).all() and not torch.equal(job(got[0]), job(packed))
