"""CLEAR's official files, synthetic ones in exactly their format: they change exactly what they list, or are refused."""

import json
from pathlib import Path

import folder_paths
import pytest
import torch
from nodes_helper import Job, error, facts, model_of, run_node
from safetensors.torch import save_file

from tessera.methods.attention import clear_weights as m
from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.nodes.loaders.load_clear_weights import LoadClearWeights
from tessera.patching.clear_weights import load

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/keys/clear.json").read_text())
SIZES = 2, 2, 128  # double blocks, single blocks, width of the tiny FLUX
NAME = "Load CLEAR Weights"


def official(double, single, hidden, down=0):
    """Keys and shapes of a file for a FLUX of that size, from the table."""
    groups = [("double", double), ("single", single)]
    keys = {k.format(i=i): shape for group, n in groups for i in range(n) for k, shape in GOLDEN[group].items()}
    if down:
        for key in GOLDEN["down"]:
            count = single if key.startswith("single") else double
            keys |= {key.format(i=i): [1, 1, 1, down, 1, down, 1] for i in range(count)}
    return {k: [hidden if n == 3072 else n for n in shape] for k, shape in keys.items()}


def tensors(down=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        k: (torch.randn(shape, generator=generator) / (shape[-1] if len(shape) == 2 else 16) ** 0.5).bfloat16()
        for k, shape in official(*SIZES, down).items()
    }


def write(folder, content, name="clear_local_8.safetensors", metadata=None):
    save_file(content, str(folder / name), metadata)
    return str(folder / name)


def weights_of(model):
    """The diffusion model's weights as they are while it samples."""
    model.unpatch_model()  # an earlier run leaves it loaded
    model.patch_model()
    held = {k: v.clone() for k, v in model.model.state_dict().items()}
    model.unpatch_model()
    return held


def test_the_official_table_is_what_is_expected():
    sizes = GOLDEN["model"]
    want = {k: tuple(shape) for k, shape in official(**sizes).items()}
    assert m.expected(**sizes) == want and len(want) == 19 * 8 + 38 * 6


@pytest.mark.parametrize(("name", "trained"), GOLDEN["files"].items(), ids=str)
def test_the_name_of_a_file_tells_its_window(name, trained):
    got = m.read(tensors(trained["down_factor"]), *SIZES, name, {})
    assert (got.radius, got.down_factor) == (trained["radius"], trained["down_factor"])
    assert len(got.patch_weights) == (4 if trained["down_factor"] else 0)


def test_metadata_tells_it_first():
    got = m.read(tensors(), *SIZES, "mine.safetensors", {"radius": "12", "down_factor": "2"})
    assert (got.radius, got.down_factor) == (12, 2)
    got = m.read(tensors(2), *SIZES, "mine.safetensors", {"down_factor": "4"})
    assert (got.radius, got.down_factor) == (None, 2), "the patch weights themselves know best"
    with pytest.raises(ValueError, match="radius as 'big'"):
        m.read(tensors(), *SIZES, "mine.safetensors", {"radius": "big"})


@pytest.mark.parametrize("down", [0, 4])
def test_exactly_the_listed_tensors_change(tmp_path, down):
    model, _ = model_of("flux")
    content = tensors(down)
    before, after = weights_of(model), weights_of(load(model, write(tmp_path, content), None))
    h, want = SIZES[2], {}
    for i in range(2):
        for end in ("weight", "bias"):
            both = f"transformer_blocks.{i}.attn.{{}}.{end}"
            qkv = [torch.cat([content[p + both.format(n)] for n in ("to_q", "to_k", "to_v")]) for p in ("", "single_")]
            want[f"diffusion_model.double_blocks.{i}.img_attn.qkv.{end}"] = qkv[0]
            want[f"diffusion_model.double_blocks.{i}.img_attn.proj.{end}"] = content[both.format("to_out.0")]
            linear1 = f"diffusion_model.single_blocks.{i}.linear1.{end}"
            want[linear1] = torch.cat([qkv[1].to(before[linear1].dtype), before[linear1][3 * h :]])
    assert {k for k in before if not torch.equal(before[k], after[k])} == set(want)
    assert all(torch.equal(after[k].float(), want[k].float()) for k in want)
    assert all(torch.equal(v, before[k]) for k, v in weights_of(model).items()), "the MODEL it came from is as it was"


def own_weights(model):
    """A CLEAR file that holds the model's own projections."""
    state, out = model.model.state_dict(), {}
    for key in official(*SIZES):
        path, i, _, name, *rest = key.split(".")
        end, h = rest[-1], SIZES[2]
        if name == "to_out":
            out[key] = state[f"diffusion_model.double_blocks.{i}.img_attn.proj.{end}"].clone()
            continue
        source = "double_blocks.{}.img_attn.qkv" if path == "transformer_blocks" else "single_blocks.{}.linear1"
        start = ("to_q", "to_k", "to_v").index(name) * h
        out[key] = state[f"diffusion_model.{source.format(i)}.{end}"][start : start + h].clone()
    return out


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_models_own_weights_change_nothing(tmp_path, dtype):
    model, spec = model_of("flux", dtype)
    loaded, job = load(model, write(tmp_path, own_weights(model)), None), Job(spec, steps=2)
    assert torch.equal(job(loaded), job(model)) and torch.equal(job(loaded), job(model))
    assert facts(loaded, NAME)["notes"] == [
        "no Local Window Attention is on this MODEL, for which these weights were trained"
    ]


