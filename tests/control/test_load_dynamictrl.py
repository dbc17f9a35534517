"""DynamiCtrl's file as ComfyUI's own CogVideoX: every key, the rotations of diffusers, and files that are not whole."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox_image2video import get_resize_crop_region_for_grid
from dynamictrl_helper import FRAMES, KEPT, KINDS, SAMPLE, Official, spec, write
from nodes_helper import Job, error
from tiny_models import conds

from tessera.methods.control.dynamictrl import Sizes, core_key, crop, expected, read_sizes, rotation
from tessera.patching.dynamictrl import NORMS, load

BLOCK = "transformer_blocks."
TABLE = json.loads((Path(__file__).resolve().parents[1] / "golden/keys/dynamictrl.json").read_text())


def table(version):
    """Key -> shape of the release's class, from the literal table."""
    layers, made = TABLE["layers"], dict(TABLE["outside"]) | TABLE[version]
    made |= {key.format(i=i): shape for key, shape in TABLE["block"].items() for i in range(layers)}
    return {key: tuple(shape) for key, shape in made.items()}


@pytest.mark.parametrize("version", ["1.0", "1.5"])
def test_the_keys_are_those_of_the_release(version):
    keys = table(version)
    sizes = read_sizes(keys, "x")
    assert sizes == Sizes(3072, 512, 42, 4096, version == "1.5", 512 * (version == "1.5"), 17776 * (version == "1.0"))
    assert expected(sizes) == keys


@pytest.mark.parametrize(("version", "config"), [("1.0", {"use_learned_positional_embeddings": True}),
                                                 ("1.5", {"patch_size_t": 2, "ofs_embed_dim": 512})])  # fmt: skip
def test_the_table_is_what_diffusers_makes_with_the_added_norms(version, config):
    with torch.device("meta"):
        made = Official(
            layers=1, heads=48, time=512, text=4096, seed=None, kind="1.0", sample_height=60, sample_width=90, **config
        )
    have = {key: tuple(value.shape) for key, value in made.tensors().items()}
    later = tuple(f"transformer_blocks.{i}." for i in range(1, TABLE["layers"]))
    assert have == {key: shape for key, shape in table(version).items() if not key.startswith(later)}


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_diffusers_computes(kind, tmp_path):
    official = Official(kind)
    model = load(str(write(official, tmp_path / "transformer")))
    (x, timestep, text, ofs), out = called(model, kind)
    want = official(x, text, timestep, ofs=ofs)
    assert error(out, want) < 1e-5
    names = {key for key in official.tensors() if "control_norm1" not in key}
    assert {core_key(key) for key in names} == set(model.model.diffusion_model.state_dict())
    assert len(model.get_attachment(NORMS).norms) == 2 and len(model.get_additional_models_with_key(NORMS)) == 1


def called(model, kind, **job):
    """(what the diffusion model was given, what it gave) in one evaluation of a sampler."""
    from comfy.patcher_extension import WrappersMP

    seen, spy = [], model.clone()

    def wrapper(executor, x, timestep, context, ofs, options, **kwargs):
        out = executor(x, timestep, context, ofs, options, **kwargs)
        seen.append(((x.clone(), timestep.clone(), context.clone(), ofs), out.clone()))
        return out

    KEPT.extend((model, spy))
    spy.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "spy", wrapper)
    text = 226 if kind == "learned" else 10  # diffusers' learned table takes a text of that length alone
    positive, negative = conds(spec(kind, text))
    frame = torch.randn(1, 16, 1, *SAMPLE, generator=torch.Generator().manual_seed(2))
    for side in (positive, negative):
        side[0][1]["concat_latent_image"] = frame
    Job(spec(kind, text), steps=1, positive=positive, negative=negative, **job)(spy)
    return seen[0]


def test_the_first_frame_reaches_it_as_core_sends_it(tmp_path):
    model = load(str(write(Official(), tmp_path / "t")))
    (x, *_), _ = called(model, "1.0")
    frame = torch.randn(1, 16, 1, *SAMPLE, generator=torch.Generator().manual_seed(2))
    assert x.shape[1] == 32 and torch.allclose(x[0, 16:, 0], model.model.process_latent_in(frame)[0, :, 0])
    assert not x[:, 16:, 1:].any()


@pytest.mark.parametrize("grid", [(13, 30, 45), (10, 48, 85), (5, 24, 45), (1, 31, 17), (3, 60, 20)])
def test_rotations_are_those_of_diffusers_bit_for_bit(grid):
    t, h, w = grid
    want = get_3d_rotary_pos_embed(64, get_resize_crop_region_for_grid((h, w), 45, 30), (h, w), t)
    assert all(torch.equal(a, b) for a, b in zip(rotation(grid, (30, 45), False), want, strict=True))
    assert crop(h, w, (30, 45)) == get_resize_crop_region_for_grid((h, w), 45, 30)
    want = get_3d_rotary_pos_embed(64, None, (h, w), t, grid_type="slice", max_size=(60, 85))
    assert all(torch.equal(a, b) for a, b in zip(rotation(grid, (48, 85), True), want, strict=True))


def test_the_models_own_rotations_differ_and_come_back(tmp_path):
    model = load(str(write(Official(), tmp_path / "t")))
    network = model.model.diffusion_model
    stock = network._get_rotary_emb(4, 6, 3, torch.device("cpu"))
    Job(spec(), steps=1)(model)
    mine = network._get_rotary_emb(4, 6, 3, torch.device("cpu"))
    want = Official().rotary(3, *SAMPLE)
    assert all(torch.equal(a, b) for a, b in zip(mine, want, strict=True)) and not torch.equal(stock[0], mine[0])
    model.unpatch_model()
    assert torch.equal(network._get_rotary_emb(4, 6, 3, torch.device("cpu"))[0], stock[0])


