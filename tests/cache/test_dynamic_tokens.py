"""Dynamic Tokens on stock models: off is off, counts are those of the rows that MLPs really saw, nothing is left."""

import contextlib
import gc

import comfy.model_management
import pytest
import torch
from nodes_helper import Job, error, facts, model_of, run_node, taylor
from tiny_models import conds

from tessera import archs
from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.nodes.cache.dynamic_tokens import DynamicTokens
from tessera.patching.dynamic_tokens import Choice, TokenState, mlps_of

CASES = [
    ("flux", "fp32"), ("flux", "bf16"), ("wan_meta", "fp32"), ("wan_meta", "bf16"), ("sd3", "fp32"), ("ltxv_meta", "fp32"),
    ("lumina2", "fp32"), ("lumina2", "bf16"), ("qwen_image", "fp32"), ("hunyuan_video", "fp32"), ("cosmos_predict2", "fp32"),
]  # fmt: skip
EVERY = pytest.mark.parametrize("name, dtype", CASES, ids=lambda v: v)
SERVED = ["flux", "chroma", "wan_meta", "wan_vace", "sd3", "ltxv_meta", "ltxav_meta", "lumina2", "z_image", "qwen_image",
          "hunyuan_video", "cosmos_predict2", "aura", "mochi", "kandinsky5", "pixart"]  # fmt: skip
NEAR = {"fp32": 1e-4, "bf16": 0.1}


def dynamic(model, **inputs):
    return run_node(DynamicTokens, model=model, **{"quantile": 0.5, "start_percent": 0.0, **inputs})[0]


def told(model):
    return facts(model, "Dynamic Tokens")


def kinds(model):
    return "".join(d["kind"][0] for d in told(model)["decisions"])


@contextlib.contextmanager
def rows_of(model, streams=(0,)):
    """Rows that the linear layers of these MLPs saw, each MLP's first layer counted once, whatever the node says."""
    diffusion_model = model.model.diffusion_model
    seen, handles = [], []
    for _, stream, _, module in mlps_of(archs.find(diffusion_model), diffusion_model):
        if stream in streams:
            first = next(m for m in module.modules() if hasattr(m, "in_features"))
            handles.append(first.register_forward_hook(lambda m, x, y: seen.append(x[0].shape[:-1].numel())))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", SERVED)
def test_the_mlps_of_an_architecture_serve_each_token_alone(name):
    model, _ = model_of(name)
    diffusion_model = model.model.diffusion_model
    found = mlps_of(archs.find(diffusion_model), diffusion_model)
    assert found
    comfy.model_management.load_models_gpu([model])
    for _, _, path, module in found:
        width = next(m for m in module.modules() if hasattr(m, "in_features")).in_features
        weight = next(module.parameters())
        x = torch.randn(2, 7, width, dtype=weight.dtype, device=weight.device)
        at = torch.tensor([1, 4, 5])
        whole = module(x)
        assert whole.shape == x.shape and error(module(x[:, at]), whole[:, at]) < 0.02, path
    model.detach()


@EVERY
@pytest.mark.parametrize("off", [{"quantile": 0.0}, {"refresh_every": 1}, {"min_active": 1.0}], ids=str)
def test_off_is_bit_equal(name, dtype, off):
    model, spec = model_of(name, dtype)
    job = Job(spec, steps=3)
    want = job(model)
    patched = dynamic(model, **off)
    with rows_of(model) as rows:
        assert torch.equal(job(patched), want)
    assert told(patched)["tokens"] == told(patched)["tokens_computed"] == sum(rows) > 0
    assert told(patched)["peak_bytes"] == 0 and kinds(patched) == "fff"


@EVERY
@pytest.mark.parametrize("fill", ["reuse", "zero"])
def test_counts_are_those_of_the_rows_that_ran(name, dtype, fill):
    model, spec = model_of(name, dtype)
    job, patched = Job(spec), dynamic(model, fill=fill)
    want = job(model)
    with rows_of(model) as rows:
        got = job(patched)
    assert kinds(patched) == "fpppfppp"
    assert told(patched)["tokens_computed"] == sum(rows) < told(patched)["tokens"]
    assert told(patched)["flops_saved"] > 0 and 0.55 < told(patched)["share"] < 0.75
    assert 1e-6 < error(got, want) < 1.0
    assert torch.equal(job(patched), got) and torch.equal(job(model), want)
    places = 8 * told(patched)["tokens"] // len(kinds(patched))  # int64 of each token of each MLP
    outputs = told(patched)["peak_bytes"] - places
    width = (2 if dtype == "bf16" else 4) * (told(patched)["tokens"] - told(patched)["tokens_computed"]) // 6
    assert outputs == 0 if fill == "zero" else outputs > 0 and outputs % width == 0


