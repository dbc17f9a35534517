"""DiT4SR's official files, synthetic ones in exactly their format: their own tensors are kept, anything else is refused."""

import math

import folder_paths
import pytest
import torch
from dit4sr_helper import BLOCKS, DUAL, GOLDEN, WIDTH, base, base_shapes, control, control_shapes, idle_shapes, made
from nodes_helper import run_node
from safetensors.torch import save_file

from tessera.methods.control import dit4sr as m
from tessera.nodes.control.load_dit4sr import LoadDit4sr

SIZES = m.Sizes(BLOCKS, frozenset(DUAL), WIDTH)
FILE = "diffusion_pytorch_model.safetensors"


def whole():
    return base() | control() | made(idle_shapes(), 2)


def write(folder, content, name="dit4sr_r1", metadata=None):
    (folder / name).mkdir(exist_ok=True)
    save_file(content, str(folder / name / FILE), metadata)
    return folder / name / FILE


def test_the_official_table_is_what_is_expected():
    sizes = m.Sizes(GOLDEN["model"]["blocks"], frozenset(GOLDEN["model"]["dual"]), GOLDEN["model"]["width"])
    got = m.control_keys(sizes)
    assert got == {k: tuple(v) for k, v in control_shapes(**GOLDEN["model"]).items()}
    assert len(got) == 24 * 10 + 13 * 8
    count = sum(math.prod(shape) for shape in got.values())
    assert 350e6 < count < 352e6, "the paper's repository adds about 351 M parameters"


def test_the_base_is_diffusers_own():
    keys, shapes = m.base_keys(SIZES), base_shapes()
    assert keys.keys() == shapes.keys()
    for key, shape in shapes.items():
        assert len(shape) == len(keys[key]) and all(b in (None, a) for a, b in zip(shape, keys[key], strict=True)), key
    assert {k: [64 if n is None else n for n in s] for k, s in m.idle_keys(SIZES).items()} == idle_shapes()


@pytest.mark.parametrize("content", [whole, lambda: base() | control(), control], ids=["released", "no idle", "alone"])
def test_exactly_the_control_tensors_are_kept(tmp_path, content):
    got, want = m.read(write(tmp_path, content())), control()
    assert got.tensors.keys() == want.keys() and all(torch.equal(got.tensors[k], want[k]) for k in want)
    assert got.sizes == SIZES and got.variant == "r1"


def test_the_layers_hold_the_files_tensors(tmp_path):
    built, want = m.build(m.read(write(tmp_path, whole()))), control()
    assert sum(p.numel() for p in built.parameters()) == sum(t.numel() for t in want.values())
    assert torch.equal(built[1].attn2.to_k_control.weight, want["transformer_blocks.1.attn2.to_k_control.weight"])
    assert torch.equal(built[2].control_conv.bias, want["transformer_blocks.2.ff.control_conv.bias"])
    assert built[2].attn2 is None and not any(p.requires_grad for p in built.parameters())


@pytest.mark.parametrize(("name", "variant"), GOLDEN["files"].items(), ids=str)
def test_the_folder_tells_the_variant(tmp_path, name, variant):
    path = write(tmp_path, control(), name.split("/")[0])
    assert m.read(path).variant == variant and str(path).endswith(name)
    assert m.read(path, "v1").variant == "v1" and m.read(path, "r1").variant == "r1"


def test_metadata_tell_the_variant_first_and_silence_is_refused(tmp_path):
    assert m.read(write(tmp_path, control(), "dit4sr_q", {"variant": "r1"})).variant == "r1"
    with pytest.raises(ValueError, match="neither its name nor its metadata tell.*Set variant"):
        m.read(write(tmp_path, control(), "mine"))
    with pytest.raises(ValueError, match="name the variant 'r2'"):
        m.read(write(tmp_path, control(), "mine", {"variant": "r2"}))
    assert m.read(write(tmp_path, control(), "mine"), "v1").variant == "v1"


def without(key):
    return lambda t: t.pop(key)


def shaped(key, *shape):
    return lambda t: t.update({key: torch.zeros(shape)})


def spoilt(key):
    return lambda t: t[key].view(-1)[3:4].fill_(float("nan"))


BLOCK = "transformer_blocks.1"
LAYER = f"{BLOCK}.attn2.to_v_control"


@pytest.mark.parametrize("content", [whole, control], ids=["released", "alone"])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without(f"{LAYER}.bias"), rf"lacks '{LAYER}.bias'"),
        (without(f"{BLOCK}.ff.control_conv.weight"), r"lacks '.*control_conv.weight'"),
        (shaped(f"{LAYER}.extra", 3), r"also has '.*to_v_control.extra'"),
        (shaped("transformer_blocks.1.attn.to_q_lora.down", 4, 4), r"also has '.*to_q_lora.down'"),
        (shaped(f"{LAYER}.weight", 192, 96), r"to_v_control.weight is \[192, 96\], .* has \[192, 192\]"),
        (shaped(f"{BLOCK}.ff.control_conv.weight", 768, 1, 5, 5), r"is \[768, 1, 5, 5\], .* has \[768, 1, 3, 3\]"),
        (
            shaped("transformer_blocks.3.attn.to_q_control.weight", 192, 192),
            r"of 3 blocks .* also has 'transformer_blocks.3.attn.to_q_control.weight'",
        ),
        (shaped("transformer_blocks.99999999.ff.control_conv.bias", 768), r"of 3 blocks .* also has '.*99999999"),
        (shaped("transformer_blocks.2.attn2.to_q_control.bias", 192), r"also has '.*2.attn2.to_q_control.bias'"),
        (spoilt(f"{LAYER}.weight"), rf"{LAYER}.weight \[192, 192\] is not finite"),
        (lambda t: t.update({f"{LAYER}.bias": torch.zeros(192, dtype=torch.int32)}), "int32 and not floating point"),
    ],
)
def test_one_wrong_tensor_is_refused_by_name(tmp_path, content, change, sentence):
    tensors = content()
    change(tensors)
    with pytest.raises(ValueError, match=sentence) as caught:
        m.read(write(tmp_path, tensors))
    assert FILE in str(caught.value) and "acceptee/DiT4SR" in str(caught.value)


def test_the_base_is_whole_or_not_there(tmp_path):
    tensors = whole()
    del tensors["transformer_blocks.2.attn.add_q_proj.weight"]
    with pytest.raises(ValueError, match="lacks 'transformer_blocks.2.attn.add_q_proj.weight'"):
        m.read(write(tmp_path, tensors))
    tensors = whole()
    tensors["transformer_blocks.2.norm1_context.linear.weight"] = torch.zeros(6 * WIDTH, WIDTH)
    with pytest.raises(ValueError, match=r"norm1_context.linear.weight is \[1152, 192\], .* has \[384, 192\]"):
        m.read(write(tmp_path, tensors))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no DiT4SR adapter"):
        m.read(write(tmp_path, base()))
    path = write(tmp_path, control())
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged.*download it again from acceptee/DiT4SR"):
        m.read(path)


def test_the_node(tmp_path, monkeypatch):
    path = write(tmp_path, {k: t.bfloat16() for k, t in whole().items()}, "dit4sr_q")
    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda kind, name: str(path.parent.parent / name))
    adapter = run_node(LoadDit4sr, file=f"dit4sr_q/{FILE}")[0]
    assert adapter.content.variant == "v1" and not adapter.content.tensors, "held once, in the layers"
    assert adapter.patcher.model is adapter.blocks and adapter.patcher.model_size() > 0