def test_sample_size_of_the_config_and_without_one(tmp_path):
    """The crop of another size needs the trained one: the config's, else the release's."""
    official = Official()
    told = load(str(write(official, tmp_path / "a"))).object_patches["diffusion_model._get_rotary_emb"]
    bare = load(str(write(official, tmp_path / "b", config=False))).object_patches["diffusion_model._get_rotary_emb"]
    assert told.base == (4, 6) and bare.base == (30, 45)
    joined = load(str(write(Official("1.5"), tmp_path / "c", config=False)))
    assert joined.object_patches["diffusion_model._get_rotary_emb"].base == (48, 85)
    folder = write(official, tmp_path / "d")
    (folder / "config.json").write_text('{"sample_height": "x"}')
    with pytest.raises(ValueError, match="sample size of"):
        load(str(folder))


def test_learned_positions_are_for_one_size(tmp_path):
    model = load(str(write(Official("learned"), tmp_path / "t")))
    for size in ((3, 10, 12), (3, 6, 12), (4, *SAMPLE)):
        with pytest.raises(
            ValueError, match="learned positions for 4 x 6 tokens .* up to 3 latent frames, and .* 96 x 64 pixels"
        ):
            Job(spec("learned"), steps=1, latent=torch.zeros(1, 16, *size))(model)
    assert torch.isfinite(Job(spec("learned"), steps=1, latent=torch.zeros(1, 16, 2, *SAMPLE))(model)).all()


def test_a_folder_in_parts(tmp_path):
    import safetensors.torch

    official, folder = Official(), tmp_path / "transformer"
    whole = load(str(write(official, tmp_path / "whole")))
    tensors = official.tensors()
    write(official, folder, {})
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    places = {key: f"diffusion_pytorch_model-0000{1 + n % 2}-of-00002.safetensors" for n, key in enumerate(tensors)}
    for file in set(places.values()):
        safetensors.torch.save_file({k: v for k, v in tensors.items() if places[k] == file}, str(folder / file))
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    job = Job(spec(), steps=2)
    assert torch.equal(job(load(str(folder))), job(whole))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop(f"{BLOCK}1.control_norm1.linear.bias"), f"lacks '{BLOCK}1.control_norm1.linear.bias'"),
        (lambda t: t.pop(f"{BLOCK}0.attn1.to_out.0.weight"), f"lacks '{BLOCK}0.attn1.to_out.0.weight'"),
        (lambda t: t.pop("proj_out.weight"), "lacks proj_out.weight, which tells its size"),
        (lambda t: t.update({f"{BLOCK}0.attn2.q.weight": torch.ones(2)}), f"also has '{BLOCK}0.attn2.q.weight'"),
        (lambda t: t.update({f"{BLOCK}1.control_norm1.linear.weight": torch.ones(384, 31)}),
         r"control_norm1.linear.weight is \[384, 31\], needed is \[384, 32\]"),
        (lambda t: t.update({"patch_embed.proj.weight": torch.ones(128, 16, 2, 2)}), r"proj.weight is \[128, 16, 2, 2\]"),
        (lambda t: t[f"{BLOCK}1.control_norm1.norm.weight"].fill_(float("nan")), r"norm.weight \[128\] is not finite"),
        (lambda t: t["proj_out.weight"][-1, -1].fill_(float("inf")), r"proj_out.weight \[64, 128\] is not finite"),
        (lambda t: [t.pop(k) for k in list(t) if "control_norm1" in k], "no control_norm1 tensors, .* a plain CogVideoX"),
        (lambda t: t.update({"proj_out.weight": torch.ones(64, 100)}), "100 channels wide, and .* heads of 64"),
    ],
)  # fmt: skip
def test_files_that_are_not_whole_are_refused(change, sentence, tmp_path):
    official = Official()
    tensors = {key: value.clone() for key, value in official.tensors().items()}
    change(tensors)
    with pytest.raises(ValueError, match=sentence):
        load(str(write(official, tmp_path / "transformer", tensors)))


def test_other_files_are_refused(tmp_path):
    official = Official()
    with pytest.raises(ValueError, match="has no control_norm1 tensors, .* something else"):
        load(str(write(official, tmp_path / "a", {"x": torch.ones(2)})))
    folder = write(official, tmp_path / "b")
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        load(str(folder))
    (tmp_path / "c").mkdir()
    (tmp_path / "c/config.json").write_text("{}")
    (tmp_path / "c/x.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="pickle can run code"):
        load(str(tmp_path / "c"))


def test_the_node_finds_folders_and_files(tmp_path, monkeypatch):
    import folder_paths
    from nodes_helper import run_node

    from tessera.nodes.control import load_dynamictrl as module

    official = Official()
    write(official, tmp_path / "DynamiCtrl/transformer")
    write(official, tmp_path, config=False, name="dynamictrl.safetensors")
    paths = dict(folder_paths.folder_names_and_paths)
    paths["diffusion_models"] = ([str(tmp_path)], {".safetensors"})
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", paths)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    assert {"DynamiCtrl/transformer", "dynamictrl.safetensors"} <= set(module.found())
    made = [
        run_node(module.LoadDynamictrl, model=name)[0] for name in ("DynamiCtrl/transformer", "dynamictrl.safetensors")
    ]
    assert all(model.get_attachment(NORMS).sizes.layers == 2 for model in made)
    with pytest.raises(ValueError, match="nothing is not in models/diffusion_models any more"):
        run_node(module.LoadDynamictrl, model="nothing")
    again = made[0].cached_patcher_init
    assert again[0](*again[1], disable_dynamic=True).get_attachment(NORMS).sizes.dim == 128


def test_frames_cover_every_kind():
    assert set(FRAMES) == set(KINDS)
