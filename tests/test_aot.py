"""Every Triton kernel compiles for the GPUs that the pack serves, without register spills and within their shared
memory. TESSERA_AOT=all takes every head size and dtype, else the small set of bench/aot.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
AOT = [sys.executable, str(ROOT / "bench" / "aot.py")]
TARGETS = {"sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx942"}


def run(*arguments, **settings):
    """bench/aot.py in its own process: there Triton must not be the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | settings
    return subprocess.run([*AOT, *arguments], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    path = tmp_path_factory.mktemp("aot") / "aot.json"
    done = run("--json", str(path), "--jobs", "2")
    assert path.exists(), done.stderr[-2000:]
    return done, json.loads(path.read_text())


def test_no_compilation_is_refused(compiled):
    done, rows = compiled
    assert [row for row in rows if row["error"]] == [] and done.returncode == 0


def test_the_set_of_every_run_stays_small(compiled):
    assert len(compiled[1]) <= 450


def test_every_kernel_file_takes_part_on_every_gpu(compiled):
    """A @triton.jit function that is launched has a spec; device functions are inlined into those."""
    launched = set()
    for path in (ROOT / "kernels").rglob("*.py"):
        launched |= {
            line.split("[")[0].split()[-1] for line in path.read_text().splitlines() if "[(" in line and "](" in line
        }
    assert launched and launched <= {row["kernel"] for row in compiled[1]}
    for kernel in launched:
        assert {row["target"] for row in compiled[1] if row["kernel"] == kernel} == TARGETS


def test_hopper_keeps_its_matrix_instructions(compiled):
    rows = [row for row in compiled[1] if (row["kernel"], row["target"]) == ("block_sparse_forward", "sm90")]
    assert len(rows) >= 2 and all(row["instructions"]["HGMMA"] and row["instructions"]["LDGSTS"] for row in rows)


def test_spills_are_refused():
    """The gate itself: a tile that cannot fit into registers must not pass."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'bench')!r}); import aot; aot.load_pack(); "
        "from tessera.kernels import _config; "
        "real = _config.entry; wide = {'tile': [128, 64], 'warps': 4, 'stages': 2}; "
        "_config.entry = lambda name, *rest: wide if name == 'block_sparse' else real(name, *rest); "
        "sys.argv = ['aot', '--targets', 'sm80', '--only', 'block_sparse_forward d128', '--jobs', '1']; "
        "sys.exit(aot.main())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "REFUSED spills" in done.stdout, done.stderr[-2000:]


def test_an_empty_kernel_is_refused():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'bench')!r}); import aot; "
        "row = {'target': 'sm100', 'spills': 0, 'shared': 0, 'instructions': {}}; "
        "print(*(repr(aot._refusal(row | {'registers': n}, None)) for n in (4, 16)), sep=chr(10))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["'takes 4 registers: the compiler has dropped its work'", "''"], done.stderr


def test_interpreter_is_refused():
    done = run(TRITON_INTERPRET="1")
    assert done.returncode == 2 and "Unset TRITON_INTERPRET" in done.stderr
