"""What the report tells of LoRA, against their dense deltas."""

import json

import pytest
import torch
from lora_helper import PLACES, loras, target, tensors  # noqa: F401 - a fixture
from nodes_helper import model_of, run_node

from tessera.methods.measure.heat_map import PALE, colour
from tessera.nodes.control.lora_orthogonality_report import LoraOrthogonalityReport


def report(model, *names, **inputs):
    given = {f"lora_{i + 1}": name for i, name in enumerate(names)}
    return run_node(LoraOrthogonalityReport, model=model, **given, **inputs)


def products(model, held, layout="kohya"):
    """{layer: fp64 [k, k]} of dense deltas."""
    made = {}
    for place in PLACES["flux", layout]:
        deltas = []
        for one in held:
            up, down = one[f"{place}.lora_up.weight"].double(), one[f"{place}.lora_down.weight"].double()
            deltas.append((one[f"{place}.alpha"].double() / down.shape[0] * up @ down).flatten())
        v = torch.stack(deltas)
        made[target(model, place)[0].removeprefix("diffusion_model.").removesuffix(".weight")] = v @ v.T
    return made


@pytest.fixture
def three():
    held = [tensors("flux", "kohya", seed=i, size=1.0 + i) for i in range(3)]
    down = f"{PLACES['flux', 'kohya'][0]}.lora_down.weight"
    up = down.replace("down", "up")
    held[1][up], held[1][down] = -2 * held[0][up], held[0][down]  # the same direction, turned round
    return held


def test_norms_and_cosines_are_those_of_dense_deltas(loras, three):  # noqa: F811
    model = model_of("flux")[0]
    names = [loras(f"{i}.safetensors", one) for i, one in enumerate(three)]
    heat_map, text, told = report(model, *names)
    assert json.loads(text) == told and told["loras"] == names
    want = products(model, three)
    assert [row["layer"] for row in told["layers"]] == [*want]
    for row in told["layers"]:
        dense = want[row["layer"]]
        n = dense.diagonal().sqrt()
        assert row["norms"] == pytest.approx(n.tolist(), rel=1e-5)
        cos = dense / n[:, None] / n[None]
        assert torch.allclose(torch.tensor(row["cosines"], dtype=torch.float64), cos, atol=1e-5)
    assert told["layers"][0]["cosines"][0][1] == pytest.approx(-1, abs=1e-5)
    assert [row["block"] for row in told["layers"]] == [0, 3], "the fourth block is the second single one"
    assert told["pairs"][0]["shallow"] == pytest.approx(1, abs=1e-5) and told["pairs"][0]["middle"] is None
    assert heat_map.shape[0] == 1 and heat_map.shape[3] == 3


def test_the_heat_map_is_red_where_they_agree_or_oppose(loras, three):  # noqa: F811
    model = model_of("flux")[0]
    names = [loras(f"{i}.safetensors", one) for i, one in enumerate(three)]
    for rows in ("layers", "blocks"):
        pixels = {
            tuple(round(255 * float(v)) for v in p)
            for p in report(model, *names, rows=rows)[0].view(-1, 3).unique(dim=0)
        }
        assert colour(0.0) in pixels, "cosine -1"
    apart = [tensors("flux", "kohya", seed=i, places=[place]) for i, place in enumerate(PLACES["flux", "kohya"])]
    names = [loras(f"{i}.safetensors", one) for i, one in enumerate(apart)]
    heat_map, _, told = report(model, *names)
    pixels = {tuple(round(255 * float(v)) for v in p) for p in heat_map.view(-1, 3).unique(dim=0)}
    assert PALE in pixels and told["pairs"][0]["mean"] is None, "no layer that both patch"


def test_blocks_add_their_layers_up(loras):  # noqa: F811
    from tessera.patching.lora import read
    from tessera.patching.lora_report import blocks, measure, overlap

    model = model_of("wan")[0]
    places = ["diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.ffn.0", "diffusion_model.head.head"]
    held = [tensors("wan", "core", seed=i, places=places) for i in range(2)]
    import folder_paths

    names = [loras(f"{i}.safetensors", one) for i, one in enumerate(held)]
    found = measure(model, [read(folder_paths.get_full_path("loras", name), model) for name in names])
    rows = {row.name: row for row in blocks(found)}
    assert rows.keys() == {"outside", "0"}
    inside = [layer for layer in found if layer.block == 0]
    assert torch.allclose(rows["0"].products, sum(layer.products for layer in inside)) and len(inside) == 2
    assert overlap(rows["0"], 0, 1) is not None


def test_the_panel_tells_pairs_and_norms(loras, three):  # noqa: F811
    model = model_of("flux")[0]
    names = [loras(f"{i}.safetensors", one) for i, one in enumerate(three)]
    (panel,) = report(model, *names).ui["tessera_report"]
    assert panel["lines"][0] == "3 LoRA, 2 layers; 2 of them shared"
    assert any(line.startswith("1-2: |cos| ") for line in panel["lines"]) and len(panel["lines"]) == 7
    assert not model.patches, "the MODEL is left as it is"


def test_one_alone_tells_its_norms(loras, three):  # noqa: F811
    heat_map, _, told = report(model_of("flux")[0], loras("a.safetensors", three[0]))
    assert told["pairs"] == [] and len(told["layers"]) == 2 and heat_map.shape[3] == 3
    assert all(row["norms"][0] > 0 and row["cosines"] == [[1.0]] for row in told["layers"])


def test_nothing_chosen():
    with pytest.raises(ValueError, match="choose at least one"):
        report(model_of("flux")[0])
