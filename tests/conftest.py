"""Loads the pack as `tessera`, whatever the checkout folder is called, and keeps it off sys.path."""

import gc
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bootstrap"))
from pack import comfyui_path, load_pack, use_comfyui

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must precede the first `import triton`, torch does not import it
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the servers that they start
    torch.set_num_threads(1)  # workers share the cores; spinning threads of tiny models would double the time
load_pack()
sys.path.insert(0, str(ROOT / "tests"))
if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.repair()
    interpreter.guard()


def pytest_collection_modifyitems(items):
    """What needs a GPU is skipped, and listed, where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    """The same random numbers for each test, and torch.empty full of NaN: what a kernel forgets to write shows."""
    torch.manual_seed(0)
    torch.set_deterministic_debug_mode("warn")  # as use_deterministic_algorithms, which imports the compiler: 3 s
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def error():
    """Root mean square of the difference over that of what is wanted. NaN anywhere gives NaN, which passes no bound."""
    return lambda got, want: ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12)).item()


@pytest.fixture(scope="session")
def host():
    """`comfy` importable on the best device of this machine."""
    if not (comfyui_path() / "comfy").is_dir():
        pytest.fail(f"ComfyUI is not at {comfyui_path()}: run `make setup` or set COMFYUI_PATH.")
    use_comfyui()
    return comfyui_path()


@pytest.fixture(scope="module", autouse=True)
def small_heap():
    """What earlier files left alive, models in caches above all, is not walked again at each of ComfyUI's collections."""
    gc.collect()
    gc.freeze()
