"""The child that compiles for the user's GPU while the graph is still loading; here for GPUs that are not there."""

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from nodes_helper import tiny
from tiny_models import sample

from tessera.methods.attention.local_window import LocalWindow
from tessera.patching import prewarm

HOPPER = ("cuda", 90, 32)


@dataclass(frozen=True)
class Trained:
    weights: torch.Tensor


def job(host, **changes):
    return prewarm.job_of(LocalWindow(radius=5), tiny("wan")[0], HOPPER, "sm90") | changes


def test_kernels_are_in_the_cache_and_found_there(host, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    first = prewarm.launch(job(host, dtype="bfloat16", head_dim=64, heads=2, kv_heads=2))
    assert first.wait() == 0
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")}
    assert len(made) == 1 and next(iter(made)).name == "block_sparse_forward.cubin"
    again = prewarm.launch(
        job(host, dtype="bfloat16", head_dim=64, heads=3, kv_heads=3)
    )  # heads are no part of a compilation
    assert again.wait() == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")} == made


def test_a_job_is_started_once(host, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(prewarm, "_CHILD", "pass")
    assert prewarm.launch(job(host, heads=5)).wait() == 0
    assert prewarm.launch(job(host, heads=5)) is None


def test_a_child_that_fails_disturbs_nobody(host):
    child = prewarm.launch(job(host, head_dim=-1))
    assert child.wait() != 0


def test_nothing_is_started_on_a_cpu(host):
    assert prewarm.start(LocalWindow(), tiny("flux")[0]) is None


def test_methods_with_weights_are_left_out(host):
    assert prewarm.job_of(Trained(torch.ones(1)), tiny("flux")[0], HOPPER, "sm90") is None


@pytest.mark.parametrize("name", ["flux", "wan", "sd3", "ltxv", "lumina2", "qwen_image", "hunyuan_video"])
def test_the_size_of_a_head_is_read_from_the_model(host, name):
    """Against what the attention calls of the model really get."""
    model, spec = tiny(name)
    model, seen = model.clone(), set()

    def spy(func, *args, **kwargs):
        q, heads = args[0], kwargs.get("heads") or args[3]
        seen.add((heads, q.shape[-1] if kwargs.get("skip_reshape") else q.shape[-1] // heads))
        return func(*args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = spy
    sample(model, spec, steps=1)
    assert prewarm.heads_of(model.model.diffusion_model) in seen


def test_the_child_touches_no_gpu_and_no_comfyui(host, tmp_path):
    """It must not compete for memory with the run that it prepares."""
    told = json.dumps(job(host, dtype="bfloat16"))
    code = prewarm._CHILD + "\nassert not any(m.split('.')[0] == 'comfy' for m in sys.modules), 'comfy was imported'"
    code += "\nimport torch; assert not torch.cuda.is_initialized()"
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, str(prewarm.ROOT), told]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]


@pytest.mark.parametrize("error", [OSError(12, "no memory"), RuntimeError("CUDA error: invalid device ordinal")])
def test_nothing_of_it_stops_a_node(host, monkeypatch, error):
    def fail(*_):
        raise error

    class Away:
        load_device = torch.device("cuda", 9)

    monkeypatch.setattr(prewarm._config, "architecture", fail)
    assert prewarm.start(LocalWindow(), Away()) is None
