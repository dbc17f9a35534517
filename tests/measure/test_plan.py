"""Plan: what is on a MODEL, whoever put it there, is told before a run, in the order in which it then acts."""

import json
import re
from dataclasses import replace
from types import MethodType

import comfy.context_windows as context_windows
import comfy_extras.nodes_context_windows as windows
import comfy_extras.nodes_easycache as easycache
import pytest
import torch
from attention_helper import Exact, Foreign
from attention_helper import plan as attention_plan
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from nodes_helper import Job, facts, model_of, run_node, taylor
from quantized_helper import LAYER, folder, lora, quantized, with_lora  # noqa: F401 - a fixture
from tiny_models import empty_latent

import folder_paths  # isort: skip

from tessera import archs
from tessera.methods.measure import stack_files
from tessera.methods.measure.stack_files import StackProfile
from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.nodes.attention.window_attention_3d import WindowAttention3d
from tessera.nodes.cache.dynamic_tokens import DynamicTokens
from tessera.nodes.measure.accelerate import Accelerate
from tessera.nodes.measure.plan import Plan
from tessera.patching import plan_words as words
from tessera.patching import stacks
from tessera.patching.sizes import fingerprint


def planned(model, **inputs):
    made, text, report = run_node(Plan, model=model, **inputs)
    assert made is model and json.loads(json.dumps(report, allow_nan=False)) == report
    assert text.splitlines() == report["lines"]
    return report


def names(report, **where):
    return [r["name"] for r in report["rows"] if all(r[k] == v for k, v in where.items())]


def window(model, **inputs):
    return run_node(LocalWindowAttention, model=model, **{"radius": 2, "min_tokens": 0, **inputs})[0]


def test_a_plain_model():
    model, _ = model_of("flux")
    report = planned(model)
    assert report["rows"] == report["declined"] == report["conflicts"] == report["refused"] == []
    assert report["architecture"] == "Flux" and report["known"] and report["blocks"] == 4
    assert "runs as it was loaded" in report["lines"][-1]


def test_two_attentions_and_a_cache_in_their_order_with_blocks_and_noise():
    model, spec = model_of("flux")
    first = window(model, blocks="0-2", end_percent=0.5)
    both = taylor(attention_plan(first, Exact(), name="Newer", blocks=frozenset({1, 3})))
    report = planned(both)
    assert names(report) == ["Taylor Cache", "Newer", "Local Window Attention"]
    cache, newer, older = report["rows"]
    assert (cache["stage"], cache["blocks"], cache["node"]) == ("blocks", "0-3", "7")
    assert "one of 3 is computed" in cache["does"] and "first 2 and the last 1 evaluations" in cache["does"]
    assert (newer["blocks"], older["blocks"], older["of"]) == ("1,3", "0-2", 4)
    sampling = both.get_model_object("model_sampling")
    assert older["percent"] == [0.0, 0.5] and older["sigma"][1] == pytest.approx(float(sampling.percent_to_sigma(0.5)))
    assert "radius 2" in older["does"]
    assert report["declined"] == [
        "Newer is asked before Local Window Attention in blocks 1 from 0% to 50% of the schedule: Local Window "
        "Attention gets there what Newer declines"
    ]
    Job(spec)(both)  # and so it is: of block 1 the older one gets nothing
    served = facts(both, "Local Window Attention")
    assert served["served"] > 0 and facts(both, "Newer")["served"] > 0
    assert served["calls"] < facts(both, "Newer")["calls"]


def test_what_is_known_to_be_declined():
    model, spec = model_of("wan_meta")
    small = window(model, min_tokens=4096)
    joint = attention_plan(small, Exact(), name="Joint", scope="joint")
    report = planned(joint, latent={"samples": empty_latent(spec)})
    tokens = report["grid"][0] * report["grid"][1] * report["grid"][2]
    assert report["declined"][0] == "Joint has scope joint, and attention of Wan is self: all is declined"
    assert f"{tokens:,} image tokens are fewer than its min_tokens 4,096" in report["declined"][1]
    Job(spec, steps=2)(small)
    assert facts(small, "Local Window Attention")["served"] == 0


