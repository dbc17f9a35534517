"""What the canvas hears of a run while it lasts, and what is kept of it: one event an evaluation, few a second, to the
page that queued, and nothing of it outlives the run but numbers."""

import gc
import json
import weakref
from types import SimpleNamespace

import comfy.model_management
import pytest
import torch
from nodes_helper import NODE_ID, Job, facts, model_of, run_node, taylor, watching
from torch.utils._python_dispatch import TorchDispatchMode

from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.patching import history, live, report, timeline
from tessera.patching import run as runs
from tessera.patching.clock import Clock
from tessera.patching.remedies import AS_SET, NOTHING, remedy


class Server:
    client_id, last_node_id = "page", "3"

    def __init__(self):
        self.heard = []

    def send_sync(self, event, data, sid=None):
        self.heard.append((event, json.loads(json.dumps(data, allow_nan=False)), sid))

    def steps(self):
        return [data for event, data, _ in self.heard if event == live.STEP]

    def run(self):
        (record,) = [data for event, data, _ in self.heard if event == report.EVENT]
        return record


def stop(error, at: int):
    """on_step that raises at a step."""

    def on_step(step):
        if step == at:
            raise error

    return on_step


@pytest.fixture
def server(monkeypatch):
    made = Server()
    monkeypatch.setattr(report.PromptServer, "instance", made, raising=False)
    monkeypatch.setattr(report, "HISTORY", history.History())
    return made


@pytest.fixture
def unhurried(monkeypatch):
    """Every step is told, however fast they are."""
    monkeypatch.setattr(live, "A_SECOND", 1000)


def columns(steps):
    """The page's columns after these events."""
    kept = []
    for step in steps:
        told = step["timeline"]
        kept[told["from"] :] = told["columns"]
    return kept


def test_one_event_an_evaluation_grows_the_whole(server, unhurried):
    model, spec = model_of("flux")
    patched = taylor(model)
    with watching(model) as watch:
        Job(spec, sampler="heun", steps=5)(patched)
    begin, *steps = server.steps()
    record = server.run()
    assert {sid for *_, sid in server.heard} == {"page"} and {s["run"] for s in server.steps()} == {record["run"]}
    assert begin["features"] == [{"name": "Taylor Cache", "node": NODE_ID}] and begin["timeline"]["columns"] == []
    assert len(steps) == record["evaluations"] == record["expected"] == 9
    assert [len(columns(steps[: i + 1])) for i in range(9)] == list(range(1, 10))
    assert all(step["timeline"]["columns"][-1][3] is None for step in steps)  # it goes on
    whole = record["timeline"]["columns"]
    assert columns(steps)[:-1] == whole[:-1] and record["sampler_node"] == "3"
    decisions = facts(patched)["decisions"]
    assert [(step, kind) for step, _, kind, _ in whole] == [(d["step"], d["kind"]) for d in decisions]
    assert {kind for *_, kind, _ in whole} == {"full", "forecast"}
    assert sum(seconds for *_, seconds in whole) == pytest.approx(record["sampling"], abs=0.05) and whole[-1][3] > 0
    words = record["timeline"]["blocks"]
    count = facts(patched)["blocks_computed"] + facts(patched)["blocks_skipped"]
    assert sum(word.count("c") for word in words) == watch.blocks and sum(map(len, words)) == count
    for (*_, kind, _), word in zip(whole, words, strict=True):
        assert word == ("c" * len(word) if kind == "full" else "p" * (len(word) - 1) + "f")


def pretended(steps: int):
    """A run whose evaluations are asked for, one a step, by whoever holds it."""
    sigmas = [1 - i / steps for i in range(steps + 1)]
    run = runs.Run((), Clock(sigmas), SimpleNamespace(diffusion_model=None), {}, None)
    run.live.begin(run)
    return run


def test_at_most_ten_events_a_second(server):
    run = pretended(60)
    for sigma in run.clock.sigmas[:30]:
        run.evaluate(sigma)
    assert len(server.steps()) == 1 + live.A_SECOND
    run.live.sent = type(run.live.sent)((t - 1 for t in run.live.sent), maxlen=live.A_SECOND)  # a second later
    for sigma in run.clock.sigmas[30:60]:
        run.evaluate(sigma)
    steps = server.steps()[1:]
    assert len(steps) == 2 * live.A_SECOND and len(columns(steps)) == 30 + live.A_SECOND
    assert len(run.timeline.columns) == 60


@pytest.mark.parametrize("level", ["block_residual", "module"])
def test_caches_of_every_block_fill_every_block(server, level):
    model, spec = model_of("flux")
    Job(spec)(taylor(model, level=level))
    told = server.run()["timeline"]
    for (*_, kind, _), word in zip(told["columns"], told["blocks"], strict=True):
        assert set(word) == {"c" if kind == "full" else "f"}


