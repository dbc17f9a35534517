"""Which layers are quantized."""

import pytest
import torch

from tessera.archs import all_archs
from tessera.methods.quant.keep_list import ALIASES, PRESETS, select


def weights(**shapes):
    return {f"{path}.weight".replace("__", "."): torch.empty(shape) for path, shape in shapes.items()}


FLUX = weights(
    img_in=(128, 64),
    time_in__in_layer=(128, 256),
    txt_in=(128, 96),
    double_blocks__0__img_mod__lin=(768, 128),
    double_blocks__0__img_attn__qkv=(384, 128),
    double_blocks__0__img_attn__norm__query_norm=(128,),
    double_blocks__0__img_mlp__0=(512, 128),
    single_blocks__0__linear1=(896, 128),
    single_blocks__0__modulation__lin=(384, 128),
    final_layer__linear=(64, 128),
    final_layer__adaLN_modulation__1=(256, 128),
)


def test_the_layers_of_flux():
    found = select(FLUX, "flux")
    assert found.chosen == (
        "double_blocks.0.img_attn.qkv",
        "double_blocks.0.img_mlp.0",
        "single_blocks.0.linear1",
    )
    assert len(found.kept) == len(FLUX) - 3
    assert found.kept["img_in"] == "its name matches 'img_in'"
    assert found.kept["double_blocks.0.img_mod.lin"] == "its name matches 'mod.lin'"
    assert found.kept["double_blocks.0.img_attn.norm.query_norm"] == "is no matrix but [128]"


def test_names_are_matched_whole_where_they_are_parts():
    found = select(weights(layers__0__img_instruct_attn__img_to_q=(96, 96), layers__0__heads__q=(96, 96)))
    assert len(found.chosen) == 2
    assert "head" in select(weights(blocks__0__head__out=(96, 96))).kept["blocks.0.head.out"]
    assert not select(weights(blocks__0__ADALN__1=(96, 96))).chosen


def test_what_lies_outside_the_blocks_is_kept():
    found = select(weights(tmlp__0=(128, 128), first=(128, 64), blocks__3__mlp__up=(256, 128)))
    assert found.chosen == ("blocks.3.mlp.up",) and found.kept["first"] == "lies outside the blocks"


def test_small_odd_and_quantized_weights_are_kept():
    state = weights(blocks__0__a=(63, 512), blocks__0__b=(512, 63), blocks__0__c=(64, 64), blocks__0__conv=(64, 64, 3))
    state |= {"blocks.0.d.weight": torch.empty(128, 128).to(torch.float8_e4m3fn)}
    state |= {"blocks.0.e.weight": torch.empty(128, 128), "blocks.0.e.weight_scale": torch.ones(())}
    state |= {"blocks.0.f.weight": torch.zeros(128, 64, dtype=torch.uint8), "blocks.0.f.bias": torch.zeros(128)}
    found = select(state)
    assert found.chosen == ("blocks.0.c",)
    assert {path[-1]: reason for path, reason in found.kept.items() if path[-1] in "adef"} == {
        "a": "is small, [63, 512]",
        "d": "is quantized already",
        "e": "is quantized already",
        "f": "is quantized already",
    }
    assert set(select(state, smallest=16).chosen) == {"blocks.0.a", "blocks.0.b", "blocks.0.c"}


def test_a_pattern_of_the_user_takes_the_place_of_ours():
    assert select(FLUX, "flux", r"attn|\.mod").chosen == tuple(
        key.removesuffix(".weight")
        for key, w in FLUX.items()
        if w.ndim == 2 and "attn" not in key and ".mod" not in key
    )
    assert len(select(FLUX, "flux", "").chosen) == 10
    with pytest.raises(ValueError, match="is no regular expression"):
        select(FLUX, "flux", "(")
    with pytest.raises(ValueError, match="has 2001 characters; use at most 2000"):
        select(FLUX, "flux", "x" * 2001)


def test_modules_are_asked_for_their_linear_layers():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.norm = torch.nn.Linear(64, 128), torch.nn.Linear(64, 128)
            self.token, self.conv = torch.nn.Embedding(100, 64), torch.nn.Conv1d(64, 64, 1)

    found = select(torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([Block(), Block()])}))
    assert found.chosen == ("blocks.0.q", "blocks.1.q")
    assert found.kept == {f"blocks.{i}.norm": "its name matches 'norm'" for i in (0, 1)}


def test_presets_are_of_packages_that_exist():
    homes = {home for home, _ in all_archs()}
    assert not set(PRESETS) - homes and not set(ALIASES.values()) - homes and not set(ALIASES) & set(PRESETS)


WORK = ("attn", "attention", "mlp", "ffn", "ff", "feed_forward", "linear1", "linear2", "qkv")
MODELS = {  # of bootstrap/tiny_specs: architecture, a layer that is quantized, some that stay
    "wan": ("wan", "blocks.1.ffn.0", ("time_projection.1", "text_embedding.0", "head.head")),
    "sd3": (
        "sd3",
        "joint_blocks.0.x_block.attn.qkv",
        ("context_embedder", "joint_blocks.0.x_block.adaLN_modulation.1"),
    ),
    "qwen_image": ("qwen_image", "transformer_blocks.0.attn.to_q", ("transformer_blocks.0.img_mod.1", "proj_out")),
    "ltxv": ("ltxv", "transformer_blocks.0.attn1.to_out.0", ("adaln_single.linear", "patchify_proj")),
    "hunyuan_video": ("hunyuan_video", "double_blocks.0.img_attn.qkv", ("txt_in.input_embedder", "vector_in.in_layer")),
    "lumina2": ("lumina2", "layers.0.attention.qkv", ("cap_embedder.1", "layers.0.adaLN_modulation.1")),
    "cogvideox": ("cogvideox", "blocks.0.ff_proj", ("patch_embed.text_proj", "blocks.0.norm1.linear", "proj_out")),
    "chroma": ("chroma", "single_blocks.0.linear1", ("distilled_guidance_layer.layers.0.in_layer",)),
    "mochi": ("mochi", "blocks.0.mlp_x.w1", ("blocks.0.mod_x", "t5_y_embedder.to_q")),
    "krea2": ("krea2", "blocks.0.mlp.down", ("txtfusion.refiner_blocks.0.mlp.up", "tproj.1", "last.linear")),
    "kandinsky5": ("kandinsky5", "visual_transformer_blocks.0.feed_forward.out_layer", ("out_layer.out_layer",)),
    "aura": ("aura", "double_layers.0.mlpX.c_proj", ("double_layers.0.modX.1", "final_linear")),
}


@pytest.mark.parametrize("name", MODELS)
def test_real_models(host, name):
    import tiny_models

    architecture, quantized, stay = MODELS[name]
    with torch.device("meta"):
        model = tiny_models.construct(tiny_models.SPECS[name])
    found, layers = select(model, architecture), dict(model.named_modules())
    assert quantized in found.chosen and not set(stay) - set(found.kept)
    assert all(any(word in path for word in (*WORK, "blocks", "layers")) for path in found.chosen)
    assert all(isinstance(layers[path], torch.nn.Linear) for path in found.chosen)
    assert select(model.state_dict(), architecture).chosen == found.chosen
