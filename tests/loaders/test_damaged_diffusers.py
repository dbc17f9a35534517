"""Folders of diffusers that are damaged, foreign or dangerous: one sentence with the file's name each, and no code run."""

import builtins
import json
import pickle
import random
import shutil
from collections import Counter

import diffusers_helper as tiny
import pytest
import torch
from safetensors.torch import load_file, save_file

from tessera.patching.diffusers_files import choices
from tessera.patching.diffusers_load import load

NAME = "WanTransformer3DModel"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    return tiny.save(NAME, root), tiny.save(NAME, root / "sharded", max_shard_size="40KB")


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "transformer")


@pytest.fixture
def sharded(whole, tmp_path):
    return shutil.copytree(whole[1], tmp_path / "transformer")


def refused(path) -> str:
    with pytest.raises(ValueError) as caught:
        load(str(path))
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence and len(sentence) < 400
    return sentence


def config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def tensors(folder, **changes):
    held = {**load_file(folder / WEIGHTS), **changes}
    save_file({k: v for k, v in held.items() if v is not None}, folder / WEIGHTS)
    return folder


def test_unknown_class(folder):
    told = refused(config(folder, _class_name="QwenImageTransformer2DModel"))
    assert "transformer/config.json is for QwenImageTransformer2DModel, which is not bridged" in told
    assert "FluxTransformer2DModel" in told
    assert "is for None" in refused(config(folder, _class_name=None))
    assert "is for ['a']" in refused(config(folder, _class_name=["a"]))


def test_code_and_quantizers(folder):
    assert "auto_map" in refused(config(folder, auto_map={"AutoModel": "evil.Model"}))
    config(folder, auto_map=None)
    assert "auto_map" in refused(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "auto_map"}))
    assert "quantization_config" in refused(config(folder, quantization_config={"quant_method": "bitsandbytes"}))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "[" * 100_000, "\x00", '"config"', "nan"],
    ids=["empty", "open", "list", "deep", "nul", "str", "nan"],
)
def test_config_that_is_no_config(folder, text):
    (folder / "config.json").write_text(text)
    assert "transformer/config.json" in refused(folder)
    assert "transformer" in choices([str(folder.parent)])  # listed, so that choosing it tells why


def test_config_that_makes_no_model(folder):
    assert "cannot be made from this config" in refused(config(folder, num_layers="two"))
    config(folder, num_layers=2)
    assert "cannot be made from this config" in refused(config(folder, patch_size=None))
    for entry, value in (("num_layers", 10**9), ("freq_dim", 10**12), ("num_layers", -(10**9))):
        assert f"says {entry} {value}, beyond" in refused(
            config(folder, **{"num_layers": 2, "freq_dim": 32, entry: value})
        )


def test_entries_that_the_class_does_not_take(folder):
    """Training leaves its own numbers in released configs."""
    config(
        folder, optimization_step=900_000, decay=0.9999, num_vector_embeds=None, max_pos=[20, 2048], _name_or_path="x"
    )
    assert load(str(folder)).model.diffusion_model.bridged.__name__ == NAME


def test_models_that_want_an_image(folder):
    assert "wants an image or a mask" in refused(config(folder, in_channels=36))
    config(folder, in_channels=16)
    assert "image_dim 1280 is not bridged" in refused(config(folder, image_dim=1280))


def test_latents_that_nothing_tells(tmp_path):
    name = "PixArtTransformer2DModel"
    folder = tiny.save(name, tmp_path)
    config(folder, sample_size=64)
    assert "more than one possible autoencoder. Put its vae/config.json beside" in refused(folder)
    (folder.parent / "vae").mkdir()
    for scale, kind in ((0.18215, "SD15"), (0.13025, "SDXL")):
        (folder.parent / "vae" / "config.json").write_text(json.dumps({"scaling_factor": scale}))
        latents = load(str(folder)).model.latent_format
        assert type(latents).__name__ == kind and latents.scale_factor == scale


def test_schedulers(folder):
    (folder.parent / "scheduler").mkdir()
    path = folder.parent / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"prediction_type": "sample"}))
    assert "scheduler_config.json says prediction_type 'sample'" in refused(folder)
    path.write_text(json.dumps({"beta_schedule": "squaredcos_cap_v2"}))
    assert "beta_schedule 'squaredcos_cap_v2'" in refused(folder)
    path.write_text(json.dumps({"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction",
                                "use_flow_sigmas": True, "flow_shift": 5.0}))  # fmt: skip
    sampling = load(str(folder)).model.model_sampling
    assert sampling.shift == 5.0 and sampling.sigma_max == 1.0


