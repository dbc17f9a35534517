"""Run Report draws the masks of sparse attention: of the last served call, when asked, without a trace in the run."""

import base64
import json

import pytest
import torch
from attention_helper import Refuses, plan
from nodes_helper import Job, model_of, run_node

from tessera.methods.attention.call import Answer
from tessera.methods.attention.local_window import LocalWindow
from tessera.methods.attention.picture import Picture
from tessera.methods.attention.sparse_linear import SparseLinear
from tessera.nodes.attention.diagonal_attention import DiagonalAttention
from tessera.nodes.attention.linear_attention import LinearAttention
from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.nodes.measure.run_report import RunReport
from tessera.patching.pictures import shades
from tessera.patching.report import latest_record
from tessera.patching.run import LEDGER


def report(model, samples):
    return run_node(RunReport, model=model, latent={"samples": samples})[1]


def cells(mask):
    found = torch.tensor(list(base64.b64decode(mask["cells"], validate=True)), dtype=torch.uint8)
    return found.view(mask["rows"], mask["columns"])


def window(model, **inputs):
    return run_node(
        LocalWindowAttention,
        model=model,
        **{"radius": 3, "min_tokens": 0, "temporal_radius": 0, "down_factor": 0, **inputs},
    )[0]


def held(model):
    """What the ledger keeps of every run, by feature."""
    return [sketches for *_, sketches in model.model_options["transformer_options"][LEDGER]._records]


def tensors(thing, found=None, seen=None):
    """The tensors that a function holds, through closures, tuples and objects."""
    found, seen = [] if found is None else found, set() if seen is None else seen
    if id(thing) in seen:
        return found
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        found.append(thing)
    elif isinstance(thing, dict):
        [tensors(x, found, seen) for x in thing.values()]
    elif isinstance(thing, tuple | list | set | frozenset):
        [tensors(x, found, seen) for x in thing]
    elif callable(thing) and hasattr(thing, "__code__"):
        [tensors(cell.cell_contents, found, seen) for cell in thing.__closure__ or ()]
        tensors(getattr(thing, "__self__", None), found, seen)
    elif hasattr(thing, "__dict__") and not isinstance(thing, type):
        tensors(vars(thing), found, seen)
    return found


@pytest.mark.parametrize("name", ["flux", "wan_meta", "sd3"])
def test_the_mask_of_the_last_served_call(name):
    model, spec = model_of(name)
    patched = window(model, dense_last_blocks=1, dense_last_steps=1)
    record = report(patched, Job(spec, steps=4, cfg=1.0)(patched))
    (feature,) = record["features"]
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    mask = feature["mask"]
    seen = []

    class Watching(LocalWindow):
        def attend(self, state, call):
            answer = super().attend(state, call)
            seen.append((call.forward.run.clock.step, call.block.number, call.layout))
            return answer

    again = plan(model, Watching(3), dense_blocks=(0, 1), dense_steps=(0, 1))
    Job(spec, steps=4, cfg=1.0)(again)
    step, block, layout = seen[-1]
    assert mask["caption"].startswith(f"Step {step + 1} of 4, block {block}, all heads alike.") and step == 2
    want = shades(LocalWindow(3).picture(layout).shares())
    assert torch.equal(cells(mask), want) and want.min() < 255 == want.max()


def test_each_node_has_its_own_and_methods_without_one_have_none():
    model, spec = model_of("flux")
    patched = window(model, blocks="1")
    patched = run_node(DiagonalAttention, model=patched, block=8, depth=1.0, blocks="2", min_tokens=0)[0]
    inputs = {"blocks": "3", "min_tokens": 0, "allow_untrained": True}
    accepted = {widget.id for widget in LinearAttention.GET_SCHEMA().inputs}
    patched = run_node(LinearAttention, model=patched, **{k: v for k, v in inputs.items() if k in accepted})[0]
    patched = plan(patched, Refuses(), blocks=frozenset({0}))
    features = {f["name"]: f for f in report(patched, Job(spec, steps=2, cfg=1.0)(patched))["features"]}
    assert features["Linear Attention"]["facts"]["served"] and "mask" not in features["Linear Attention"]
    assert "mask" not in features["Plan"]
    blocks = [
        features[name]["mask"]["caption"].split(",")[1] for name in ("Local Window Attention", "Diagonal Attention")
    ]
    assert blocks == [" block 1", " block 2"]


def test_nothing_is_drawn_or_kept_unless_a_report_asks():
    model, spec = model_of("flux")
    patched = window(model, blocks="0-1")
    patched = plan(patched, SparseLinear(0.4, block_q=16, block_k=8), blocks=frozenset({2, 3}))
    made = Job(spec, steps=2)(patched)
    assert not any("mask" in f for f in latest_record(patched, made)["features"])
    (sketches,) = held(patched)
    assert set(sketches) == {0, 1} and tensors(sketches[0]) == []
    (kept,) = tensors(sketches[1])
    assert kept.dtype == torch.uint8 and kept.nbytes <= 96 * 96 and kept.untyped_storage().nbytes() == kept.nbytes
    del kept
    record = report(patched, made)
    assert all("mask" in f for f in record["features"]) and held(patched) == [{}]
    assert report(patched, made)["features"] == record["features"]


class Counted:
    """Local windows whose pictures are counted."""

    def __init__(self, log):
        self.log, self.method = log, LocalWindow(3)

    def begin(self):
        return self.method.begin()

    def attend(self, state, call):
        answer = self.method.attend(state, call)

        def picture():
            self.log.append((call.forward.run.clock.evaluation, call.block.number))
            return Picture(torch.zeros(2, 2))

        return Answer(answer.out, answer.pairs, answer.dense_pairs, picture)


def test_one_block_is_asked_after_the_first_evaluation_and_results_stay():
    model, spec = model_of("flux")
    log = []
    patched = plan(model, Counted(log), blocks=frozenset({0, 2}))
    with_pictures = Job(spec, steps=3, cfg=1.0)(patched)
    assert log == [(0, 0), (0, 2), (1, 2), (2, 2)]
    bare = plan(model, LocalWindow(3), blocks=frozenset({0, 2}))
    assert torch.equal(with_pictures, Job(spec, steps=3, cfg=1.0)(bare))


def test_a_run_that_fails_draws_nothing_and_one_that_is_older_keeps_its_own():
    model, spec = model_of("flux")
    patched = window(model)
    first = Job(spec, steps=2)(patched)

    def fail(step):
        raise RuntimeError("lost the device")

    with pytest.raises(RuntimeError, match="lost the device"):
        Job(spec, steps=3, on_step=fail)(patched)
    assert [set(s) for s in held(patched)] == [{0}, set()]
    second = Job(spec, steps=4)(patched)
    captions = [report(patched, made)["features"][0]["mask"]["caption"] for made in (first, second)]
    assert [c.split(",")[0] for c in captions] == ["Step 2 of 2", "Step 4 of 4"]
