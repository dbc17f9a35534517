"""Region-Adaptive Sampling as a node, on stock models: off is off, what is left out stays right, and a run leaves nothing."""

import gc
import math
import weakref

import comfy.model_management
import comfy.model_patcher
import comfy_extras.nodes_context_windows as windows
import comfy_extras.nodes_easycache as easycache
import pytest
import torch
from comfy.controlnet import ControlBase
from nodes_helper import Job, error, facts, model_of, run_node, taylor
from tiny_models import conds

from tessera import archs
from tessera.archs.wan import PER_TOKEN
from tessera.methods.cache.region import Choice, ages, latent_mask, measure
from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.nodes.cache.region_adaptive_sampling import RegionAdaptiveSampling
from tessera.patching.region_rows import Place, gathered, widened
from tessera.patching.region_state import Call, Lane, RegionState, Rows
from tessera.patching.run import Run

NAME = "Region-Adaptive Sampling"
SERVED = [
    ("flux", "fp32"), ("flux", "bf16"), ("flux2", "fp32"), ("chroma", "fp32"), ("sd3", "fp32"), ("qwen_image", "fp32"),
    ("wan_meta", "fp32"), ("wan_meta", "bf16"), ("wan_i2v", "fp32"), ("wan_vace", "fp32"), ("hunyuan_video", "fp32"),
    ("lumina2", "fp32"), ("z_image", "fp32"), ("aura", "fp32"),
]  # fmt: skip
EVERY = pytest.mark.parametrize("name, dtype", SERVED, ids=lambda v: v)
FEW = pytest.mark.parametrize("name", ["flux", "wan_meta", "sd3", "lumina2"])


def ras(model, **inputs):
    """The MODEL after the node, leaving tokens out at steps 2, 3, 5 and 6 of 8."""
    return run_node(RegionAdaptiveSampling, model=model, **{"start_step": 2, "reset_every": 3, **inputs})[0]


def told(model) -> dict:
    return facts(model, NAME)


def steps(model) -> str:
    """One letter an evaluation: f full, r region."""
    return "".join(d["kind"][0] for d in told(model)["decisions"])


class Lengths:
    """Tokens that the linear layers of the blocks really met, whatever the node says."""

    def __init__(self, model):
        diffusion_model = model.model.diffusion_model
        self.rows, self.handles = 0, []
        for spec in archs.find(diffusion_model).blocks:
            if spec.stack:
                for _, block in archs.block_modules(diffusion_model, spec):
                    for module in block.modules():
                        if isinstance(module, torch.nn.Linear):
                            self.handles.append(module.register_forward_hook(self._count))

    def _count(self, module, args, out):
        self.rows += args[0].shape[:-1].numel() if args[0].ndim > 2 else 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@EVERY
def test_ratio_1_is_bit_equal_and_stores_nothing(name, dtype):
    model, spec = model_of(name, dtype)
    off = ras(model, sample_ratio=1.0)
    assert torch.equal(Job(spec)(off), Job(spec)(model))
    assert told(off)["peak_bytes"] == 0 and told(off)["decisions"] == []


@EVERY
def test_all_tokens_active_is_the_plain_run(name, dtype):
    """The whole way through the caches, with every token in it."""
    model, spec = model_of(name, dtype)
    whole = ras(model, reset_every=0, region_mask=torch.ones(1, 8, 8))
    got, want = Job(spec)(whole), Job(spec)(model)
    assert steps(whole) == "ffrrrrrr" and told(whole)["tokens_fraction"] == 1.0
    assert error(got, want) < (1e-5 if dtype == "fp32" else 0.02)


@EVERY
def test_tokens_are_left_out(name, dtype):
    model, spec = model_of(name, dtype)
    job, patched = Job(spec), ras(model)
    with Lengths(model) as plain:
        want = job(model)
    with Lengths(model) as met:
        got = job(patched)
    assert steps(patched) == "ffrrfrrf" and not told(patched)["computed_in_full"]
    assert 0.7 <= told(patched)["tokens_fraction"] <= 0.8
    assert met.rows < plain.rows and 1e-4 < error(got, want) < 0.5
    assert told(patched)["peak_bytes"] > 0
    assert torch.equal(job(patched), got) and torch.equal(job(model), want)