def test_shard_that_is_missing(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refused(sharded)


def test_index_that_leaves_the_folder(sharded):
    (index,) = sharded.glob("*.index.json")
    held = json.loads(index.read_text())
    for name in ("../other.safetensors", "/etc/passwd", "weights.bin"):
        key = next(iter(held["weight_map"]))
        index.write_text(json.dumps({**held, "weight_map": {**held["weight_map"], key: name}}))
        assert name in refused(sharded)
    index.write_text(json.dumps({"weight_map": {"a": 3}}))
    assert "no weight_map" in refused(sharded)


def test_keys(folder):
    key = "blocks.1.attn1.to_q.weight"
    held = load_file(folder / WEIGHTS)[key]
    assert f"{WEIGHTS} lacks {key}." in refused(tensors(folder, **{key: None}))
    assert "other.weight" in refused(tensors(folder, **{key: held, "other.weight": torch.zeros(2)}))
    told = refused(tensors(folder, **{"other.weight": None, key: torch.zeros(4, 4)}))
    assert f"{key} is [4, 4], but its config makes it [32, 32]" in told
    assert "int32" in refused(tensors(folder, **{key: held.int()}))
    load(str(tensors(folder, **{key: held})))


def test_key_in_two_shards(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    held = load_file(first)
    save_file({**load_file(second), **held}, second)
    told = refused(sharded)
    assert second.name in told and "a second time" in told


@pytest.mark.parametrize("cut", [0, 4, 100, 3000])
def test_file_that_is_cut(folder, cut):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:cut])
    assert f"{WEIGHTS} cannot be read" in refused(folder)


def test_header_of_terabytes(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes((1 << 42).to_bytes(8, "little") + data[8:])
    assert f"{WEIGHTS} cannot be read" in refused(folder)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was run')",)


def test_pickled_weights(folder):
    (folder / WEIGHTS).unlink()
    assert "no weights" in refused(folder)
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    told = refused(folder)
    assert "diffusion_pytorch_model.bin is pickled" in told and "scripts.convert_checkpoint" in told


def test_several_files_and_no_index(folder):
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    assert "2 safetensors files and no index" in refused(folder)


def test_without_diffusers(folder, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "diffusers":
            raise ImportError("No module named 'diffusers'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "needs the Python packages diffusers and transformers" in refused(folder)


def test_fuzzed_configs(whole, tmp_path):
    """Any value in any place of any config: a model or one sentence."""
    chance, made = random.Random(5), Counter()
    folder = shutil.copytree(whole[0], tmp_path / "transformer")
    (tmp_path / "vae").mkdir()
    (tmp_path / "scheduler").mkdir()
    files = {
        folder / "config.json": json.loads((folder / "config.json").read_text()),
        tmp_path / "vae" / "config.json": {"scaling_factor": 0.5, "shift_factor": 0.1},
        tmp_path / "scheduler" / "scheduler_config.json": {
            "prediction_type": "epsilon", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02,
            "num_train_timesteps": 1000, "trained_betas": None, "snr_shift_scale": 1.0, "rescale_betas_zero_snr": False,
            "use_flow_sigmas": False, "flow_shift": 1.0,
        },
    }  # fmt: skip
    values = [None, 0, -1, 3, 1.5, "x", True, [], [1, 2, 2], {}, 1 << 16, 1 << 40, float("nan"), float("inf")]
    for _ in range(150):
        changed = chance.choice([*files])
        for path, entries in files.items():
            broken = {chance.choice([*entries]): chance.choice(values)} if path is changed else {}
            path.write_text(json.dumps({**entries, **broken}))
        try:
            load(str(folder))
            made["model"] += 1
        except ValueError as sentence:
            assert str(sentence).endswith(".") and "\n" not in str(sentence)
            made["sentence"] += 1
    assert min(made.values()) > 20 and len(made) == 2


def test_fuzzed_weights(folder):
    chance, data = random.Random(6), (folder / WEIGHTS).read_bytes()
    head = 8 + int.from_bytes(data[:8], "little")
    for _ in range(60):
        at = chance.randrange(head)
        (folder / WEIGHTS).write_bytes(data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :])
        try:
            load(str(folder))
        except ValueError as sentence:
            assert str(sentence).endswith(".") and "\n" not in str(sentence)
