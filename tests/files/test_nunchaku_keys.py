"""Nunchaku's released keys: every one has its place in ComfyUI's FLUX and Qwen-Image, and every Linear there its parts."""

import json
from pathlib import Path

import nunchaku_helper as h
import pytest
import torch
from safetensors.torch import save_file

from tessera.methods.files import nunchaku_keys as m
from tessera.methods.files.nunchaku_layout import SHIFT, AwqLinear, join
from tessera.methods.files.safetensors_file import SafetensorsFile

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "keys"


def flux(v2=False, double=None, single=None) -> dict[str, list]:
    """The release's keys: (dtype, shape) each, under either naming."""
    table = json.loads((GOLDEN / "nunchaku_flux.json").read_text())
    made = dict(table["rest"])
    for kind, stem, count in (
        ("double", "transformer_blocks", double),
        ("single", "single_transformer_blocks", single),
    ):
        for i in range(count or table["model"][kind]):
            for key, told in table[kind].items():
                module, suffix = key.rsplit(".", 1)
                if v2:
                    module = table["v2"][kind].get(module, module)
                    suffix = table["v2"]["tensors"].get(suffix, suffix)
                made[f"{stem}.{i}.{module}.{suffix}"] = told
    return made


def qwen() -> dict[str, list]:
    table = json.loads((GOLDEN / "nunchaku_qwen_image.json").read_text())
    blocks = range(table["model"]["blocks"])
    return table["rest"] | {
        f"transformer_blocks.{i}.{key}": told for i in blocks for key, told in table["block"].items()
    }