def test_flops_are_those_of_the_formula():
    model, spec = model_of("wan_meta")  # 5 x 4 x 6 tokens, 3 blocks, MLP 96 -> 128 -> 96
    patched = dynamic(model, quantile=0.25, refresh_every=2)
    Job(spec, steps=4)(patched)
    each = 2 * 120 * 3  # two conditions
    assert told(patched)["tokens"] == 4 * each and told(patched)["tokens_computed"] == 4 * each - 2 * each // 4
    assert told(patched)["flops_saved"] == 2 * (2 * each // 4) * 2 * 96 * 128
    assert told(patched)["mlp_flops"] == 2 * 4 * each * 2 * 96 * 128


def test_text_takes_part_on_demand():
    model, spec = model_of("flux")
    job = Job(spec)
    image, both = dynamic(model), dynamic(model, tokens="all")
    with rows_of(model, (1,)) as alone:
        job(image)
    with rows_of(model, (1,)) as rows:
        job(both)
    assert sum(rows) < sum(alone) and told(both)["tokens"] == told(image)["tokens"] + sum(alone)


def test_the_text_of_a_joined_sequence_is_computed():
    model, spec = model_of("lumina2")
    image, both = (
        dynamic(model, quantile=0.9, min_active=0.0),
        dynamic(model, quantile=0.9, min_active=0.0, tokens="all"),
    )
    Job(spec)(image), Job(spec)(both)
    assert told(both)["tokens_computed"] < told(image)["tokens_computed"]
    assert told(both)["tokens"] == told(image)["tokens"]


def test_fewer_skips_cost_less_quality():
    model, spec = model_of("wan_meta")
    job = Job(spec, steps=16, cfg=1.0)
    want = job(model)
    errors = [error(job(dynamic(model, quantile=q)), want) for q in (0.1, 0.4, 0.9)]
    assert errors[0] < errors[1] < errors[2]
    assert error(job(dynamic(model, quantile=0.9, refresh_every=2)), want) < errors[2]


def test_blocks_and_percents():
    model, spec = model_of("wan_meta")
    patched = dynamic(model, blocks="1", start_percent=0.45, end_percent=0.75, refresh_every=20)
    with rows_of(model) as rows:
        Job(spec, steps=10)(patched)
    sampling = model.get_model_object("model_sampling")
    start, end = sampling.percent_to_sigma(0.45), sampling.percent_to_sigma(0.75)
    inside = [end <= d["sigma"] <= start for d in told(patched)["decisions"]]
    assert kinds(patched).count("p") == sum(inside) - 1 > 0  # the first inside chooses
    assert all(within for within, kind in zip(inside, kinds(patched), strict=True) if kind == "p")
    assert told(patched)["tokens"] * 3 == len(rows) * 240 and min(rows) == 120


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "heunpp2", "euler_ancestral", "dpmpp_2m"])
def test_samplers(sampler):
    model, spec = model_of("flux")
    job, patched = Job(spec, sampler=sampler, steps=6), dynamic(model)
    got = job(patched)
    assert torch.isfinite(got).all() and "p" in kinds(patched) and torch.equal(job(patched), got)


def test_a_restart_chooses_anew():
    model, spec = model_of("flux")
    patched = dynamic(model, refresh_every=20)
    Job(spec, sigmas=torch.tensor([1.0, 0.8, 0.6, 0.9, 0.5, 0.2, 0.0]))(patched)
    assert kinds(patched) == "fppfpp"


def test_partial_denoise():
    model, spec = model_of("flux")
    latent = torch.randn(spec.latent, generator=torch.Generator().manual_seed(3))
    patched = dynamic(model)
    assert torch.isfinite(Job(spec, denoise=0.4, latent=latent)(patched)).all() and kinds(patched) == "fpppfppp"


@EVERY
def test_separate_cfg_is_as_joined_cfg(name, dtype, monkeypatch):
    model, spec = model_of(name, dtype)
    patched, job = dynamic(model), Job(spec)
    joined = job(patched)
    first = told(patched)
    monkeypatch.setattr("comfy.model_patcher.ModelPatcher.get_free_memory", lambda self, d: 0)
    assert error(job(patched), joined) < NEAR[dtype]
    for fact in ("decisions", "tokens_computed"):
        assert told(patched)[fact] == first[fact]


