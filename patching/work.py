"""What an attention plan saves: arithmetic, from sizes alone, and time, from one call of a run that is timed both ways.
Time only advises: nothing is chosen by it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import archs

TIMED_CALL = 2  # of the served calls of a run; the first ones make lists and compile kernels


@dataclass
class Work:
    flops: float = 0.0  # of the blocks, linear layers and dense attention, in the calls that were offered to the plan
    saved: float = 0.0  # what the plan left out of them
    served: int = 0
    started: float = field(default_factory=time.perf_counter)  # of the run
    milliseconds: tuple[float, float] | None = None  # of one attention call: the plan's, dense
    _weights: dict[int, float] = field(default_factory=dict)

    def offered(self, call: Any) -> None:
        """Counts the block around this call as it would be without the plan."""
        (batch, heads, queries, width), keys = call.q.shape, call.k.shape[2]
        block = call.block
        if block.number not in self._weights:
            _, module = archs.block_modules(call.forward.diffusion_model, block.spec)[block.index]
            self._weights[block.number] = weights_a_token(module, len(block.spec.streams))
        self.flops += 2 * self._weights[block.number] * batch * queries + 4 * width * batch * heads * queries * keys

    def spared(self, call: Any, answer: Any) -> None:
        self.saved += 4 * call.q.shape[3] * (answer.dense_pairs - answer.pairs)

    def timed(
        self, ours: Callable[[], Any], dense: Callable[[], Any], device: torch.device, typical: bool = True
    ) -> Any:
        """ours(). In one typical call of the run dense() is computed too, to know what it would have cost."""
        if self.served < TIMED_CALL or self.milliseconds is not None or not typical:
            answer = ours()
        else:
            took, answer = clocked(ours, device)
            self.milliseconds = took, clocked(dense, device)[0]
        self.served += 1
        return answer

    def facts(self) -> dict[str, Any]:
        share = self.saved / self.flops if self.flops else 0.0
        told: dict[str, Any] = {"flops_saved": round(share, 6)}
        if 0 < share < 1:  # the run went through the rest of the FLOPs in the time that it took
            told["seconds_saved"] = round((time.perf_counter() - self.started) * share / (1 - share), 3)
        if self.milliseconds is not None:
            told["call_ms"], told["dense_call_ms"] = (round(x, 4) for x in self.milliseconds)
        return told


def saving(facts: dict[str, Any]) -> str:
    """Words for what was saved: a share of the FLOPs, and the time that they stand for."""
    seconds = facts.get("seconds_saved", 0.0)
    time_told = f", some {seconds:.1f} s if time goes with them" if seconds >= 0.05 else ""
    return f"{facts['flops_saved']:.1%} of the blocks' FLOPs saved{time_told}"


def advice(facts: dict[str, Any]) -> str:
    """A few words where dense attention was the faster one, else nothing."""
    ours, dense = facts.get("call_ms"), facts.get("dense_call_ms")
    if ours is None or dense is None or ours <= dense:
        return ""
    return f"dense was faster here ({dense:.3g} ms a call against {ours:.3g}): raise min_tokens, or the sparsity"


def clocked(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """(milliseconds, result); waits for the GPU before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda *_: None
    wait()
    start = time.perf_counter()
    result = run()
    wait()
    return 1000 * (time.perf_counter() - start), result


def weights_a_token(block: torch.nn.Module, streams: int) -> float:
    """Weights of linear layers that one token meets in a block; streams with layers of their own share them out."""
    found = 0
    for module in block.modules():
        inner, outer = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if isinstance(inner, int) and isinstance(outer, int):
            found += inner * outer
    return found / max(1, streams)