def test_rows_scale_with_the_ratio():
    """Linear layers of Wan's blocks see the text only in cross-attention: the rest is exactly the share of tokens."""
    model, spec = model_of("wan_meta")
    rows = []
    for ratio in (1.0, 0.75, 0.5, 0.25):
        patched = ras(model, sample_ratio=ratio, round_to=1, reset_every=0)
        with Lengths(model) as met:
            Job(spec)(patched)
        rows.append(met.rows)
    saved = [rows[0] - n for n in rows]
    assert saved[1] > 0 and saved[2:] == [2 * saved[1], 3 * saved[1]]


class Naive:
    """The method by hand: everything is recomputed at every step, and attention over the whole sequence is given the
    last keys and values of tokens that are left out. Patches of 2, the image last in the sequence."""

    def __init__(self, choice: Choice, sparse: str, spec, others: set[int]):
        t = spec.latent[2] if len(spec.latent) == 5 else 1
        self.choice, self.sparse, self.grid, self.step = choice, sparse, (t, *(n // 2 for n in spec.latent[-2:])), -1
        self.n, self.others = math.prod(self.grid), others  # tokens of a sequence that are not of the image
        self.keys: dict[tuple, torch.Tensor] = {}
        self.v, self.active, self.measured = None, None, None
        self.left_out = None
        self.layer = 0

    def attention(self, func, q, k, v, heads, *args, **kwargs):
        axis = 2 if kwargs.get("skip_reshape") else 1
        if q.shape[axis] != k.shape[axis] or q.shape[axis] - self.n not in self.others:
            return func(q, k, v, heads, *args, **kwargs)
        k, v, layer = k.clone(), v.clone(), self.layer
        self.layer += 1
        for name, t in (("k", k.movedim(axis, 1)), ("v", v.movedim(axis, 1))):
            for row in range(t.shape[0]):
                for token in range(self.n):
                    at = (layer, name, row, token)
                    if self.active is None or token in self.active[row % len(self.active)].tolist():
                        self.keys[at] = t[row, t.shape[1] - self.n + token].clone()
                    t[row, t.shape[1] - self.n + token] = self.keys[at]
        return func(q, k, v, heads, *args, **kwargs)

    def model(self, apply_model, given):
        x, sigma, c = given["input"], given["timestep"], given["c"]
        self.step, self.layer = self.step + 1, 0
        left_out = torch.zeros(x.shape[0] // 2, self.n) if self.left_out is None else self.left_out
        sparse = self.sparse[self.step] == "r"
        self.active = self.choice.choose(self.measured, left_out, None, self.n // 2) if sparse else None
        self.left_out = ages(left_out, self.active)
        options = {**c["transformer_options"], "optimized_attention_override": self.attention}
        made = apply_model(x, sigma, **{**c, "transformer_options": options})
        level = sigma.reshape(-1, *[1] * (x.ndim - 1))
        v = (x - made) / level
        if self.active is not None:
            mask = latent_mask(self.active, self.grid, (1, 2, 2), x.shape).repeat(2, *[1] * (x.ndim - 1))
            v = torch.where(mask, v, self.v)
        self.v = v
        positive = given["cond_or_uncond"].index(0)
        self.measured = measure(v.chunk(2)[positive], None, self.choice.metric, (1, 2, 2))
        return x - level * v


@pytest.mark.parametrize(
    "name, keep",
    [("flux", "high"), ("flux", "low"), ("flux", "mixed"), ("sd3", "high"), ("qwen_image", "low"), ("lumina2", "high"),
     ("wan_meta", "high"), ("hunyuan_video", "high"), ("chroma", "low"), ("aura", "high")],
)  # fmt: skip
def test_against_the_method_by_hand(name, keep):
    """With CFG in one batch, and two pictures that each have their own tokens."""
    model, spec = model_of(name)
    job = Job(spec, batch=2, steps=6)
    text = spec.context[1]  # AuraFlow adds 8 registers; some of SD3's blocks attend to the image alone as well
    others = {"wan_meta": {0}, "sd3": {text, 0}, "aura": {text + 8}}.get(name, {text})
    naive = Naive(Choice(keep=keep), "ffrrfr", spec, others)
    by_hand = model.clone()
    by_hand.set_model_unet_function_wrapper(naive.model)
    want = job(by_hand)
    patched = ras(model, keep=keep, round_to=1)
    got = job(patched)
    assert steps(patched) == naive.sparse and naive.layer >= 2
    assert error(got, want) < 2e-5 and error(want, job(model)) > 1e-3


def test_a_prediction_that_does_not_change_is_exact():
    model, spec = model_of("flux")
    constant = torch.randn(spec.latent, generator=torch.Generator().manual_seed(5))

    def still(apply_model, given):
        apply_model(given["input"], given["timestep"], **given["c"])
        return given["input"] - given["timestep"].reshape(-1, 1, 1, 1) * constant

    toy = model.clone()
    toy.set_model_unet_function_wrapper(still)
    want = Job(spec, cfg=1.0)(toy)
    for ratio in (0.05, 0.3, 0.75):
        patched = ras(toy, sample_ratio=ratio, reset_every=0)
        assert error(Job(spec, cfg=1.0)(patched), want) < 1e-5


@pytest.fixture
def low_memory(monkeypatch):
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, d: 0)


@FEW
def test_prompts_apart_choose_the_same_tokens(name, low_memory, monkeypatch):
    model, spec = model_of(name)
    apart = ras(model)
    alone = Job(spec)(apart)
    activity = told(apart)["activity"]
    monkeypatch.undo()
    assert error(Job(spec)(apart), alone) < 1e-5
    assert told(apart)["activity"] == activity


@pytest.mark.parametrize("name", ["flux", "wan_meta"])
def test_a_batch_is_its_pictures(name):
    model, spec = model_of(name)
    patched = ras(model)
    noise = torch.randn(2, *spec.latent[1:], generator=torch.Generator().manual_seed(9))
    both = Job(spec, noise=noise, latent=torch.zeros_like(noise))(patched)
    for i in range(2):
        one = Job(spec, noise=noise[i : i + 1], latent=torch.zeros(1, *spec.latent[1:]))(patched)
        assert error(both[i : i + 1], one) < 1e-4


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "euler_ancestral", "dpmpp_2m"])
def test_samplers(sampler):
    model, spec = model_of("flux")
    patched = ras(model)
    got = Job(spec, sampler=sampler)(patched)
    assert torch.isfinite(got).all() and torch.equal(Job(spec, sampler=sampler)(patched), got)
    by_step: dict[int, set] = {}
    for d in told(patched)["decisions"]:
        by_step.setdefault(d["step"], set()).add(d["kind"])
    assert all(len(kinds) == 1 for kinds in by_step.values()) and {"region"} in by_step.values()


def test_partial_denoise():
    model, spec = model_of("flux")
    latent = torch.randn(spec.latent, generator=torch.Generator().manual_seed(3))
    job, patched = Job(spec, denoise=0.4, latent=latent), ras(model)
    assert torch.equal(job(ras(model, sample_ratio=1.0)), job(model))
    assert torch.isfinite(job(patched)).all() and steps(patched) == "ffrrfrrf"


@FEW
def test_interrupt_then_rerun_and_nothing_held(name):
    model, spec = model_of(name)
    patched = ras(model)
    want, held = Job(spec)(patched), []

    def on_step(step):
        if step == 3:
            found = [o for o in gc.get_objects() if type(o) is Rows]
            held.extend(weakref.ref(row.data) for row in found)
            raise comfy.model_management.InterruptProcessingException

    try:
        Job(spec, on_step=on_step)(patched)
    except comfy.model_management.InterruptProcessingException as stopped:
        stopped.__traceback__ = None
    assert len(held) >= 4  # keys and values, two prompts
    gc.collect()
    assert not [ref for ref in held if ref() is not None]
    assert not [o for o in gc.get_objects() if type(o) in (Rows, RegionState, Lane, Call, Run)]
    assert torch.equal(Job(spec)(patched), want)


def test_two_samplers_share_one_model():
    model, spec = model_of("flux")
    a, b = ras(model), ras(model, keep="low", sample_ratio=0.25)
    first, second = Job(spec)(a), Job(spec, seed=3)(b)
    assert torch.equal(Job(spec)(a), first) and torch.equal(Job(spec, seed=3)(b), second)


def test_resets_ends_and_ratios():
    model, spec = model_of("flux")
    patched = ras(model, reset_steps="3, 5")
    Job(spec)(patched)
    assert steps(patched) == "ffrfrfrr"
    ended = ras(model, end_percent=0.6, reset_every=0)
    Job(spec)(ended)
    assert steps(ended).startswith("ffr") and steps(ended).endswith("ff")
    rising = ras(model, ratio_schedule="linear_up", reset_every=0, round_to=1)
    Job(spec)(rising)
    assert told(rising)["tokens_fraction"] == pytest.approx((2 + 6 * 0.5) / 8, abs=0.02)


@pytest.mark.parametrize("dtype, parts", [("model", 1.0), ("bfloat16", 0.5), ("fp8_e4m3", 0.25)])
def test_kv_precision(dtype, parts):
    model, spec = model_of("flux")
    full, less = ras(model), ras(model, kv_cache_dtype=dtype)
    assert error(Job(spec)(less), Job(spec)(full)) < 0.02
    scale = 1 / 128 if dtype == "fp8_e4m3" else 0  # one of 4 bytes for each row of 128 values of 4
    assert told(less)["peak_bytes"] == pytest.approx(told(full)["peak_bytes"] * (parts + scale), rel=1e-9)


def test_held_bytes_are_counted_and_refused_above_half_the_memory(monkeypatch):
    model, spec = model_of("flux")
    patched = ras(model)
    Job(spec)(patched)
    blocks, tokens, width, prompts = 4, 24, 128, 2
    held = told(patched)["peak_bytes"]
    assert held == 2 * blocks * tokens * width * prompts * 4
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *_, **__: 2 * held - 1)
    with pytest.raises(ValueError, match="would hold keys and values of 24 tokens in 4 blocks for 2 rows.*fp8_e4m3"):
        Job(spec)(patched)
    Job(spec)(ras(model, kv_cache_dtype="fp8_e4m3"))


