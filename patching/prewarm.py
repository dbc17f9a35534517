"""Compiles the kernels of an attention node in the background while the text encoder works, so that the first step does
not stall. A child process does it, without a GPU context: it never competes for memory. Nothing depends on it."""

import json
import logging
import os
import subprocess
import sys
import threading
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from ..kernels import _config
from ..kernels._triton import triton
from .sizes import compute_dtype, heads_of

log = logging.getLogger("tessera")
ROOT = Path(__file__).resolve().parents[1]
_CHILD = """
import importlib, importlib.util, json, sys
spec = importlib.util.spec_from_file_location("tessera", sys.argv[1] + "/__init__.py", submodule_search_locations=[sys.argv[1]])
sys.modules["tessera"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["tessera"])
importlib.import_module("tessera.methods.attention.rehearsal").main(json.loads(sys.argv[2]))
"""
_started: set[str] = set()  # jobs of this process; Triton's cache on disk keeps what they make


def start(method: Any, model: Any) -> subprocess.Popen | None:
    """Starts the child for this method on this MODEL's GPU. None where there is nothing to compile, or it was started
    before. TESSERA_PREWARM=0 turns it off."""
    device = model.load_device
    if device.type != "cuda" or not hasattr(triton, "__version__") or os.environ.get("TESSERA_PREWARM") == "0":
        return None
    try:
        return launch(job_of(method, model, target_of(device), _config.architecture(device)))
    except Exception as error:  # whatever a driver or the system says: the first step compiles then
        log.info("The kernels of %s will be compiled when they are first used: %s", type(method).__name__, error)
        return None


def target_of(device: torch.device) -> tuple[str, int | str, int]:
    """(backend, architecture, threads of a warp), as Triton names a GPU."""
    name = _config.architecture(device)
    properties = torch.cuda.get_device_properties(device)
    return ("cuda", int(name[2:]), 32) if name.startswith("sm") else ("hip", name, properties.warp_size)


def job_of(method: Any, model: Any, target: tuple[str, int | str, int], table: str) -> dict[str, Any] | None:
    """What the child is told; None for a method whose settings are no plain numbers and words."""
    heads, head_dim = heads_of(model.get_model_object("diffusion_model"))
    dtype = compute_dtype(model)
    dtype = dtype if dtype.itemsize > 1 else torch.bfloat16  # attention never runs in the dtype of fp8 weights
    job = {
        "module": type(method).__module__.split(".", __package__.count("."))[-1],
        "name": type(method).__name__,
        "settings": {f.name: getattr(method, f.name) for f in fields(method)} if is_dataclass(method) else None,
        "heads": heads, "kv_heads": heads, "head_dim": head_dim, "dtype": str(dtype)[6:],
        "target": target, "table": table,
    }  # fmt: skip
    try:
        json.dumps(job)
    except TypeError:
        return None
    return job if job["settings"] is not None else None


def launch(job: dict[str, Any] | None) -> subprocess.Popen | None:
    """The child for this job, once in this process."""
    key = json.dumps(job, sort_keys=True)
    if job is None or key in _started:
        return None
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", _CHILD, str(ROOT), json.dumps(job)]
    child = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    _started.add(key)
    threading.Thread(target=_report, args=(child, job["name"]), daemon=True, name="tessera-prewarm").start()
    return child


def _report(child: subprocess.Popen, name: str) -> None:
    out, err = child.communicate()
    if child.returncode:
        log.info("The kernels of %s will be compiled when they are first used: %s", name, err.strip()[-300:])
    else:
        log.debug("Kernels of %s are ready: %s", name, out.strip())