@EVERY
def test_a_batch_is_its_pictures(name, dtype):
    model, spec = model_of(name, dtype)
    patched = dynamic(model)
    noises = [torch.randn(spec.latent, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    single = [Job(spec, noise=noise)(patched) for noise in noises]
    assert error(Job(spec, noise=torch.cat(noises), batch=2)(patched), torch.cat(single)) < NEAR[dtype]


@pytest.mark.parametrize("name", ["flux", "wan_meta", "lumina2"])
def test_interrupt_then_rerun_and_nothing_is_held(name):
    model, spec = model_of(name)
    patched, held = dynamic(model), []
    want = Job(spec)(dynamic(model))

    def on_step(step):
        gc.collect()
        held.extend(o for o in gc.get_objects() if type(o) is Choice)
        if step == 2:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException) as stopped:
        Job(spec, on_step=on_step)(patched)
    assert held
    held.clear()
    stopped.value.__traceback__ = None
    del stopped
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) in (Choice, TokenState)]
    assert torch.equal(Job(spec)(patched), want)


def test_branches_do_not_meet_and_a_plain_model_is_plain():
    model, spec = model_of("flux")
    job, one, two = Job(spec), dynamic(model), dynamic(model, quantile=0.8)
    plain, first, second = job(model), job(one), job(two)
    assert not torch.equal(first, second)
    for patched, want in ((one, first), (model, plain), (two, second), (one, first)):
        assert torch.equal(job(patched), want)


@pytest.mark.parametrize("first", ["cache", "tokens"])
@pytest.mark.parametrize("level", ["last_block", "output"])
def test_beside_taylor_cache(first, level):
    model, spec = model_of("flux")
    if first == "cache":
        both = dynamic(taylor(model, level=level))
    else:
        both = taylor(dynamic(model), level=level)
    with rows_of(model) as rows:
        got = Job(spec)(both)
    assert torch.isfinite(got).all() and sum(rows) == told(both)["tokens_computed"] < told(both)["tokens"]
    off = taylor(dynamic(model, quantile=0.0), level=level)
    assert torch.equal(Job(spec)(off), Job(spec)(taylor(model, level=level)))


def test_beside_an_attention_node_and_lora():
    model, spec = model_of("wan_meta")
    key = "diffusion_model.blocks.1.ffn.0.weight"
    change = torch.randn(128, 96, generator=torch.Generator().manual_seed(4)) * 0.2
    changed = model.clone()
    changed.add_patches({key: ("diff", (change,))}, 1.0)
    window = {"radius": 2, "min_tokens": 0}
    one = run_node(LocalWindowAttention, model=dynamic(changed), **window)[0]
    two = dynamic(run_node(LocalWindowAttention, model=changed, **window)[0])
    got = Job(spec)(one)
    assert torch.equal(Job(spec)(two), got) and told(one)["share"] < 1
    assert torch.equal(Job(spec)(dynamic(changed, quantile=0.0)), Job(spec)(changed))
    assert error(Job(spec)(dynamic(changed)), Job(spec)(dynamic(model))) > 1e-3


def test_prompts_of_other_lengths_choose_for_themselves():
    model, spec = model_of("lumina2")
    short, long = conds(spec)
    text = torch.randn(1, 23, long[0][0].shape[-1], generator=torch.Generator().manual_seed(1))
    extra = {k: torch.ones(1, 23, dtype=v.dtype) if k == "attention_mask" else v for k, v in long[0][1].items()}
    assert torch.isfinite(Job(spec, positive=short, negative=[[text, extra]])(dynamic(model))).all()


def test_held_precision_and_place():
    model, spec = model_of("wan_meta")
    full, half = dynamic(model), dynamic(model, cache_dtype="bfloat16", cache_device="cpu")
    assert 0 < error(Job(spec)(half), Job(spec)(full)) < 0.05
    assert told(half)["peak_bytes"] < told(full)["peak_bytes"]


@pytest.mark.parametrize(
    "inputs, sentence",
    [
        ({"start_percent": 0.6, "end_percent": 0.4}, "start_percent 0.6 must not lie after end_percent 0.4"),
        ({"blocks": "2"}, r"none has an MLP apart; on this Flux \[0, 1\] have"),
        ({"blocks": "9"}, "blocks 0 to 3, there is no block 9"),
    ],
)
def test_bad_input(inputs, sentence):
    with pytest.raises(ValueError, match=sentence):
        dynamic(model_of("flux")[0], **inputs)


def test_refusals(caplog):
    flux, _ = model_of("flux")
    with pytest.raises(ValueError, match="Dynamic Tokens is on this MODEL already"):
        dynamic(dynamic(flux))
    other, spec = model_of("omnigen2")
    with pytest.raises(ValueError, match="has no MLP apart that serves each token alone"):
        dynamic(other)
    assert torch.equal(Job(spec, steps=2)(dynamic(other, unsupported="warn")), Job(spec, steps=2)(other))
    assert "It does nothing on this MODEL" in caplog.text
