"""The guard over kernels under test sees what it is there for."""

import os

import pytest
import torch

from tessera.kernels._triton import tl, triton

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the interpreter")


@triton.jit
def copy_kernel(X, Y, LOADED, STORED, STEP, BLOCK: tl.constexpr):
    i = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < LOADED, other=0.0)
    tl.store(Y + i, x, mask=i < STORED)


def test_masks_that_fit_pass():
    x, y = torch.randn(21), torch.zeros(21)
    copy_kernel[(2,)](x, y, 21, 21, 16, BLOCK=16)
    assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("loaded", "stored", "step", "words"),
    [(22, 21, 16, "load leaves"), (21, 22, 16, "store leaves"), (21, 21, 15, "same place")],
)
def test_masks_that_do_not_fit_are_refused(loaded, stored, step, words):
    x, y = torch.randn(21), torch.zeros(21)
    with pytest.raises(Exception, match=words):
        copy_kernel[(2,)](x, y, loaded, stored, step, BLOCK=16)