def test_region_mask_is_always_computed():
    model, spec = model_of("flux")  # 4 x 6 tokens
    mask = torch.zeros(1, 8, 12)
    mask[:, :2, :4] = 1
    patched = ras(model, region_mask=mask, reset_every=0, starvation=0.0, sample_ratio=0.25)
    Job(spec, steps=12)(patched)
    activity = torch.tensor(told(patched)["activity"])
    assert (activity[0, :2] == 1).all() and activity.min() < 0.3


class Control(ControlBase):
    """A ControlNet for the tiny Flux: residuals for every image token."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        generator = torch.Generator().manual_seed(6)
        return {k: [torch.randn(1, 24, 128, generator=generator) for _ in range(2)] for k in ("input", "output")}


def test_controlnet():
    model, spec = model_of("flux")
    positive, negative = ([[c, {**extra, "control": Control()}]] for ((c, extra),) in conds(spec))
    job = Job(spec, positive=positive, negative=negative)
    want = job(model)
    assert error(job(ras(model, reset_every=0, region_mask=torch.ones(1, 8, 8))), want) < 1e-5
    some = job(ras(model))
    assert error(some, want) < 0.5 < 5 * error(want, Job(spec)(model))


def referring(spec, method: str | None):
    """Conditions with a reference picture, whose tokens follow the image."""
    reference = torch.randn(*spec.latent[:-2], 4, 6, generator=torch.Generator().manual_seed(8))
    more = {"reference_latents": [reference], **({"reference_latents_method": method} if method else {})}
    return ([[c, {**extra, **more}] for c, extra in side] for side in conds(spec))


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_reference_tokens_are_always_computed(name):
    model, spec = model_of(name)
    positive, negative = referring(spec, None)
    job = Job(spec, positive=positive, negative=negative)
    want = job(model)
    assert error(want, Job(spec)(model)) > 1e-4  # the reference is seen
    assert error(job(ras(model, reset_every=0, region_mask=torch.ones(1, 8, 8))), want) < 1e-5
    some = ras(model)
    assert error(job(some), want) < 0.5 and steps(some) == "ffrrfrrf"


@pytest.mark.parametrize("name", ["qwen_image", "hunyuan_video"])
def test_tokens_with_a_time_step_of_their_own_are_computed_in_full(name):
    """Qwen-Image's references at time 0; a first frame that HunyuanVideo is given."""
    model, spec = model_of(name)
    guided = {"guiding_frame_index": 0} if name == "hunyuan_video" else {}
    positive, negative = ([[c, {**e, **guided}] for c, e in side] for side in referring(spec, "index_timestep_zero"))
    job, patched = Job(spec, positive=positive, negative=negative), ras(model)
    assert torch.equal(job(patched), job(model)) and steps(patched) == "f" * 8
    assert set(told(patched)["computed_in_full"]) == {"some tokens have a time step of their own"}