def sizes(plan: m.Plan, shapes: dict[str, list]) -> dict[str, list[int]]:
    """ComfyUI's keys with the shapes that the plan would give them."""
    made = {key: shapes[source][1] for key, source in plan.plain.items()}
    for name, target in plan.linears.items():
        found = []
        for part in target.parts:
            n, half = shapes[plan.keys[part.module]["qweight"]][1]
            found.append((n * (4 if part.splits else 1) // part.share[1], 2 * half))
        rows, columns = zip(*found, strict=True)
        assert len(set(columns if target.axis == "rows" else rows)) == 1, name
        made[name + ".weight"] = [sum(rows), columns[0]] if target.axis == "rows" else [rows[0], sum(columns)]
        made[name + ".bias"] = made[name + ".weight"][:1]
    return made


@pytest.fixture(scope="module")
def models(host):
    """ComfyUI's FLUX.1-dev and Qwen-Image, on no device: their keys and shapes."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    more = {"dtype": torch.bfloat16, "device": "meta", "operations": comfy.ops.disable_weight_init}
    made = {
        "flux": Flux(
            image_model="flux", in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=3072,
            mlp_ratio=4.0, num_heads=24, depth=19, depth_single_blocks=38, axes_dim=[16, 56, 56], theta=10000,
            patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[], **more,
        ),
        "qwen": QwenImageTransformer2DModel(in_channels=64, out_channels=16, num_layers=60, **more),
    }  # fmt: skip
    return {name: {key: [*t.shape] for key, t in model.state_dict().items()} for name, model in made.items()}


@pytest.mark.parametrize("v2", [False, True])
def test_flux(models, v2):
    keys = flux(v2)
    plan = m.plan(keys)
    assert plan.family == "FLUX.1" and sizes(plan, keys) == models["flux"]
    assert len(plan.linears) == 19 * 10 + 38 * 3
    second = plan.linears["single_blocks.37.linear2"]
    assert second.axis == "columns" and [part.unsigned for part in second.parts] == [False, True]
    unsigned = {n.rpartition("blocks.")[2][2:] for n, t in plan.linears.items() if t.parts[-1].unsigned}
    assert {name.lstrip("0123456789.") for name in unsigned} == {"img_mlp.2", "txt_mlp.2", "linear2"}


def test_qwen_image(models):
    keys = qwen()
    plan = m.plan(keys)
    got = sizes(plan, keys)
    assert plan.family == "Qwen-Image" and got == models["qwen"]
    to_k = plan.linears["transformer_blocks.3.attn.to_k"]
    assert to_k.parts == (m.Source("transformer_blocks.3.attn.to_qkv", share=(1, 3)),)


def test_schnell_has_no_guidance():
    keys = {key: told for key, told in flux(double=1, single=1).items() if "guidance" not in key}
    assert not any("guidance" in key for key in m.plan(keys).plain)


WIDTH = 128


def made_flux() -> tuple[dict, dict]:
    """(a file of a FLUX of one block of each kind, width 128; what its layers are under diffusers' names, dense fp64)."""
    file, dense = {}, {}

    def svd(module, n, k, names, unsigned=False, smooth=None):
        parts = h.svd_parts(n, k) | ({} if smooth is None else {"smooth": smooth})
        old = {new: old for old, new in m.RENAMED.items()}
        file.update({f"{module}.{old.get(key, key)}": tensor for key, tensor in h.svd_packed(parts).items()})
        weight, bias = h.svd_dense(parts), parts["bias"].double()
        if unsigned:
            residual = h.svd_dense(parts | {"up": parts["up"] * 0})
            bias = bias + residual.sum(1) * SHIFT
        for name, w, b in zip(names, weight.chunk(len(names)), bias.chunk(len(names)), strict=True):
            dense[name + ".weight"], dense[name + ".bias"] = w, b
        return parts["smooth"]

    def awq(module, splits):
        parts = h.awq_parts(splits * WIDTH, WIDTH)
        file.update({f"{module}.{key}": tensor for key, tensor in h.awq_packed(parts, splits).items()})
        dense[module + ".weight"], dense[module + ".bias"] = h.awq_dense(parts), parts["bias"].double()

    def plain(key, source, *shape):
        file[key] = dense[source] = torch.randn(shape)

    block, attn = "transformer_blocks.0.", "transformer_blocks.0.attn."
    for side, context, qkv, out in (
        ("", "", "to_{}", "to_out.0"),
        ("_context", "context_", "add_{}_proj", "to_add_out"),
    ):
        awq(f"{block}norm1{side}.linear", 6)
        svd(f"{block}qkv_proj{side}", 3 * WIDTH, WIDTH, [attn + qkv.format(n) for n in "qkv"])
        svd(f"{block}out_proj{side}", WIDTH, WIDTH, [attn + out])
        svd(f"{block}mlp_{context}fc1", 4 * WIDTH, WIDTH, [f"{block}ff{side}.net.0.proj"])
        svd(f"{block}mlp_{context}fc2", WIDTH, 4 * WIDTH, [f"{block}ff{side}.net.2"], unsigned=True)
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        plain(f"{block}{name}.weight", f"{attn}{name}.weight", 64)
    block, attn = "single_transformer_blocks.0.", "single_transformer_blocks.0.attn."
    awq(f"{block}norm.linear", 3)
    smooth = svd(f"{block}qkv_proj", 3 * WIDTH, WIDTH, [f"{attn}to_{n}" for n in "qkv"])
    svd(f"{block}mlp_fc1", 4 * WIDTH, WIDTH, [f"{block}proj_mlp"], smooth=smooth)
    svd(f"{block}out_proj", WIDTH, WIDTH, ["a"])
    svd(f"{block}mlp_fc2", WIDTH, 4 * WIDTH, ["b"], unsigned=True)
    dense[f"{block}proj_out.weight"] = torch.cat((dense.pop("a.weight"), dense.pop("b.weight")), dim=1)
    dense[f"{block}proj_out.bias"] = dense.pop("a.bias") + dense.pop("b.bias")
    for name in ("norm_q", "norm_k"):
        plain(f"{block}{name}.weight", f"{attn}{name}.weight", 64)
    for key, (_, shape) in flux(double=1, single=1).items():
        if "blocks" not in key:
            plain(key, key, *(2 * WIDTH if size == 6144 else WIDTH for size in shape))
    return file, dense


def test_a_whole_flux(host, tmp_path):
    """What a packed file becomes equals what ComfyUI makes of the same layers under diffusers' names."""
    import comfy.utils

    held, dense = made_flux()
    save_file({key: tensor.contiguous() for key, tensor in held.items()}, tmp_path / "w.safetensors")
    file = SafetensorsFile(tmp_path / "w.safetensors")
    assert m.is_nunchaku(file)
    plan = m.plan(file)
    got = {key: plan.tensor(key, file) for key in plan.plain}
    for name, target in plan.linears.items():
        parts = plan.read(target, file)
        if isinstance(parts[0], AwqLinear):
            got[name + ".weight"], got[name + ".bias"] = parts[0].dense()
            continue
        weights, biases = zip(*(part.dense() for part in parts), strict=True)
        rows = target.axis == "rows"
        got[name + ".weight"] = torch.cat(weights, dim=0 if rows else 1)
        got[name + ".bias"] = torch.cat(biases) if rows else torch.stack(biases).sum(0)
        joined = join([part if len(parts) == 1 else part.unshifted() for part in parts], target.axis)
        assert torch.allclose(joined.dense()[0], got[name + ".weight"])
    config = {"depth": 1, "depth_single_blocks": 1, "hidden_size": WIDTH}
    want: dict[str, torch.Tensor] = {}
    for source, target in comfy.utils.flux_to_diffusers(config).items():
        if source not in dense:
            continue
        if isinstance(target, str):
            want[target] = dense[source]
        elif target[1] is None:
            want[target[0]] = target[2](dense[source])
        else:
            name, (dim, start, length) = target
            whole = want.setdefault(
                name, torch.zeros(7 * WIDTH if "linear1" in name else 3 * WIDTH, *dense[source].shape[1:]).double()
            )
            whole.narrow(dim, start, length).copy_(dense[source])
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert got[key].shape == tensor.shape and torch.allclose(got[key].double(), tensor.double(), atol=2e-5), key


def test_qkv_of_qwen_image_is_cut():
    parts = h.svd_parts(384, 128)
    keys = qwen()
    module = "transformer_blocks.0.attn.to_qkv."
    file = {module + key: tensor for key, tensor in h.svd_packed(parts).items()}
    plan = m.plan(keys)
    got = [plan.read(plan.linears[f"transformer_blocks.0.attn.to_{n}"], file)[0] for n in "qkv"]
    assert torch.equal(torch.cat([layer.dense()[0] for layer in got]).double(), h.svd_dense(parts))
    assert torch.equal(torch.cat([layer.bias for layer in got]), parts["bias"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x_embedder.weight": None}, "lacks x_embedder.weight; download it again, and merge a release in two files"),
        ({"transformer_blocks.0.mlp_fc1.wscales": None}, "lacks transformer_blocks.0.mlp_fc1.wscales"),
        ({"transformer_blocks.0.norm1.linear.wzeros": None}, "lacks transformer_blocks.0.norm1.linear.wzeros"),
        ({"transformer_blocks.0.norm_k.weight": None}, "lacks transformer_blocks.0.norm_k.weight"),
        ({"transformer_blocks.2.mlp_fc1.qweight": 1}, "lacks transformer_blocks.1.norm_added_k.weight, .* and 63 more"),
        ({"extra.weight": 1}, "holds unknown tensors: extra.weight"),
        ({"transformer_blocks.0.mlp_fc1.wzeros": 1}, "holds unknown tensors: transformer_blocks.0.mlp_fc1.wzeros"),
        ({"transformer_blocks.0.mlp_fc1.wcscales": 1}, "holds NVFP4 weights"),
        ({"transformer_blocks.0.mlp_fc1.smooth_factor": 1}, "mlp_fc1.smooth_factor under two names"),
    ],
)
def test_keys_that_do_not_fit(change, sentence):
    keys = {key: told for key, told in (flux(double=1, single=1) | change).items() if told is not None}
    with pytest.raises(ValueError, match=f"^w.safetensors .*{sentence}"):
        m.plan(keys, "w.safetensors")


def test_other_models():
    sana = ["transformer_blocks.0.attn1.qkv_proj.qweight", "transformer_blocks.0.attn1.qkv_proj.wscales"]
    with pytest.raises(ValueError, match="no model that is read .*FLUX.1 and Qwen-Image are, in int4"):
        m.plan(sana)
    assert m.is_nunchaku(sana) and m.is_nunchaku(flux(double=1)) and m.is_nunchaku(qwen())
    for keys in ([], ["a.weight", "a.weight_scale"], ["a.qweight", "a.qzeros", "a.scales"], ["a.qweight"]):
        assert not m.is_nunchaku(keys)
