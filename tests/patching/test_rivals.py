"""Other attention on the same MODEL: a stand-in for core's own sparse attention node, overrides that chain and that do
not, at every depth where one can be set, and attention functions exchanged for good. Both work, or one sentence says
which wins."""

import comfy.ldm.modules.attention as core
import pytest
import torch
from attention_helper import Exact, Refuses, plan
from comfy.patcher_extension import CallbacksMP, WrappersMP
from nodes_helper import Job, facts, model_of

from tessera.patching.attention import OVERRIDE
from tessera.patching.report import latest_record
from tessera.patching.run import find_options, replace_options

NAMES = pytest.mark.parametrize("name", ["flux", "wan_meta", "sd3", "lumina2"])
STEPS = 2


class Halves(Exact):
    """Half of what dense attention gives: what it served shows."""

    def attend(self, state, call):
        answer = super().attend(state, call)
        return type(answer)(answer.out / 2, answer.pairs, answer.dense_pairs)


class Doubles:
    """A foreign override that doubles the calls of its blocks, and counts them. chains: it leaves the others to the
    override that it found, as a good neighbour does."""

    def __init__(self, blocks=None, chains=True):
        self.blocks, self.chains, self.mine, self.others, self.found = blocks, chains, [], 0, None

    def on(self, options):
        """Puts itself into these options, over what is there. Idempotent."""
        if options.get(OVERRIDE) != self.answer:
            self.found = options.get(OVERRIDE) if self.chains else None
            options[OVERRIDE] = self.answer

    def answer(self, func, *args, **kwargs):
        options = kwargs["transformer_options"]
        block = options.get("block_type"), options.get("block_index")
        if self.blocks is None or block in self.blocks:
            self.mine.append(block)
            return func(*args, **kwargs) * 2
        self.others += 1
        return func(*args, **kwargs) if self.found is None else self.found(func, *args, **kwargs)


def at_the_node(theirs):
    def put(model):
        model = model.clone()
        theirs.on(model.model_options["transformer_options"])
        return model

    return put


def at_every_step(theirs):
    """As core's Model Sparse Attention does: at its node, and again before each step, so that it is on top."""

    def put(model):
        model = at_the_node(theirs)(model)
        prepare = lambda patcher, timestep, options: theirs.on(options["transformer_options"])  # noqa: E731
        model.add_callback(CallbacksMP.ON_PREPARE_STATE, prepare)
        return model

    return put


def in_a_wrapper(theirs, kind):
    def put(model):
        def wrapper(executor, *args, **kwargs):
            options = find_options(args, kwargs).copy()
            theirs.on(options)
            args, kwargs = replace_options(args, kwargs, options)
            return executor(*args, **kwargs)

        model = model.clone()
        model.add_wrapper_with_key(kind, "another_pack", wrapper)
        return model

    return put


def line(model, name="Plan"):
    return next(f for f in latest_record(model)["features"] if f["name"] == name)["line"]


PLACES = {
    "node": at_the_node,
    "every step": at_every_step,
    "around the model": lambda theirs: in_a_wrapper(theirs, WrappersMP.APPLY_MODEL),
}


@pytest.mark.parametrize("chains", [True, False], ids=["chains", "replaces"])
@pytest.mark.parametrize("order", ["ours first", "theirs first"])
@pytest.mark.parametrize("place", PLACES)
def test_both_serve_their_blocks_wherever_the_other_one_is_set(place, order, chains, caplog):
    """Ours answers block 0, theirs the two single blocks: exactly what either does alone on those, whoever came first."""
    model, spec = model_of("flux")
    job, seen = Job(spec, steps=STEPS), {}
    theirs = Doubles({("single", 0), ("single", 1)}, chains)

    class Both:
        """What the two should do together, by hand."""

        def answer(self, func, *args, **kwargs):
            options = kwargs["transformer_options"]
            block = options["block_type"], options["block_index"]
            seen[block] = seen.get(block, 0) + 1
            return func(*args, **kwargs) * {"single": 2.0, "double": 1.0}[block[0]]

    by_hand = model.clone()
    by_hand.model_options["transformer_options"][OVERRIDE] = Both().answer
    want = job(plan(by_hand, Halves(), blocks=frozenset({0})))
    calls = seen[("single", 0)]
    ours = lambda m: plan(m, Halves(), blocks=frozenset({0}))  # noqa: E731
    steps = [ours, PLACES[place](theirs)] if order == "ours first" else [PLACES[place](theirs), ours]
    patched = steps[1](steps[0](model))
    caplog.clear()
    assert torch.equal(job(patched), want)
    told = facts(patched, "Plan")
    assert told["served"] == calls and told["calls"] == 4 * calls, "ours served block 0 and was asked once a call"
    assert theirs.mine.count(("single", 0)) == theirs.mine.count(("single", 1)) == calls
    assert ("double", 0) not in theirs.mine
    assert "bypassed" not in told and not caplog.records


