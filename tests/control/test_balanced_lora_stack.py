"""The stack against dense deltas and core's own Load LoRA, in every key layout, and on quantized weights."""

import comfy.sd
import comfy.utils
import pytest
import torch
from lora_helper import PLACES, added, loras, target, tensors  # noqa: F401 - a fixture
from nodes_helper import Job, error, model_of, run_node
from quantized_helper import folder, quantized  # noqa: F401 - a fixture

from tessera.methods.control.lora_gram import cosines
from tessera.nodes.control.balanced_lora_stack import BalancedLoraStack
from tessera.nodes.control.lora_orthogonality_report import LoraOrthogonalityReport

SIZES = (1.0, 4.0, 0.2)


def core(model, held, strengths):
    """Load LoRA, chained."""
    for one, strength in zip(held, strengths, strict=True):
        model = comfy.sd.load_lora_for_models(model, None, one, strength, 0)[0]
    return model


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


def stack(model, names, **inputs):
    return run_node(BalancedLoraStack, model=model, **names, **inputs)


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


def other(kind, model, place, seed=0):
    """Tensors of another kind of adapter for one layer."""
    (rows, columns), g = target(model, place)[1], torch.Generator().manual_seed(seed)

    def n(*shape):
        return torch.randn(shape, generator=g) / shape[-1] ** 0.5

    made = {
        "loha": {"hada_w1_a": n(rows, 2), "hada_w1_b": n(2, columns), "hada_w2_a": n(rows, 2), "hada_w2_b": n(2, columns)},
        "lokr": {"lokr_w1": n(4, 4), "lokr_w2": n(rows // 4, columns // 4)},
        "diff": {"diff": n(rows, columns), "diff_b": n(rows)},
        "dora": {"lora_up.weight": n(rows, 3), "lora_down.weight": n(3, columns), "dora_scale": 1 + n(rows, 1).abs()},
        "glora": {"a1.weight": n(columns, 3), "a2.weight": n(3, columns), "b1.weight": n(rows, 3), "b2.weight": n(3, columns)},
        "oft": {"oft_blocks": n(rows // 8, 8, 8)},
        "locon": {"lora_up.weight": n(rows, 3), "lora_down.weight": n(3, columns)},
    }[kind]  # fmt: skip
    return {f"{place}.{part}": value for part, value in made.items()}


PLACE = "lora_unet_double_blocks_0_img_mlp_0"


def merged(model, held, strength=1.0):
    """(weight of PLACE with that file on it, without), fp32."""
    key = target(model, PLACE)[0]
    weight = model.get_model_object(key).detach().float()
    patched = core(model, [held], [strength])
    return comfy.lora.calculate_weight(patched.patches[key], weight.clone(), key), weight


@pytest.mark.parametrize("kind", ["loha", "lokr", "diff", "dora", "glora", "locon"])
def test_other_adapters_are_balanced_by_their_exact_delta(loras, kind):  # noqa: F811
    model = model_of("flux")[0]
    held = other(kind, model, PLACE), other("locon", model, PLACE, 1)
    names = {f"lora_{i + 1}": loras(f"{i}.safetensors", one) for i, one in enumerate(held)}
    report = stack(model, names)[2]
    (row,) = report["layers"]
    deltas = []
    for one in held:
        after, before = merged(model, one)
        bias = one.get(f"{PLACE}.diff_b", torch.zeros(1))
        deltas.append((after - before).double().square().sum().add(bias.double().square().sum()).sqrt())
    assert row["norms"] == pytest.approx([float(n) for n in deltas], rel=1e-4)
    for one, factor, n in zip(held, row["factors"], row["norms"], strict=True):
        after, before = merged(model, one, factor)
        assert float((after - before).norm()) == pytest.approx(
            factor * float((merged(model, one)[0] - before).norm()), rel=1e-3
        ), "its effect on the weight is linear in the strength that it was given"
        assert factor * n == pytest.approx((row["norms"][0] * row["norms"][1]) ** 0.5, rel=1e-4)


def test_what_is_not_linear_keeps_its_strength(loras):  # noqa: F811
    model = model_of("flux")[0]
    held = other("oft", model, PLACE), other("locon", model, PLACE, 1), other("locon", model, PLACE, 2)
    held[2][f"{PLACE}.lora_up.weight"] *= 6
    names = {f"lora_{i + 1}": loras(f"{i}.safetensors", one) for i, one in enumerate(held)}
    out = stack(model, names, orthogonalize="all")
    (row,) = out[2]["layers"]
    assert row["factors"][0] == 1.0 and row["factors"][1] > 1.5 > 1 > row["factors"][2]
    assert any("not linear in its strength" in line for line in out.ui["tessera_report"][0]["lines"])
    report = run_node(LoraOrthogonalityReport, model=model, **names)[2]
    assert report["layers"][0]["norms"][0] > 0, "but it is measured"


def test_an_adapter_of_another_shape_is_refused(loras):  # noqa: F811
    """Core logs it and goes on without the layer."""
    model = model_of("flux")[0]
    held = other("loha", model, PLACE), other("locon", model, PLACE, 1)
    held[0][f"{PLACE}.hada_w1_a"] = held[0][f"{PLACE}.hada_w1_a"][:-4]
    names = {f"lora_{i + 1}": loras(f"{i}.safetensors", one) for i, one in enumerate(held)}
    with pytest.raises(ValueError, match=r"double_blocks.0.img_mlp.0.weight \[512, 128\]"):
        stack(model, names)


def test_the_same_lora_twice_is_told(loras):  # noqa: F811
    model = model_of("wan")[0]
    name = loras("a.safetensors", tensors("wan", "core"))
    out = stack(model, {"lora_1": name, "lora_2": name}, orthogonalize="all")
    assert [row["factors"] for row in out[2]["layers"]] == [[1.0, 1.0]] * 2
    assert any("point the same way" in line for line in out.ui["tessera_report"][0]["lines"])


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


class Words:
    """As much of a CLIP as its LoRA loader asks for."""

    def __init__(self):
        self.cond_stage_model = torch.nn.Module()
        layers = torch.nn.ModuleDict({"fc1": torch.nn.Linear(4, 6)})
        path = ["clip_l", "transformer", "text_model", "encoder", "layers", "0", "mlp"]
        owner = self.cond_stage_model
        for part in path[:-1]:
            owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        owner.add_module("mlp", layers)
        self.patches = []

    def clone(self):
        made = Words()
        made.cond_stage_model = self.cond_stage_model
        return made

    def add_patches(self, patches, strength):
        self.patches.append((sorted(patches), strength))
        return list(patches)


def test_text_encoder_keys(loras):  # noqa: F811
    model, word = model_of("flux")[0], "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    held = tensors("flux", "kohya") | {
        f"{word}.lora_up.weight": torch.ones(6, 2),
        f"{word}.lora_down.weight": torch.ones(2, 4),
    }
    names = {"lora_1": loras("a.safetensors", held), "lora_2": loras("b.safetensors", tensors("flux", "kohya", 1))}
    left_out = stack(model, names)
    assert left_out[1] is None
    assert any("2 tensors for a text encoder are left out" in x for x in left_out.ui["tessera_report"][0]["lines"])
    clip = Words()
    out = stack(model, names, strength_1=0.4, clip=clip)
    assert (
        out[1].patches == [(["clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"], 0.4)]
        and not clip.patches
    )
    assert any("at its plain strength" in x for x in out.ui["tessera_report"][0]["lines"])


def test_files_that_do_not_fit(loras, tmp_path):  # noqa: F811
    model = model_of("flux")[0]
    held = tensors("flux", "core")
    key = next(iter(held))
    cases = {
        "fits no layer of this MODEL": tensors("wan", "core"),
        r"does not fit diffusion_model.double_blocks.0.img_attn.qkv.weight \[384, 128\]": held | {key: held[key][:-1]},
        f"{key} .* is not finite": held | {key: held[key] * float("nan")},
    }
    for sentence, wrong in cases.items():
        with pytest.raises(ValueError, match=sentence):
            stack(model, {"lora_1": loras("a.safetensors", wrong)})
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged or no LoRA file"):
        stack(model, {"lora_1": "b.safetensors"})
    odd = loras("c.safetensors", held | {"diffusion_model.nowhere.lora_A.weight": torch.ones(1, 1)})
    told = stack(model, {"lora_1": odd}).ui["tessera_report"][0]["lines"]
    assert any("1 keys fit nothing here, such as diffusion_model.nowhere" in line for line in told)
