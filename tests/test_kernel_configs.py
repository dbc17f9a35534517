"""Launch parameters: which table serves a GPU, and what scripts/tune_kernels.py writes for the user."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tessera.kernels import _config

ROOT = Path(__file__).resolve().parents[1]
KEY = ("block_sparse", 16, 128)


@pytest.fixture(scope="module")
def tuner():
    spec = importlib.util.spec_from_file_location("tune_kernels", ROOT / "scripts" / "tune_kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", _config.tables())
def test_an_architecture_takes_its_own_entry(name):
    own = json.loads((ROOT / "kernels" / "configs" / f"{name}.json").read_text())[KEY[0]]["16"]
    assert _config.entry(KEY[0], name, 16, 128) == own["128"]
    assert _config.entry(KEY[0], name, 16, 65) == own[str(min(int(w) for w in own if int(w) >= 65))]


def test_family_then_default():
    assert _config.entry(KEY[0], "sm103", 16, 64) == _config.entry(KEY[0], "sm100", 16, 64)
    assert _config.entry(KEY[0], "sm75", 16, 64) == _config.entry(KEY[0], "default", 16, 64)
    with pytest.raises(KeyError, match="no entry of block_sparse for 16-bit inputs of width 512"):
        _config.entry(KEY[0], "sm90", 16, 512)


def test_forced_entries_are_seen_and_forgotten():
    x = torch.empty(1, dtype=torch.bfloat16)
    shipped = _config.lookup("block_sparse", x, 128)
    with _config.recorded() as keys, _config.forced({KEY: {"tile": [16, 16]}}):
        assert _config.lookup("block_sparse", x, 128) == {"tile": [16, 16]}
        assert _config.lookup("block_sparse", x, 64) != {"tile": [16, 16]}
    assert keys == {KEY, ("block_sparse", 16, 64)}
    assert _config.lookup("block_sparse", x, 128) == shipped
    with pytest.raises(RuntimeError), _config.forced({KEY: {}}):
        raise RuntimeError
    assert _config.lookup("block_sparse", x, 128) == shipped


def test_the_fastest_candidate_is_written_and_read(tuner, tmp_path):
    """A clock that reads the forced entry: 4 warps and 3 stages of the widest tile are the fastest."""
    best = max(
        tuner.candidates(_config, "block_sparse", 16), key=lambda e: (e["tile"], e["warps"] == 4, e["stages"] == 3)
    )
    x = torch.empty(1, dtype=torch.bfloat16)

    def clock(run):
        entry = run()
        if entry["tile"][0] == 32:
            raise MemoryError("out of resource: shared memory")
        return 1.0 if entry == best else 3.0

    chosen = tuner.tune(_config, [lambda: _config.lookup("block_sparse", x, 128)] * 2, KEY, clock)
    assert chosen == best
    path = tmp_path / "deep" / "gpu.json"
    tuner.write(path, _config.sources(), {"block_sparse": {"16": {"128": chosen}}}, _config.read_user_table(path))
    tuner.write(path, _config.sources(), {"pool": {"16": {"64": {"warps": 4}}}}, _config.read_user_table(path))
    held = _config.read_user_table(path)
    assert held["block_sparse"]["16"]["128"] == best and held["pool"]["16"]["64"] == {"warps": 4}
    assert [p.name for p in path.parent.iterdir()] == ["gpu.json"]


def test_an_entry_that_is_no_faster_is_not_written(tuner):
    x = torch.empty(1, dtype=torch.bfloat16)
    assert tuner.tune(_config, [lambda: _config.lookup("block_sparse", x, 128)], KEY, lambda run: 2.0) is None


def test_a_candidate_that_does_not_compile_is_passed_over(tuner):
    worst = tuner.candidates(_config, *KEY[:2])[0]
    x = torch.empty(1, dtype=torch.bfloat16)

    def clock(run):
        if run() == worst:
            raise RuntimeError("PassManager::run failed")
        return 1.0 if run()["warps"] == 4 else 2.0

    chosen = tuner.tune(_config, [lambda: _config.lookup("block_sparse", x, 128)], KEY, clock)
    assert chosen is None or (chosen != worst and chosen["warps"] == 4)


def test_a_failure_of_every_candidate_is_shown(tuner):
    calls = iter([1.0])

    def clock(run):
        try:
            return next(calls)
        except StopIteration:
            raise ValueError("wrong result") from None

    with pytest.raises(RuntimeError, match="No candidate of block_sparse runs .* wrong result"):
        tuner.tune(_config, [dict], KEY, clock)


@pytest.mark.parametrize("text", ["", "{", json.dumps({"sources": "of yesterday", "entries": {"a": {}}})])
def test_a_damaged_or_outdated_user_table_is_ignored(tmp_path, text):
    path = tmp_path / "gpu.json"
    path.write_text(text)
    assert _config.read_user_table(path) == {} == _config.read_user_table(tmp_path / "none.json")


def test_every_example_can_be_tuned(tuner):
    """The work that the script times runs forward, and backward where a kernel has one."""
    stems = set()
    for stem, run in tuner.runs([48], "cpu", torch.float32):
        assert torch.isfinite(torch.as_tensor(run()).float()).all(), stem
        stems.add(stem)
    assert {"block_sparse", "forecast"} <= stems


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_attention_is_tuned_for_every_head_size_asked_for(tuner):
    """The tables are read at exact widths: a size that is not measured keeps its shipped entry."""
    found = {}
    for stem, run in tuner.runs([64], "cpu", torch.float32, (32, 40)):
        found.setdefault(stem, []).append(run)
    assert len(found["block_sparse"]) == len(found["hierarchical_sparse"]) == len(found["linear_attention"]) == 3
    assert len(found["norm_modulate"]) == 1
    shapes = [run().shape[-1] for run in found["block_sparse"]]
    assert shapes[1:] == [32, 40] and shapes[0] not in (32, 40)


def test_without_a_gpu_the_script_says_so():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "scripts" / "tune_kernels.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "nothing to tune" in done.stderr
