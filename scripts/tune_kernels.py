"""Measures launch parameters on this machine's GPU and keeps the fastest in your own table, which the nodes then use:

    python scripts/tune_kernels.py [operation ...] [--tokens 4608,16896] [--dtype bfloat16] [--seconds 0.2]

Nothing is tuned while you sample: this script is the only thing that writes the table ($TESSERA_TABLES or
~/.tessera/tables, one file a GPU and Triton version). Measurements of other kernel sources than yours are ignored."""

import argparse
import importlib
import importlib.util
import itertools
import json
import os
import pkgutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
WARPS, STAGES = (4, 8), (1, 2, 3, 4)
Entry = dict[str, Any]


def load_pack():
    """The pack as `tessera`, whatever its folder is called; none of ComfyUI is needed."""
    if "tessera" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "tessera", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        assert spec and spec.loader
        sys.modules["tessera"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["tessera"])
    return sys.modules["tessera"]


def runs(tokens: list[int], device: str, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(stem, one forward and, where there is one, backward pass) of every kernel with an example, for every size."""
    load_pack()
    for found in pkgutil.walk_packages([str(ROOT / "kernels")], "tessera.kernels."):
        module, stem = importlib.import_module(found.name), found.name.rsplit(".", 1)[1]
        if hasattr(module, "example"):
            for count in tokens:
                yield stem, pass_of(getattr(module, stem), module.example(count, device, dtype))


def pass_of(op, inputs: tuple) -> Callable[[], Any]:
    """One call, with the backward pass where the op has one."""
    backward = getattr(op, "_backward_fn", None) is not None
    inputs = tuple(
        x.detach().requires_grad_(backward) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in inputs
    )

    def run():
        out = op(*inputs)
        out = out[0] if isinstance(out, (tuple, list)) else out
        if out.requires_grad:
            out.backward(torch.ones_like(out))
        return out

    return run


def candidates(config, operation: str, bits: int) -> list[Entry]:
    """Every entry that any architecture's table gives this operation, each with all warps and stages."""
    tables = [config._table(name).get(operation, {}).get(str(bits), {}) for name in [*config.tables(), "default"]]
    known = {json.dumps(entry, sort_keys=True) for table in tables for entry in table.values()}
    found: dict[str, Entry] = {}
    for text, warps, stages in itertools.product(sorted(known), WARPS, STAGES):
        entry = json.loads(text)
        entry |= {name: n for name, n in (("warps", warps), ("stages", stages)) if name in entry}
        found[json.dumps(entry, sort_keys=True)] = entry
    return list(found.values())


def milliseconds(run: Callable[[], Any], device: str, seconds: float) -> float:
    """Median of one call."""
    if device != "cuda":
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)
    from triton.testing import do_bench

    return statistics.median(do_bench(run, warmup=50, rep=int(1000 * seconds), return_mode="all"))


def tune(config, work: list[Callable[[], Any]], key, time_one: Callable[[Callable[[], Any]], float]) -> Entry | None:
    """The entry with the least sum over the work, each part as a share of its time with today's entry; None where
    today's is the best. A candidate that does not fit the GPU is passed over."""
    today = [time_one(run) for run in work]
    best, chosen = 0.98 * len(work), None  # less than 2 % is noise
    for entry in candidates(config, key[0], key[1]):
        with config.forced({key: entry}):
            try:
                cost = sum(time_one(run) / base for run, base in zip(work, today, strict=True))
            except Exception as error:
                if "OutOfResources" not in type(error).__name__ and "out of resource" not in str(error).lower():
                    raise
                continue
        if cost < best:
            best, chosen = cost, entry
    return chosen


def write(path: Path, sources: str, new: dict[str, dict[str, dict[str, Entry]]], kept: dict[str, Any]) -> None:
    """Merges new entries into the table and replaces it in one step: a reader never sees half a file."""
    for operation, by_bits in new.items():
        for bits, by_width in by_bits.items():
            kept.setdefault(operation, {}).setdefault(bits, {}).update(by_width)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
    with os.fdopen(handle, "w") as file:
        json.dump({"sources": sources, "entries": kept}, file, indent=1)
    os.replace(part, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", help="all when none is named")
    parser.add_argument("--tokens", default="4608,16896")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--seconds", type=float, default=0.2, help="a measurement")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA or ROCm GPU is visible to PyTorch: there is nothing to tune.", file=sys.stderr)
        return 2
    load_pack()
    config = importlib.import_module("tessera.kernels._config")
    work: dict[Any, list[Callable[[], Any]]] = {}
    for _stem, run in runs([int(n) for n in args.tokens.split(",")], "cuda", getattr(torch, args.dtype)):
        with config.recorded() as keys:
            run()
        for key in keys:
            work.setdefault(key, []).append(run)
    path = config.user_table(torch.device("cuda"))
    for key in sorted(work):
        if args.operations and key[0] not in args.operations:
            continue
        chosen = tune(config, work[key], key, lambda run: milliseconds(run, "cuda", args.seconds))
        print(f"{key[0]} {key[1]} bit, width {key[2]}: {chosen or 'the shipped entry is the fastest'}", flush=True)
        if chosen:
            new = {key[0]: {str(key[1]): {str(key[2]): chosen}}}
            write(path, config.sources(), new, config.read_user_table(path))
            print(f"  written to {path}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
