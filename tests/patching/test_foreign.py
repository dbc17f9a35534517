"""Other packs on the same MODEL, before or after ours, and a newer core: what we do not know passes through."""

import pytest
import torch
from attention_helper import Exact, Foreign, Refuses, plan
from comfy.patcher_extension import WrappersMP
from nodes_helper import Job, error, facts, kinds, model_of, taylor, watching

from tessera import archs
from tessera.patching import run as runs
from tessera.patching.blocks import BlockFeature, WrappedForward, _replace_hook, positions
from tessera.patching.clock import Clock
from tessera.patching.forward import Forward, apply_model
from tessera.patching.run import RUN, Run, current_forward

LEVEL = pytest.mark.parametrize("level", ["last_block", "output"])
BEFORE = pytest.mark.parametrize("before", [True, False], ids=["theirs-first", "ours-first"])


def both(ours, theirs, before: bool):
    return lambda model: ours(theirs(model)) if before else theirs(ours(model))


@BEFORE
@pytest.mark.parametrize("name", ["flux", "wan_meta", "sd3", "ltxv_meta", "lumina2", "cosmos_predict2"])
def test_attention_override_is_the_fallback(name, before):
    model, spec = model_of(name)
    job, alone, beside = Job(spec, steps=2), Foreign(model, 0.5), Foreign(model, 0.5)
    want = job(alone.onto(model))
    patched = both(lambda m: plan(m, Refuses()), beside.onto, before)(model)
    assert torch.equal(job(patched), want) and not torch.equal(want, job(model))
    assert beside.calls == alone.calls > 0
    assert facts(patched, "Plan")["declined"]["not today"] > 0

    beside.calls = 0
    served = both(lambda m: plan(m, Exact(), blocks=frozenset({0})), beside.onto, before)(model)
    job(served)
    assert beside.calls == alone.calls - facts(served, "Plan")["served"] < alone.calls


@BEFORE
@LEVEL
@pytest.mark.parametrize("name", ["flux", "wan_meta", "sd3", "ltxv_meta"])
def test_block_replacement_is_still_called(name, level, before):
    model, spec = model_of(name)
    seen = []

    def theirs(m):
        def replace(args, extra):
            seen.append(sorted(args))
            out = extra["original_block"](args)
            return {**out, "img": out["img"] * 0.9}

        m = m.clone()
        m.set_model_patch_replace(replace, "dit", "double_block", 0)
        return m

    job = Job(spec)
    want = job(theirs(model))
    calls, arguments = len(seen), seen[0]
    seen.clear()
    off = both(lambda m: taylor(m, level=level, interval=1), theirs, before)(model)
    assert torch.equal(job(off), want) and len(seen) == calls == 8 and seen[0] == arguments
    seen.clear()
    on = both(lambda m: taylor(m, level=level), theirs, before)(model)
    with watching(model) as watch:
        job(on)
    assert len(seen) == 4 and facts(on)["blocks_computed"] == watch.blocks


@BEFORE
@LEVEL
def test_model_function_wrapper(level, before):
    model, spec = model_of("flux")
    calls = []

    def theirs(m):
        def wrapper(apply, args):
            calls.append(args["cond_or_uncond"])
            return apply(args["input"], args["timestep"], **args["c"]) * 0.9

        m = m.clone()
        m.set_model_unet_function_wrapper(wrapper)
        return m

    want = Job(spec)(theirs(model))
    off = both(lambda m: taylor(m, level=level, interval=1), theirs, before)(model)
    assert torch.equal(Job(spec)(off), want) and len(calls) == 16
    on = both(lambda m: taylor(m, level=level), theirs, before)(model)
    assert torch.isfinite(Job(spec)(on)).all() and kinds(on) == "ffppfppf" and len(calls) == 24


@BEFORE
@LEVEL
@pytest.mark.parametrize(
    "kind, changes",
    [
        (WrappersMP.APPLY_MODEL, True), (WrappersMP.DIFFUSION_MODEL, True), (WrappersMP.PREDICT_NOISE, True),
        (WrappersMP.CALC_COND_BATCH, False), (WrappersMP.OUTER_SAMPLE, True), (WrappersMP.SAMPLER_SAMPLE, True),
    ],
)  # fmt: skip
def test_wrappers(kind, changes, level, before):
    model, spec = model_of("flux")
    calls = []

    def theirs(m):
        def wrapper(executor, *args, **kwargs):
            calls.append(kind)
            out = executor(*args, **kwargs)
            return out * 0.9 if changes else out

        m = m.clone()
        m.add_wrapper_with_key(kind, "another_pack", wrapper)
        return m

    want = Job(spec)(theirs(model))
    expected = len(calls)
    off = both(lambda m: taylor(m, level=level, interval=1), theirs, before)(model)
    assert torch.equal(Job(spec)(off), want) and len(calls) == 2 * expected > 0
    on = both(lambda m: taylor(m, level=level), theirs, before)(model)
    assert torch.isfinite(Job(spec)(on)).all() and kinds(on) == "ffppfppf"