def test_sparse_attention_tells_pairs_by_block_and_keeps_its_mask(server):
    model, spec = model_of("flux")
    latent = torch.zeros(1, 16, 32, 32)
    patched = run_node(LocalWindowAttention, model=model, radius=4, min_tokens=0, blocks="1", dense_first_steps=1)[0]
    Job(spec, steps=3, cfg=1.0, latent=latent)(patched)
    (feature,) = server.run()["features"]
    assert feature["by_block"][0] == "" and all(w[0] == "." and w[1].isdigit() for w in feature["by_block"][1:])
    assert {d["why"]: d["remedy"] for d in feature["declined"]} == {
        "outside the chosen blocks": AS_SET, "outside the chosen steps": AS_SET}  # fmt: skip
    assert sum(d["count"] for d in feature["declined"]) == sum(feature["facts"]["declined"].values())
    assert feature["mask_kept"] and "mask" not in feature
    run = server.run()["run"]
    drawn = report.HISTORY.masks("page", run)
    assert drawn["0"]["rows"] > 1 and report.HISTORY.masks("other", run) == {}


@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException(), RuntimeError("broken")])
def test_a_run_that_stops_says_so_and_leaves_nothing(server, unhurried, monkeypatch, error):
    kept = []
    evaluate = runs.Run.evaluate
    monkeypatch.setattr(runs.Run, "evaluate", lambda run, s: (kept.append(weakref.ref(run.timeline)), evaluate(run, s)))
    model, spec = model_of("flux")
    patched = taylor(model)
    with pytest.raises(type(error)):
        Job(spec, on_step=stop(error, 2))(patched)
    record = server.run()
    assert record["ended"] == ("error" if isinstance(error, RuntimeError) else "interrupted")
    assert len(record["timeline"]["columns"]) == record["evaluations"] < record["steps"]
    error.__traceback__ = None
    gc.collect()
    assert kept and all(ref() is None for ref in kept)


def test_publishing_touches_no_tensor(server, unhurried):
    """What waits for a GPU is an operation on a tensor."""

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            raise AssertionError(f"publishing called {function}")

    model, spec = model_of("flux")
    step, told = live.Live.step, []

    def watched(self, run):
        with Refuse():
            step(self, run)
        told.append(self.broken)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live.Live, "step", watched)
        Job(spec)(taylor(model))
    assert told == [False] * 8 and len(server.steps()) == 9


def test_errors_in_publishing_do_not_hurt_the_run(server, monkeypatch, caplog):
    model, spec = model_of("flux")
    patched = taylor(model)
    want = Job(spec)(patched)
    monkeypatch.setattr(live.Live, "head", lambda self, run: 1 / 0)
    assert torch.equal(Job(spec)(patched), want)
    assert caplog.text.count("cannot be told of the steps") == 1


def test_nobody_hears_of_a_prompt_without_a_page(server):
    server.client_id = None
    model, spec = model_of("flux")
    Job(spec)(taylor(model))
    assert server.heard == []


def test_the_history_is_bounded():
    kept = history.History()
    for client in range(history.CLIENTS + 3):
        for number in range(history.RUNS + 5):
            kept.add(str(client), {"run": f"{client}-{number}"}, {})
    assert kept.runs("0") == [] and kept.runs("unknown") == []
    newest = kept.runs(str(history.CLIENTS + 2))
    assert len(newest) == history.RUNS and newest[-1]["run"].endswith(f"-{history.RUNS + 4}")
    assert len(kept._clients) == history.CLIENTS


def test_long_runs_are_cut(server, monkeypatch):
    monkeypatch.setattr(timeline, "MOST", 20)
    run = pretended(25)
    for sigma in run.clock.sigmas[:-1]:
        run.evaluate(sigma)
    run.timeline.block(20, SimpleNamespace(number=0, count=2), timeline.COMPUTED)
    told = run.timeline.told()
    assert (len(told["columns"]), told["missed"], told["blocks"]) == (20, 5, [])


def test_every_reason_to_decline_has_a_remedy():
    """Those written in the attention methods and in the dispatcher."""
    import ast
    from pathlib import Path

    root = Path(report.__file__).parents[1]
    reasons = {"fewer than 4096 image tokens", "the window spans the picture"}
    for path in [*(root / "methods" / "attention").glob("*.py"), root / "patching" / "attention.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            raised = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Decline"
            returned = isinstance(node, ast.Return) and path.parent.name == "patching"
            value = node.args[0] if raised and node.args else node.value if returned else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str) and value.value:
                reasons.add(value.value)
    measuring = {"not a captured step", "this block's calls have heads of several sizes"}
    assert len(reasons) > 15
    assert [r for r in sorted(reasons - measuring) if not remedy(r)] == []
    assert remedy("something new") == "" and remedy("the model asks for exact attention") == NOTHING
