"""Every kind of adapter that core loads, text encoder keys, and files that do not fit, in the stack and the report."""

import comfy.lora
import comfy.sd
import pytest
import torch
from lora_helper import core, loras, stack, target, tensors  # noqa: F401 - a fixture
from nodes_helper import model_of, run_node

from tessera.nodes.control.lora_orthogonality_report import LoraOrthogonalityReport


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


def test_a_lora_that_makes_a_layer_larger(loras):  # noqa: F811
    """As FLUX's control LoRA do with img_in."""
    model, place = model_of("flux")[0], "diffusion_model.img_in"
    rows, columns = target(model, place)[1]
    larger = tensors("flux", "core", places=[place])
    larger[f"{place}.lora_A.weight"] = torch.cat([larger[f"{place}.lora_A.weight"]] * 2, 1)
    larger[f"{place}.reshape_weight"] = torch.tensor([rows, 2 * columns])
    names = {
        "lora_1": loras("a.safetensors", larger),
        "lora_2": loras("b.safetensors", tensors("flux", "core", places=[place])),
    }
    report = run_node(LoraOrthogonalityReport, model=model, **names)[2]
    assert report["layers"][0]["norms"][0] == 0 == report["layers"][0]["norms"][1], "no common size to compare"
    assert report["layers"][0]["block"] is None
    assert stack(model, names, orthogonalize="all")[2]["layers"][0]["factors"] == [1.0, 1.0]


SHORT = {
    "loha": "hada_w1_a",
    "lokr": "lokr_w2",
    "diff": "diff",
    "dora": "lora_up.weight",
    "glora": "b1.weight",
    "oft": "oft_blocks",
}


@pytest.mark.parametrize("kind", SHORT)
def test_an_adapter_of_another_shape_is_refused(loras, kind):  # noqa: F811
    """Core logs it and goes on without the layer."""
    model = model_of("flux")[0]
    held = other(kind, model, PLACE), other("locon", model, PLACE, 1)
    held[0][f"{PLACE}.{SHORT[kind]}"] = held[0][f"{PLACE}.{SHORT[kind]}"][:-1]
    names = {f"lora_{i + 1}": loras(f"{i}.safetensors", one) for i, one in enumerate(held)}
    with pytest.raises(ValueError, match=r"double_blocks.0.img_mlp.0.weight \[512, 128\]"):
        run_node(LoraOrthogonalityReport, model=model, **names)


def test_the_same_lora_twice_is_told(loras):  # noqa: F811
    model = model_of("wan")[0]
    name = loras("a.safetensors", tensors("wan", "core"))
    out = stack(model, {"lora_1": name, "lora_2": name}, orthogonalize="all")
    assert [row["factors"] for row in out[2]["layers"]] == [[1.0, 1.0]] * 2
    assert any("point the same way" in line for line in out.ui["tessera_report"][0]["lines"])


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


def test_text_encoder_keys_alone(loras):  # noqa: F811
    """As core's Load LoRA takes them."""
    model, word = model_of("flux")[0], "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    held = {f"{word}.lora_up.weight": torch.ones(6, 2), f"{word}.lora_down.weight": torch.ones(2, 4)}
    names = {"lora_1": loras("a.safetensors", held), "lora_2": loras("b.safetensors", tensors("flux", "kohya", 1))}
    out = stack(model, names, clip=Words())
    assert len(out[1].patches) == 1 and {row["factors"][0] for row in out[2]["layers"]} == {1.0}
    with pytest.raises(ValueError, match="layers of a text encoder alone, .* Connect clip"):
        stack(model, names)


@pytest.mark.parametrize(("kind", "part"), [("dora", "dora_scale"), ("tucker", "lora_mid.weight")])
def test_other_tensors_of_a_lora_that_do_not_fit(loras, kind, part):  # noqa: F811
    model = model_of("flux")[0]
    held = other("dora", model, PLACE)
    if kind == "tucker":
        held = {key: value for key, value in held.items() if "dora" not in key}
    held[f"{PLACE}.{part}"] = torch.ones(7, 3)
    with pytest.raises(ValueError, match=r"a.safetensors: .* does not fit .*img_mlp.0.weight \[512, 128\]"):
        stack(model, {"lora_1": loras("a.safetensors", held)})


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
    other_half = key.replace("_B.", "_A.")
    half = {k: v for k, v in held.items() if k != other_half}
    with pytest.raises(ValueError, match=f"a.safetensors lacks {other_half}"):
        stack(model, {"lora_1": loras("a.safetensors", half)})
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged or no LoRA file"):
        stack(model, {"lora_1": "b.safetensors"})
    odd = loras("c.safetensors", held | {"diffusion_model.nowhere.lora_A.weight": torch.ones(1, 1)})
    told = stack(model, {"lora_1": odd}).ui["tessera_report"][0]["lines"]
    assert any("1 keys fit nothing here, such as diffusion_model.nowhere" in line for line in told)