def test_unknown_attention_arguments_reach_the_fallback(monkeypatch):
    """As if a newer core gave its attention one more keyword."""
    import comfy.ldm.flux.math as flux

    model, spec = model_of("flux")
    attention, heard = flux.optimized_attention, []
    monkeypatch.setattr(flux, "optimized_attention", lambda *a, **k: attention(*a, **k, newer="yes"))

    class Listening(Foreign):
        def __call__(self, func, *args, **kwargs):
            heard.append(kwargs.get("newer"))
            return super().__call__(func, *args, **kwargs)

    job = Job(spec, steps=2)
    assert error(job(plan(model, Exact())), job(model)) < 1e-4
    job(Listening(model).onto(plan(model, Refuses())))
    assert heard and set(heard) == {"yes"}


class Passing(BlockFeature):
    """Asks for every block and changes none."""


def forward_of(name: str):
    model, _ = model_of(name)
    arch, feature = archs.find(model.model.diffusion_model), Passing(None)
    run = Run(
        (feature,), Clock([1.0, 0.0]), model.model, {}, arch, {feature: None}, sampling=model.model.model_sampling
    )
    forward = Forward(run, (), {})
    forward.diffusion_model = model.model.diffusion_model
    return forward, positions(arch, model.model.diffusion_model)


def test_block_hook_passes_unknown_arguments_on():
    forward, (block, *_) = forward_of("flux")

    def original(args):
        assert args["newer"] == 3
        return {"img": args["img"] + 1, "txt": args["txt"], "later": args["newer"]}

    hook = _replace_hook(forward, block, None)
    out = hook({"img": torch.zeros(1), "txt": torch.ones(1), "vec": None, "newer": 3}, {"original_block": original})
    assert out["img"] == 1 and out["txt"] == 1 and out["later"] == 3

    def earlier(args, extra, *more, **also):
        assert args["newer"] == 3 and more == ("fourth",) and also == {"fifth": 5}
        return extra["original_block"](args)

    hook = _replace_hook(forward, block, earlier)
    arguments = {"img": torch.zeros(1), "txt": torch.ones(1), "newer": 3}
    assert hook(arguments, {"original_block": original}, "fourth", fifth=5)["later"] == 3


@pytest.mark.parametrize("name", ["lumina2", "cosmos_predict2", "omnigen2", "cogvideox"])
def test_wrapped_forward_passes_unknown_arguments_on(name):
    forward, (block, *_) = forward_of(name)
    streams = {n: torch.full((1,), float(i)) for i, n in enumerate(block.spec.streams)}
    seen = {}

    def original(*args, **kwargs):
        seen.update(args=args, kwargs=kwargs)
        out = tuple(v + 1 for v in streams.values())
        return out if len(out) > 1 else out[0]

    wrapped = WrappedForward(original, block)
    positional = [streams[n] for n, _ in zip(block.spec.streams, block.spec.positions, strict=False)]
    named = {n: v for n, v in streams.items() if all(v is not p for p in positional)}
    outcomes = []
    for token in (None, current_forward.set(forward)):
        outcomes.append(wrapped(*positional, "mask", "newer", **named, newest=4))
        assert seen["args"][len(positional) :] == ("mask", "newer") and seen["kwargs"]["newest"] == 4
        assert list(seen["kwargs"]) == [*named, "newest"]
        if token is not None:
            current_forward.reset(token)
    assert type(outcomes[0]) is type(outcomes[1]) and all(
        torch.equal(torch.stack([*a]), torch.stack([*b])) for a, b in [outcomes]
    )


class Executor:
    """What core hands a wrapper: remembers how it was called."""

    def __init__(self, owner):
        self.class_obj, self.calls = owner, []

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return args[0]


@LEVEL
def test_wrapped_calls_pass_unknown_arguments_on(level):
    model, _ = model_of("flux")
    patched = taylor(model, level=level)
    feature = patched.model_options["transformer_options"][runs.FEATURES][0]
    base = model.model
    run = Run((feature,), Clock([1.0, 0.0]), base, {}, archs.find(base.diffusion_model), sampling=base.model_sampling)
    run.states[feature] = feature.begin(run)
    run.evaluate(1.0)
    options = {"cond_or_uncond": [0], "uuids": ["a"], "wrappers": {}, RUN: run}
    x, t = torch.zeros(1, 16, 8, 12), torch.ones(1)
    executor = Executor(base)
    apply_model(executor, x, t, None, None, None, options, "newer", newest=1)
    (args, kwargs), = executor.calls  # fmt: skip
    assert args[2:5] == (None, None, None) and args[6] == "newer" and kwargs == {"newest": 1}
    assert args[5]["uuids"] == ["a"] and args[5] is not options and "tessera_forward" not in options
    executor = Executor(base)
    apply_model(executor, x, t, transformer_options=options, newest=2)
    (args, kwargs), = executor.calls  # fmt: skip
    assert kwargs["newest"] == 2 and kwargs["transformer_options"]["uuids"] == ["a"]