@NAMES
@pytest.mark.parametrize("place", ["node", "every step"])
def test_an_override_that_keeps_everything_gets_what_ours_leaves(name, place, caplog):
    model, spec = model_of(name)
    job, theirs, alone = Job(spec, steps=STEPS), Doubles(chains=False), Doubles(chains=False)
    want = job(PLACES[place](alone)(model))
    patched = PLACES[place](theirs)(plan(model, Refuses()))
    caplog.clear()
    assert torch.equal(job(patched), want) and len(theirs.mine) == len(alone.mine) > 0
    theirs.mine.clear()
    served = PLACES[place](theirs)(plan(model, Exact()))
    job(served)
    assert len(theirs.mine) == len(alone.mine) - facts(served, "Plan")["served"] < len(alone.mine)
    assert not caplog.records


def test_deep_in_the_model_theirs_wins_once_said_and_after_it_both_work(caplog):
    model, spec = model_of("flux")
    job, theirs, alone = Job(spec, steps=STEPS), Doubles(chains=False), Doubles(chains=False)
    deep = in_a_wrapper(theirs, WrappersMP.DIFFUSION_MODEL)
    want = job(in_a_wrapper(alone, WrappersMP.DIFFUSION_MODEL)(model))
    patched = deep(plan(plan(model, Halves(), "One"), Halves(), "Two"))
    caplog.clear()
    assert torch.equal(job(patched), want) and len(theirs.mine) == len(alone.mine)
    (said,) = caplog.messages
    assert said.startswith("One, Two: another node after it") and "Put this node after that one" in said
    for name in ("One", "Two"):
        told = facts(patched, name)
        assert told["calls"] == 0 and told["bypassed"] == line(patched, name) == said.removeprefix("One, Two: ")
    theirs.mine.clear()
    caplog.clear()
    remedy = plan(deep(plan(model, Refuses(), "One")), Halves(), "Two", blocks=frozenset({0}))
    job(remedy)
    assert facts(remedy, "Two")["served"] > 0 and len(theirs.mine) == len(alone.mine) - facts(remedy, "Two")["served"]
    assert facts(remedy, "One")["declined"]["not today"] == len(theirs.mine) and not caplog.records


@pytest.mark.parametrize(
    ("name", "where"), [("flux", "comfy.ldm.flux.math"), ("wan_meta", "comfy.ldm.wan.model"), ("sd3", None)]
)
def test_an_exchanged_attention_function_is_named(name, where, monkeypatch, caplog):
    """As packs do that write their own function into a model's module; it asks no override."""
    model, spec = model_of(name)
    where = where or "comfy.ldm.modules.diffusionmodules.mmdit"
    called = []

    def exchanged(*args, **kwargs):
        called.append(1)
        return core.attention_pytorch.__wrapped__(*args, **kwargs)

    job, patched = Job(spec, steps=STEPS), plan(model, Halves())
    want = job(model)
    monkeypatch.setattr(f"{where}.optimized_attention", exchanged)
    caplog.clear()
    assert torch.allclose(job(patched), want, atol=1e-4) and called
    (said,) = caplog.messages
    assert f"exchanged optimized_attention in {where}," in said and "Switch that one off" in said
    assert line(patched) == said.removeprefix("Plan: ")
    monkeypatch.undo()
    caplog.clear()
    job(patched)
    assert facts(patched, "Plan")["served"] > 0 and not caplog.records


def test_a_function_exchanged_for_another_of_cores_is_no_rival(monkeypatch, caplog):
    """As KJNodes and core's backends do where the new function still asks the override."""
    model, spec = model_of("flux")
    monkeypatch.setattr("comfy.ldm.flux.math.optimized_attention", core.attention_basic)
    patched = plan(model, Halves())
    caplog.clear()
    Job(spec, steps=STEPS)(patched)
    assert facts(patched, "Plan")["served"] == facts(patched, "Plan")["calls"] > 0 and not caplog.records


def test_a_forward_exchanged_where_no_override_reaches_is_said(caplog):
    model, spec = model_of("pixart")
    theirs, blocks = model.clone(), len(model.model.diffusion_model.blocks)
    for i in range(blocks):
        path = f"diffusion_model.blocks.{i}.attn.forward"
        original = model.get_model_object(path)
        theirs.add_object_patch(path, lambda *args, original=original, **kwargs: original(*args, **kwargs))
    patched = plan(theirs, Halves())
    caplog.clear()
    Job(spec, steps=1)(patched)
    (said,) = caplog.messages
    assert "exchanged the attention of this PixArt" in said and line(patched) == said.removeprefix("Plan: ")


def test_of_two_of_ours_the_newer_one_wins_and_says_so(caplog):
    model, spec = model_of("flux")
    both = plan(plan(model, Exact(), "Old"), Halves(), "New")
    caplog.clear()
    Job(spec, steps=STEPS)(both)
    (said,) = caplog.messages
    assert said == "Old: New after it served every call and wins. Give them different blocks."
    assert line(both, "Old") == said.removeprefix("Old: ") and line(both, "New").startswith("served 8 of 8")


def test_nothing_is_said_of_a_run_that_did_not_finish(caplog):
    model, spec = model_of("flux")
    theirs = Doubles(chains=False)
    patched = in_a_wrapper(theirs, WrappersMP.DIFFUSION_MODEL)(plan(model, Halves()))

    def stop(step):
        raise KeyboardInterrupt

    caplog.clear()
    with pytest.raises(KeyboardInterrupt):
        Job(spec, steps=STEPS, on_step=stop)(patched)
    assert not caplog.records and "bypassed" not in facts(patched, "Plan")
