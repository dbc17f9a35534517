"""When a ControlNet's residuals allow a forecast to go on, and what Taylor Cache does when they do not."""

import pytest
import torch
from comfy.controlnet import ControlBase
from nodes_helper import Job, conds, kinds, model_of, taylor

from tessera.methods.cache.control import control_of


def residuals(size: float, *missing: int):
    return {"input": [None if i in missing else torch.full((1, 2), size) for i in range(3)], "output": []}


@pytest.mark.parametrize(
    ("before", "now", "goes_on"),
    [
        (None, None, True),
        ({}, None, True),
        (residuals(1.0), residuals(1.0), True),
        (residuals(1.0), residuals(1.2), True),
        (residuals(1.0), residuals(-1.0), False),
        (residuals(0.0), residuals(0.0), True),
        (residuals(1.0), None, False),
        (None, residuals(1.0), False),
        (residuals(1.0), residuals(1.0, 1), False),
        (residuals(1.0), residuals(0.5), False),
        (residuals(0.5), residuals(1.0), False),
        (residuals(1.0), residuals(float("nan")), False),
    ],
)
def test_like(before, now, goes_on):
    assert control_of(before).like(control_of(now)) == goes_on


def test_one_of_two_chained_controls_that_ends_is_seen():
    """At a fraction of the other's strength; a drift of a tenth is no end."""
    a, b = torch.randn(2, 1, 400)
    for strength in (1.0, 0.7, 0.5):
        both, alone = ({"input": [None, x], "output": []} for x in (a + strength * b, a))
        assert not control_of(both).like(control_of(alone))
    assert control_of({"input": [a]}).like(control_of({"input": [a + 0.1 * b]}))
    assert not control_of({"input": [a, b, b]}).like(control_of({"input": [a, b, 16 * b]}))


class Control(ControlBase):
    """Residuals of a size that depends on sigma; 0 is no control at all."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        size = self.size(float(t.flatten()[0]))
        return {"input": [torch.full((x_noisy.shape[0], 1, 1), size)], "output": []} if size else None


def run(control, level, **inputs):
    model, spec = model_of("flux")
    positive, negative = ([[c, {**extra, "control": control}]] for ((c, extra),) in conds(spec))
    patched = taylor(model, level=level, interval=4, warmup=2, **inputs)
    Job(spec, steps=10, positive=positive, negative=negative)(patched)
    return kinds(patched)


@pytest.mark.parametrize("level", ["last_block", "output"])
def test_a_control_that_ends_starts_or_jumps_is_computed(level):
    steady = run(Control(lambda s: 0.5), level)
    assert steady == "ffpppfpppf"
    assert run(Control(lambda s: 0.5 + 0.1 * s), level) == steady
    for change in (lambda s: 0.5 * (s > 0.6), lambda s: 0.5 * (s < 0.6), lambda s: 0.5 if s > 0.6 else 2.0):
        found = run(Control(change), level)
        assert found != steady and found.count("f") == steady.count("f") + 1


@pytest.mark.parametrize("level", ["last_block", "output"])
def test_without_cache_with_control_everything_is_computed(level):
    assert run(Control(lambda s: 0.5), level, cache_with_control=False) == "f" * 10
    assert run(Control(lambda s: 0.0), level, cache_with_control=False) == "ffpppfpppf"