def test_an_inactive_node_and_one_whose_settings_are_off():
    model, _ = model_of("flux")
    made = run_node(DynamicTokens, model=model_of("hidream")[0], unsupported="warn")[0]
    report = planned(made)
    (row,) = [r for r in report["rows"] if r["name"] == "Dynamic Tokens"]
    assert row["state"] == "inactive" and row["why"] and report["declined"][0].endswith(row["why"])
    assert "[inactive: " in "\n".join(report["lines"])
    assert not report["limits"]
    off = planned(taylor(model, interval=1))
    assert [r["state"] for r in off["rows"] if r["name"] == "Taylor Cache"] == ["off"]
    assert "without effect" in off["headline"]


def test_limits_of_an_architecture_are_told(monkeypatch):
    model, _ = model_of("flux")
    limited = replace(archs.find(model.model.diffusion_model), limits={"attention": "its attention is linear."})
    monkeypatch.setattr(archs, "find", lambda network: limited)
    assert planned(model)["lines"][2] == "Here nodes on attention cannot act: its attention is linear."


def test_lora_and_an_object_patch():
    model, _ = model_of("flux")
    two = with_lora(model, lora(model, LAYER["flux"]), lora(model, "double_blocks.1.img_mlp.0"))
    two.add_patches(lora(model, LAYER["flux"]), 0.5)
    two.add_object_patch("model_sampling", two.get_model_object("model_sampling"))
    report = planned(two)
    (adapter,) = [r for r in report["rows"] if r["name"] == "LoRA"]
    assert adapter["stage"] == "weights" and adapter["owner"] == "ComfyUI"
    assert adapter["does"] == "2 weights at strength 0.5 and 1, up to 2 on one layer; added to the weights"
    (patch,) = [r for r in report["rows"] if "model_sampling" in r["does"]]
    assert patch["owner"] == "ComfyUI" and patch["does"] == "in place of model_sampling"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("format", "owner"), [("tlq4", "Tessera"), ("fp8_e4m3", "ComfyUI")])
def test_quantized_weights_with_a_lora_beside_them(format, owner):
    _, packed, _, _ = quantized("flux", format)
    report = planned(with_lora(packed, lora(packed, LAYER["flux"])))
    held, adapter = report["rows"][:2]
    assert (held["name"], held["owner"]) == ("Quantized weights", owner)
    count = sum(hasattr(getattr(m, "weight", None), "_layout_cls") for m in packed.model.diffusion_model.modules())
    assert held["does"].startswith(f"{count} layers hold packed weights") and count > 4
    assert held["does"].endswith(f"as {'float8_e4m3fn' if format == 'fp8_e4m3' else '4-bit codes of a table'}")
    assert adapter["does"] == "1 weight at strength 1; kept beside the packed weights, exactly"


def test_compile_context_windows_and_core_cache_beside_ours():
    model, _ = model_of("wan_meta")
    one = windows.ContextWindowsManualNode.execute(
        model, 4, 1, context_windows.ContextSchedules.STATIC_STANDARD, 1, False, context_windows.ContextFuseMethods.PYRAMID, 2, False
    )[0]  # fmt: skip
    one = one.clone()
    set_torch_compile_wrapper(one, backend="eager")
    cached = easycache.EasyCacheNode.execute(taylor(one), 0.2, 0.15, 0.95, False)[0]
    report = planned(cached)
    assert {"Context windows", "torch.compile", "EasyCache", "Taylor Cache"} <= set(names(report))
    (compiled,) = [r for r in report["rows"] if r["name"] == "torch.compile"]
    assert compiled["stage"] == "call" and "backend eager" in compiled["does"] and compiled["owner"] == "ComfyUI"
    (cut,) = [r for r in report["rows"] if r["name"] == "Context windows"]
    assert "length 4, overlap 1" in cut["does"]
    (easy,) = [r for r in report["rows"] if r["name"] == "EasyCache"]
    assert easy["does"].endswith("reuse threshold 0.2, start percent 0.15, end percent 0.95")
    assert len(report["refused"]) == 1 and "EasyCache or LazyCache are on the same MODEL" in report["refused"][0]
    assert any("torch.compile beside core's EasyCache" in s for s in report["conflicts"])
    assert report["lines"].index("Refused: a run on this MODEL stops at its start:") > 0


