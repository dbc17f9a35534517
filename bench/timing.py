"""Competitors timed in one process, in turns, so that a clock that drifts or a busy machine hits all of them alike."""

import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

SECONDS = 1.0  # that each competitor runs, about
FEWEST, MOST = 5, 200  # rounds


def machine(device: str) -> str:
    """The processor in words, with the threads that torch uses on a CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def timed(run: Callable[[], object], device: str, flush: torch.Tensor | None) -> float:
    """Milliseconds of one call."""
    if flush is not None:
        flush.zero_()
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    before = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - before)


def rounds(runs: dict[str, Callable[[], object]], device: str, flush_cache: bool) -> dict[str, list[float]]:
    """Milliseconds of each competitor, round by round, after warm-up. flush_cache: memory-bound kernels on a GPU find
    their inputs outside the cache, as in a model."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device) if flush_cache and device == "cuda" else None
    slowest = 0.0
    for _ in range(3 if device == "cuda" else 1):  # the first call compiles, the last one is the estimate
        slowest = max(timed(run, device, flush) for run in runs.values())
    count = min(MOST, max(FEWEST, int(1000 * SECONDS / max(slowest, 1e-3))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(count):
        for name, run in runs.items():
            times[name].append(timed(run, device, flush))
    return times


def summary(times: dict[str, list[float]], ours: str) -> dict[str, dict[str, float]]:
    """Per competitor: median, 20th, 80th percentile in ms, and how many times faster ours is (median over rounds)."""
    found = {}
    for name, values in times.items():
        cuts = statistics.quantiles(values, n=5)
        ratio = statistics.median(other / own for other, own in zip(values, times[ours], strict=True))
        found[name] = {"ms": statistics.median(values), "p20": cuts[0], "p80": cuts[3], "speedup_of_ours": ratio}
    return found
