"""What the bench compares is the same layer."""

import sys
from pathlib import Path

import pytest
import torch

from tessera.kernels.quant import quantize_rows, rotate, scaled_linear
from tessera.kernels.quant.packed_linear import FUSED, SCRATCH

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCH))
    import quantized
    import rivals

    yield quantized, rivals
    sys.path.remove(str(BENCH))


@pytest.mark.parametrize(("codec", "mode"), [("table4", FUSED), ("q4_k", SCRATCH), ("q6_k", FUSED), ("q8_0", FUSED)])
def test_packed_layers(bench, codec, mode, error):
    case = bench[0].packed_case(bench[0].weight(codec, 24, 512, "cpu"), 5, mode, torch.bfloat16, False)
    want = case.truth()
    assert error(case.ours(), want) < case.tolerance and want.norm() > 1
    assert all(error(run(), want) < case.tolerance for run in case.rivals.values())


@pytest.mark.parametrize("format", ["int8", "fp8_e4m3"])
def test_eight_bit_layers(bench, format, error):
    case = bench[0].eight_bit_case(torch.randn(32, 512), torch.randn(64, 512) / 20, format)
    want = case.truth()
    assert error(case.ours(), want) < case.tolerance and error(case.rivals["16-bit linear"](), want) < 0.05
    pytest.importorskip("comfy_kitchen")
    for name in set(case.same) - {"torch._scaled_mm"}:  # which has no rowwise scales on a CPU
        assert error(case.rivals[name](), want) < case.tolerance


def test_rivals_of_the_kernels(bench, error):
    for module in (rotate, quantize_rows, scaled_linear):
        stem = module.__name__.rsplit(".", 1)[1]
        inputs = module.example(3, "cpu", torch.float32)
        found = getattr(bench[1], stem)(inputs, "cpu")
        want = module.reference(*inputs)
        assert found.runs and not found.left_out
        for name, run in found.runs.items():
            got = run()
            pair = (got[0], want[0]) if isinstance(want, tuple) else (got, want)
            assert error(*pair) < 0.02, name
