"""LTX Realtime Schedule: equal to core's LTXVScheduler, and the distilled models' lists."""

import pytest
import torch
from nodes_helper import run_node

from comfy_extras.nodes_lt import LTXVScheduler  # isort: skip

from tessera.nodes.sampling.ltx_realtime_schedule import LtxRealtimeSchedule


def latent(tokens):
    return {"samples": torch.zeros(1, 128, tokens // 64, 8, 8)}


@pytest.mark.parametrize("tokens", [1024, 4096, 9600])
@pytest.mark.parametrize(("steps", "terminal"), [(40, 0.1), (20, 0.1), (8, 0.3), (2, 0.05)])
def test_equal_to_cores_scheduler(tokens, steps, terminal):
    want = LTXVScheduler.execute(steps, 2.05, 0.95, True, terminal, latent(tokens)).args[0]
    got = run_node(LtxRealtimeSchedule, preset="dev40", steps=steps, terminal=terminal, latent=latent(tokens))[0]
    assert torch.allclose(got, want, atol=2e-6) and float(got[-2]) == pytest.approx(terminal, abs=1e-6)
    assert abs(got[0] - 1) < 1e-6 and got[-1] == 0 and (got.diff() < 0).all() and len(got) == steps + 1


def test_without_a_latent_and_without_a_stretch():
    want = LTXVScheduler.execute(10, 2.05, 0.95, False, 0.1, None).args[0]
    got = run_node(LtxRealtimeSchedule, preset="dev40", steps=10, terminal=0.0)[0]
    assert torch.allclose(got, want, atol=2e-6)
    assert run_node(LtxRealtimeSchedule, preset="dev40", steps=1)[0].tolist() == pytest.approx([1.0, 0.0])


def test_the_two_passes_meet():
    first, second = (run_node(LtxRealtimeSchedule, preset=f"distilled_pass{i}")[0] for i in (1, 2))
    assert len(first) == 8 and len(second) == 4 and first[0] == 1 and first[-1] == second[-1] == 0
    assert first.tolist()[5:7] == second.tolist()[:2] == pytest.approx([0.9094, 0.725], abs=1e-4)
    again = run_node(LtxRealtimeSchedule, preset="distilled_pass1", steps=3, terminal=0.5, latent=latent(1024))[0]
    assert torch.equal(first, again)


def test_video_with_sound_counts_the_video():
    from comfy.nested_tensor import NestedTensor

    both = {"samples": NestedTensor((latent(1024)["samples"], torch.zeros(1, 8, 50, 16)))}
    got = run_node(LtxRealtimeSchedule, preset="dev40", latent=both)[0]
    assert torch.equal(got, run_node(LtxRealtimeSchedule, preset="dev40", latent=latent(1024))[0])