def foreign_pack(name):
    """A function as a module of another pack would define it."""

    def guided(args):
        return args["cond"]

    guided.__module__ = f"/home/someone/ComfyUI/custom_nodes/{name}.nodes.patch"
    return guided


def test_everything_that_others_put_by_hand():
    model, _ = model_of("flux")
    held = Foreign(model).onto(model)
    hand = foreign_pack("ComfyUI-Other_x_1")
    kinds = [k for name, k in vars(WrappersMP).items() if name.isupper()]
    for kind in kinds:
        held.add_wrapper_with_key(kind, "other", hand)
    held.set_model_attn1_patch(hand)
    held.set_model_double_block_patch(hand)
    held.set_model_patch_replace(hand, "dit", "double_block", 0)
    held.set_model_patch_replace(hand, "dit", "double_block", 1)
    held.set_model_unet_function_wrapper(hand)
    held.set_model_sampler_cfg_function(hand)
    held.set_model_sampler_post_cfg_function(hand)
    held.add_object_patch("diffusion_model.forward", hand)
    held.model_options["transformer_options"]["their_state"] = {"a": 1}
    report = planned(window(held))
    theirs = [r for r in report["rows"] if r["owner"] == "ComfyUI-Other.1"]
    does = " | ".join(r["does"] for r in theirs)
    assert len(kinds) == 7
    for said in (
        *(f'wraps {kind} ("other")' for kind in kinds), "patch attn1_patch", "patch double_block",
        "in place of double_block 0-1 (dit)", "model_function_wrapper", "sampler_cfg_function", "in place of diffusion_model.forward",
    ):  # fmt: skip
        assert said in does, said
    assert "their_state" in names(report)
    attention = names(report, stage="attention")
    assert attention.index("Local Window Attention") < attention.index(
        "Foreign"
    )  # ours is asked, theirs serves the rest
    assert [r["order"] for r in report["rows"]] == [*range(1, len(report["rows"]) + 1)]
    assert [*dict.fromkeys(r["stage"] for r in report["rows"])] == [s for s in words.STAGES if names(report, stage=s)]
    assert any("put its own forward" in s for s in report["conflicts"])


def test_callbacks_options_and_compiled_parts_of_others():
    model, _ = model_of("flux")
    hand = foreign_pack("Other")
    model.add_callback_with_key(CallbacksMP.ON_PRE_RUN, "theirs", hand)
    model.add_callback(CallbacksMP.ON_LOAD, hand)
    model.set_attachments("their data", hand)
    model.set_model_compute_dtype(torch.bfloat16)
    model.set_model_sampler_post_cfg_function(hand, disable_cfg1_optimization=True)
    model.set_model_input_block_patch(hand)
    model.model_options["their_option"] = hand
    part = torch.compile(model.get_model_object("diffusion_model.img_in"), backend="eager")
    model.add_object_patch("diffusion_model.img_in", part)
    report = planned(easycache.EasyCacheNode.execute(model, 0.2, 0.15, 0.95, False)[0])
    told = {(r["stage"], r["name"], r["does"]) for r in report["rows"]}
    own = "foreign_pack.guided"
    assert {
        ("run", own, 'callback on_pre_run ("theirs")'), ("weights", own, "callback on_load_after (without a key)"),
        ("run", "their data", "data kept on the MODEL, which its owner reads"),
        ("run", "bfloat16", "in place of manual_cast_dtype"), ("blocks", own, "patch input_block_patch"),
        ("step", "their_option", "an option of the MODEL that its owner reads"),
        ("blocks", "torch.compile", "in place of diffusion_model.img_in"),
    } <= told  # fmt: skip
    assert "disable_cfg1_optimization" in names(report, stage="step")
    assert any("torch.compile beside core's EasyCache" in s for s in report["conflicts"])