@pytest.mark.parametrize("entries", [2, 6, 12])
def test_time_steps_of_frames_follow_their_tokens(entries):
    """Wan's modulation for each of 2 frames, for several tokens in a row, and for every token, of 12."""
    vec, rows = torch.randn(2, entries, 6, 4), torch.tensor([[0, 5, 6, 11], [1, 2, 3, 7]])
    place = Place(12, 0, 12, 0, 12)
    got = gathered({"pe": None, "vec": vec}, PER_TOKEN, place, rows, rows, torch.empty(2, 12, 4))["vec"]
    assert torch.equal(got, torch.stack([vec.repeat_interleave(12 // entries, 1)[b, rows[b]] for b in range(2)]))


def test_masks_over_computed_tokens_become_masks_over_all():
    """2 of text, 4 of image (the tokens at 1 and 3 are computed), 1 behind."""
    rows = torch.tensor([0, 1, 3, 5, 6])
    image = slice(2, 6)
    text = torch.tensor([0.0, -9.0, 0.0, 0.0, 0.0]).reshape(1, 1, 1, 5)
    assert widened(text, image, 5, 7, rows).flatten().tolist() == [0, -9, 0, 0, 0, 0, 0]
    over_all = torch.arange(7.0).reshape(1, 1, 1, 7)
    assert torch.equal(widened(over_all, image, 5, 7, rows), over_all)
    each = torch.arange(49.0).reshape(1, 1, 7, 7)
    assert torch.equal(widened(each, image, 5, 7, rows), each[:, :, rows])
    own = torch.stack((rows, torch.tensor([0, 1, 2, 4, 6])))
    assert torch.equal(widened(each, image, 5, 7, own), torch.stack([each[0, :, r] for r in own]))


def test_context_windows():
    model, spec = model_of("wan_meta")
    noise = torch.randn(1, 16, 9, 4, 6, generator=torch.Generator().manual_seed(3))
    job = Job(spec, noise=noise, latent=torch.zeros_like(noise))
    settings = {"context_length": 4, "context_overlap": 1, "context_schedule": "standard_static", "dim": 2}
    patched = run_node(windows.ContextWindowsManualNode, model=ras(model), causal_window_fix=False, **settings)[0]
    got = job(patched)
    assert steps(patched) == "ffrrfrrf" and torch.isfinite(got).all() and torch.equal(job(patched), got)


@pytest.mark.parametrize("first", [True, False])
def test_beside_an_attention_node(first):
    """Windows serve the dense steps; steps that leave tokens out attend to everything."""
    model, spec = model_of("flux")
    window = lambda m: run_node(LocalWindowAttention, model=m, radius=1, min_tokens=0)[0]  # noqa: E731
    both = ras(window(model)) if first else window(ras(model))
    assert torch.isfinite(Job(spec)(both)).all() and steps(both) == "ffrrfrrf"
    local = facts(both, "Local Window Attention")
    assert local["served"] == 4 * 4 and sum(local["declined"].values()) == 4 * 4


def test_what_is_refused():
    model, spec = model_of("flux")
    for both in (lambda: ras(taylor(model)), lambda: taylor(ras(model)), lambda: ras(ras(model))):
        with pytest.raises(ValueError, match=f"{NAME} found a .* on this MODEL: both go on from the last prediction"):
            both()
    easy = run_node(easycache.EasyCacheNode, model=ras(model))[0]
    with pytest.raises(ValueError, match="core's EasyCache or LazyCache are on the same MODEL"):
        Job(spec)(easy)
    for name in ("ltxv_meta", "cosmos_predict2", "pixart"):
        other, spec = model_of(name)
        with pytest.raises(ValueError, match="does not know which arguments of the blocks of"):
            ras(other)
        logged = ras(other, unsupported="warn")
        assert torch.equal(Job(spec, steps=2)(logged), Job(spec, steps=2)(other))


@pytest.mark.parametrize("dtype, tolerance", [(None, 0.0), (torch.bfloat16, 4e-3), (torch.float8_e4m3fn, 0.04)])
def test_kept_rows_are_those_of_a_dictionary(dtype, tolerance):
    """Rows after updates against a plain dictionary by sample and token."""
    torch.manual_seed(2)
    first = torch.randn(2, 3, 20, 8) * torch.logspace(-3, 3, 20)[:, None]  # fp8 alone would overflow and underflow
    rows, want = Rows.of(first, dtype), {(b, n): first[b, :, n] for b in range(2) for n in range(20)}
    for _ in range(3):
        at = torch.stack([torch.randperm(20)[:7] for _ in range(2)])
        new = torch.randn(2, 3, 7, 8)
        rows.write(new, at)
        want.update({(b, int(n)): new[b, :, m] for b in range(2) for m, n in enumerate(at[b])})
    got = rows.read(torch.float32)
    for (b, n), row in want.items():
        assert (got[b, :, n] - row).norm() <= tolerance * row.norm()
    assert first.data_ptr() != rows.data.data_ptr()