def test_a_lora_adds_to_the_new_weights_from_either_side(tmp_path):
    path = write(tmp_path, tensors())
    key = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    change = {key: ("diff", (torch.randn(384, 128),))}
    model, _ = model_of("flux")
    before = model.clone()
    before.add_patches(change, 0.5)
    after = load(model, path, None)
    after.add_patches(change, 0.5)
    got, want = weights_of(load(before, path, None))[key], weights_of(after)[key]
    assert torch.equal(got, want) and not torch.equal(got, weights_of(load(model, path, None))[key])


def window(model, **inputs):
    return run_node(LocalWindowAttention, model=model, **{"min_tokens": 0, **inputs})[0]


def test_its_patch_weights_reach_the_window_in_any_order(tmp_path):
    model, spec = model_of("flux")
    held = own_weights(model)
    uniform = {k: torch.full(s, 1 / 4) for k, s in official(*SIZES, 2).items() if "spatial" in k}
    tilted = {k: torch.tensor([[0.7, 0.1], [0.1, 0.1]]).view(v.shape) for k, v in uniform.items()}
    mean, other = (
        write(tmp_path, held | w, f"clear_local_2_down_2{n}.safetensors") for n, w in enumerate((uniform, tilted))
    )
    job, inputs = Job(spec, steps=2, cfg=1.0), {"radius": 2, "down_factor": 2}
    plain = job(window(model, pooled_counts_as="one", **inputs))
    assert error(job(window(load(model, mean, None), **inputs)), plain) < 1e-5
    got = window(load(model, other, None), **inputs)
    assert error(job(got), plain) > 1e-4
    assert torch.equal(job(load(window(model, **inputs), other, None)), job(got))
    assert facts(got, NAME) == {"tensors": 32, "radius": 2, "down_factor": 2, "notes": []}


def test_a_window_that_it_was_not_trained_for_is_told_or_refused(tmp_path, caplog):
    model, spec = model_of("flux")
    loaded = load(model, write(tmp_path, tensors(4), "clear_local_8_down_4.safetensors"), None)
    job = Job(spec, steps=1, cfg=1.0)
    off = window(loaded, radius=3, down_factor=0)
    job(off)
    assert facts(off, NAME)["notes"] == [
        "trained with radius 8, Local Window Attention has 3",
        "trained with down_factor 4, Local Window Attention has 0",
    ]
    assert "trained with radius 8" in caplog.text
    with pytest.raises(ValueError, match="pool patches of 4 x 4 tokens.*down_factor 2. Set it to 4"):
        job(window(loaded, radius=8, down_factor=2))
    job(fine := window(loaded, radius=8, down_factor=4))
    assert facts(fine, NAME)["notes"] == []
    job(heavy := window(loaded, radius=8, down_factor=4, pooled_counts_as="all"))
    assert facts(heavy, NAME)["notes"] == ["trained with pooled_counts_as one, Local Window Attention has all"]


def wrong(change):
    held = tensors(4)
    change(held)
    return held


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: wrong(lambda t: t.pop("transformer_blocks.1.attn.to_out.0.bias")), "lacks 'transformer_blocks.1.attn.to_out.0.bias'"),
        (lambda: wrong(lambda t: t.pop("single_transformer_blocks.0.attn.processor.spatial_weight")), "lacks 'single_"),
        (lambda: wrong(lambda t: t.update(extra=torch.ones(1))), "also has 'extra'"),
        (lambda: {k: v for k, v in tensors().items() if ".1." not in k}, "lacks .* and 13 more"),
        (lambda: wrong(lambda t: t.update({"transformer_blocks.0.attn.to_q.weight": torch.ones(128, 64)})), r"to_q.weight is \[128, 64\], needed is \[128, 128\]"),
        (lambda: {"transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 128)}, "Load it with Load LoRA"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_sentence(tmp_path, content, words):
    model, _ = model_of("flux")
    with pytest.raises(ValueError, match=words):
        load(model, write(tmp_path, content()), None)


@pytest.mark.parametrize(
    ("name", "words"), [("wan_meta", "this MODEL is Wan"), ("flux2", "does not hold CLEAR weights")]
)
def test_other_models_are_refused(tmp_path, name, words):
    model, _ = model_of(name)
    with pytest.raises(ValueError, match=words):
        load(model, write(tmp_path, tensors()), None)


def test_a_flux_without_biases_is_refused(tmp_path):
    """FLUX.2's projections have none: a file of its sizes would fit by halves."""
    model, _ = model_of("flux2")
    content = {k: torch.zeros(shape) for k, shape in official(1, 2, 128).items()}
    with pytest.raises(ValueError, match=r"has no .*bias, which CLEAR's weights replace"):
        load(model, write(tmp_path, content), None)


def test_two_files_on_one_model_are_refused(tmp_path):
    model, _ = model_of("flux")
    path = write(tmp_path, tensors())
    with pytest.raises(ValueError, match="already"):
        load(load(model, path, None), path, None)


def test_the_node_finds_the_file_among_the_loras(tmp_path):
    write(tmp_path, tensors())
    folder_paths.add_model_folder_path("loras", str(tmp_path))
    try:
        model, spec = model_of("flux")
        loaded = window(run_node(LoadClearWeights, model=model, file="clear_local_8.safetensors")[0], radius=8)
        Job(spec, steps=1)(loaded)
        assert facts(loaded, NAME)["radius"] == 8
        with pytest.raises(FileNotFoundError):
            run_node(LoadClearWeights, model=model, file="clear_local_9.safetensors")
    finally:
        folder_paths.folder_names_and_paths["loras"][0].remove(str(tmp_path))