def accelerated(model, **inputs):
    return run_node(Accelerate, model=model, **inputs)[0]


def test_accelerate_says_what_it_will_try_or_apply(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    model, spec = model_of("flux")
    report = planned(accelerated(model))
    (row,) = report["rows"]
    assert "tries caches and sparse attention (from 1,024 image tokens on) in up to 12 whole runs" in row["does"]
    assert "the fastest stack with an SSIM of 0.9 or more" in row["does"] and not report["declined"]
    assert "2× faster" in planned(accelerated(model, goal="a wanted speed-up"))["rows"][0]["does"]
    (declined,) = planned(taylor(accelerated(model)))["declined"]
    assert declined.startswith("Accelerate will try no caches: Taylor Cache found") and "Plan lists" not in declined
    stack = {"cache": stacks.taylor(3, 2, 8, "last_block")}
    mine = fingerprint(model.model.diffusion_model)
    points = [{"name": "Taylor Cache 3, order 2", "ratio": 0.5, "loss": 0.04, "chosen": True}]
    made = StackProfile(stack, mine, "Flux", "sample_euler", 8, [1], {"ssim": 0.9}, points)
    stack_files.save(tmp_path / stack_files.FOLDER, "shared", made)
    report = planned(accelerated(model, profile="shared"))
    assert report["rows"][0]["does"].startswith(
        "applies Taylor Cache 3, order 2, of profile shared (made for 8 steps of euler)"
    )
    assert not report["refused"]
    for wrong in (accelerated(taylor(model), profile="shared"), accelerated(model_of("wan_meta")[0], profile="shared")):
        (refused,) = planned(wrong)["refused"]
        with pytest.raises(ValueError, match=re.escape(refused)):
            Job(spec if "Taylor" in refused else model_of("wan_meta")[1])(wrong)


def test_a_refused_combination_points_at_plan():
    model, _ = model_of("flux")
    with pytest.raises(ValueError, match="already: two caches.*The node Plan lists"):
        taylor(taylor(model))
    patched = taylor(easycache.EasyCacheNode.execute(model, 0.2, 0.15, 0.95, False)[0])
    with pytest.raises(ValueError, match="The node Plan lists"):
        Job(model_of("flux")[1], steps=2)(patched)


@pytest.mark.parametrize(
    ("module", "owner"),
    [
        ("comfy_extras.nodes_easycache", "ComfyUI"), ("nodes", "ComfyUI"), ("custom_nodes.KJNodes.nodes", "KJNodes"),
        ("C:\\ComfyUI\\custom_nodes\\ComfyUI-TeaCache.nodes", "ComfyUI-TeaCache"), ("sageattention.core", "sageattention"),
        ("tessera.patching.rope", "Tessera"), ("", "unknown"),
    ],
)  # fmt: skip
def test_owners(module, owner):
    assert words.owner_of(module) == owner


def test_a_function_bound_to_a_block_is_its_writers():
    exec("def forward(self): ...", scope := {"__name__": "custom_nodes.others"})
    block = torch.nn.Linear(1, 1)
    assert words.called(MethodType(scope["forward"], block)) == ("others", "forward")
    assert words.called(block.forward) == ("torch", "Linear")
    assert words.called(Foreign(None).__call__) == words.called(Foreign(None))


def test_every_feature_says_what_it_will_do():
    video, _ = model_of("wan_meta")
    made = run_node(WindowAttention3d, model=video, min_tokens=0)[0]
    rows = planned(run_node(DynamicTokens, model=made)[0])["rows"]
    assert len(rows) >= 2 and all(len(r["does"]) > 10 for r in rows)
    late = window(video, min_tokens=4096, dense_first_steps=2, scope="self")
    assert planned(late)["rows"][0]["does"].endswith(
        "from 4,096 image tokens on; dense in the first 2 steps; self attention only"
    )
