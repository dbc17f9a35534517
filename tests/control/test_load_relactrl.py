"""RelaCtrl's released layout, in synthetic files: read whole, with and without the base, or refused with every name."""

import subprocess
import sys
from pathlib import Path

import folder_paths
import pytest
import torch
from nodes_helper import run_node
from relactrl_helper import DEPTH, GOLDEN, WIDTH, pixart, tensors
from safetensors.torch import save_file

from tessera.nodes.control.load_relactrl import LoadRelactrl
from tessera.patching.relactrl import load

ROOT = Path(__file__).resolve().parents[2]
QKV = "controlnet.0.process.experts_attn.5.attn.qkv.weight"


def write(folder, content, name="relactrl_pixart_canny_1024.safetensors"):
    save_file({key: tensor.contiguous() for key, tensor in content.items()}, str(folder / name))
    return folder / name


def base():
    """PixArt's own weights under the names that the release's class gives them, and what only its files have."""
    state = {k.removeprefix("diffusion_model."): v for k, v in pixart().model.state_dict().items()}
    found = {f"base_model.{key}": value for key, value in state.items() if not key.startswith("model_sampling")}
    return {key: value for key, value in found.items() if value.ndim} | {
        "base_model.pos_embed": torch.zeros(1, 9, WIDTH)
    }


@pytest.mark.parametrize("inside", [False, True])
def test_every_control_tensor_is_where_it_belongs(tmp_path, inside):
    content = tensors()
    control = load(write(tmp_path, content | (base() if inside else {})))
    assert len(control.blocks) == 11 and control.width == WIDTH
    assert control.parameters == sum(tensor.numel() for tensor in content.values())
    for n, block in enumerate(control.blocks):
        path = f"controlnet.{n}."
        assert torch.equal(block.table, content[f"{path}process.scale_shift_table"])
        pairs = [("before_proj", block.before), ("after_proj", block.after)]
        for g, (qkv, proj) in enumerate(block.groups):
            attn = f"process.experts_attn.{g}.attn."
            pairs += [(f"{attn}qkv", qkv), (f"{attn}proj", proj)]
        for name, (weight, bias) in pairs:
            assert torch.equal(weight, content[f"{path}{name}.weight"]) and torch.equal(
                bias, content[f"{path}{name}.bias"]
            )
        assert len(block.groups) == GOLDEN["groups"][n]


def test_the_base_of_the_whole_release_is_known():
    """All names of the stock class, each with its shape."""
    from tessera.methods.control.relactrl_keys import base_shapes

    known = base_shapes(WIDTH, DEPTH)
    assert {key.removeprefix("base_model.") for key in base()} == set(known)


KEYS = [
    "controlnet.0.before_proj.bias", "controlnet.10.after_proj.weight", "controlnet.4.process.scale_shift_table",
    "controlnet.0.process.experts_attn.0.attn.proj.bias", QKV, "controlnet.1.process.experts_attn.1.attn.qkv.bias",
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("fault", ["missing", "wrong shape", "one dimension more", "not finite", "whole numbers"])
def test_one_faulty_tensor_is_named(tmp_path, key, fault):
    content = tensors()
    if fault == "missing":
        del content[key]
    elif fault == "wrong shape":
        content[key] = torch.zeros(*content[key].shape[:-1], content[key].shape[-1] + 4)
    elif fault == "one dimension more":
        content[key] = content[key][None]
    elif fault == "not finite":
        content[key].view(-1)[3] = float("nan")
    else:
        content[key] = content[key].to(torch.int8)
    with pytest.raises(ValueError) as refused:
        load(write(tmp_path, content))
    told = str(refused.value)
    assert key in told and "relactrl_pixart_canny_1024.safetensors" in told and "\n" not in told
    assert told.count("controlnet.") == 1, "only what is wrong is named"
    words = {"missing": "lacks", "not finite": "not finite", "whole numbers": "int8"}
    assert (words.get(fault) or f"{[*content[key].shape]} in place of") in told


@pytest.mark.parametrize(
    "extra",
    ["controlnet.11.before_proj.weight", "controlnet.0.process.experts_attn.6.attn.qkv.weight", "copied_block.0.weight",
     "controlnet.3.process.experts_mlp.0.fc1.weight", "controlnet.2.before_proj.lora_up.weight"],
)  # fmt: skip
def test_a_tensor_that_nobody_knows_is_named(tmp_path, extra):
    with pytest.raises(ValueError, match=f"also has {extra.replace('.', '[.]')}. Take a file of qihoo360/RelaCtrl"):
        load(write(tmp_path, tensors() | {extra: torch.zeros(4, 4)}))


def test_all_faults_are_told_at_once(tmp_path):
    content = tensors() | {"controlnet.12.x": torch.zeros(2), "controlnet.13.y": torch.zeros(2)}
    del content[KEYS[0]], content[KEYS[1]]
    content[KEYS[2]] = torch.zeros(6, 4)
    with pytest.raises(ValueError) as refused:
        load(write(tmp_path, content))
    told = str(refused.value)
    assert all(name in told for name in (*KEYS[:3], "controlnet.12.x", "controlnet.13.y"))


@pytest.mark.parametrize(
    "faulty",
    [{"base_model.double_blocks.0.img_attn.qkv.weight": (8, 8)}, {"base_model.blocks.0.attn.qkv.weight": (3 * WIDTH, 64)},
     {"base_model.blocks.2.mlp.fc3.weight": (8, 8)}, {"base_model.x_embedder.proj.bias": (WIDTH + 1,)}],
)  # fmt: skip
def test_a_base_that_is_not_pixart_is_refused(tmp_path, faulty):
    content = tensors() | base() | {key: torch.zeros(shape) for key, shape in faulty.items()}
    with pytest.raises(ValueError, match=f"base model that is not PixArt of width {WIDTH}: {min(faulty)}"):
        load(write(tmp_path, content))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no RelaCtrl.*begins with 'input_hint_block.0.weight'"):
        load(write(tmp_path, {"input_hint_block.0.weight": torch.zeros(16, 3, 3, 3)}))
    with pytest.raises(ValueError, match="block 0 has no controlnet.0.process.experts_attn"):
        load(write(tmp_path, {"controlnet.0.before_proj.bias": torch.zeros(WIDTH)}))
    (tmp_path / "cut.safetensors").write_bytes((write(tmp_path, tensors())).read_bytes()[:4000])
    with pytest.raises(ValueError, match="cut.safetensors is damaged.*download it again from qihoo360/RelaCtrl"):
        load(tmp_path / "cut.safetensors")


def test_a_pickle_is_refused_with_the_converter_which_makes_it_readable(tmp_path):
    """The release is {'state_dict': ...} of torch.save."""
    content = tensors()
    torch.save({"state_dict": content, "epoch": 1}, tmp_path / "release.pth")
    with pytest.raises(
        ValueError, match="release.pth is no safetensors file: convert it with `python -m scripts.convert_checkpoint`"
    ):
        load(tmp_path / "release.pth")
    made = tmp_path / "release.safetensors"
    command = [sys.executable, "-m", "scripts.convert_checkpoint", str(tmp_path / "release.pth"), str(made)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert load(made).parameters == sum(tensor.numel() for tensor in content.values())


def test_the_node_reads_from_models_controlnet(tmp_path, monkeypatch):
    path = write(tmp_path, tensors())
    monkeypatch.setattr(
        folder_paths,
        "get_full_path_or_raise",
        lambda folder, name: str(tmp_path / name) if folder == "controlnet" else None,
    )
    control = run_node(LoadRelactrl, file=path.name)[0]
    assert control.name == path.name and control.width == WIDTH
