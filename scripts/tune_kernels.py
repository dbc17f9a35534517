"""Measures launch parameters on this machine's GPU and keeps the fastest in your own table, which the nodes then use:

    python -m scripts.tune_kernels [operation ...] [--tokens 4608,16896] [--heads 64,72,128] [--dtype bfloat16]
                                   [--seconds 0.2]

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
HEADED = ("attention.", "linear.linear_attention", "linear.block_causal")  # their examples can have any head size
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


def runs(
    tokens: list[int], device: str, dtype: torch.dtype, heads: tuple[int, ...] = ()
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(stem, one forward and, where there is one, backward pass) of every kernel with an example, for every number of
    tokens and every head size, where it has heads."""
    load_pack()
    for found in pkgutil.walk_packages([str(ROOT / "kernels")], "tessera.kernels."):
        module, stem = importlib.import_module(found.name), found.name.rsplit(".", 1)[1]
        if hasattr(module, "example"):
            headed = found.name.removeprefix("tessera.kernels.").startswith(HEADED)
            for count in tokens:
                inputs = module.example(count, device, dtype)
                yield stem, pass_of(getattr(module, stem), inputs)
                for width in heads if headed and inputs[0].ndim == 4 else ():
                    if width != inputs[0].shape[3]:
                        yield stem, pass_of(getattr(module, stem), widened(inputs, width))


def widened(inputs: tuple, width: int) -> tuple:
    """The same inputs with heads of another size: every float tensor [B, H, N, D] whose D is that of the first one."""
    before = inputs[0].shape[3]

    def one(x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.ndim != 4 or x.shape[3] != before:
            return x
        b, h, n, _ = x.shape
        return torch.randn(b, n, h, width, device=x.device).to(x.dtype).transpose(1, 2)

    return tuple(one(x) for x in inputs)


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
    today's is the best. A candidate that does not compile or fit the GPU is passed over; RuntimeError where none does."""
    today = [time_one(run) for run in work]
    best, chosen, broken = 0.98 * len(work), None, None  # less than 2 % is noise
    tried = candidates(config, key[0], key[1])
    failures = 0
    for entry in tried:
        with config.forced({key: entry}):
            try:
                cost = sum(time_one(run) / base for run, base in zip(work, today, strict=True))
            except Exception as error:  # too much shared memory, or whatever the compiler says of this tile
                broken, failures = error, failures + 1
                continue
        if cost < best:
            best, chosen = cost, entry
    if broken is not None and failures == len(tried):
        raise RuntimeError(f"No candidate of {key[0]} runs on this GPU; the last one said: {broken}") from broken
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
    parser.add_argument("--heads", default="64,72,128", help="head sizes of the attention kernels")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--seconds", type=float, default=0.2, help="a measurement")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA or ROCm GPU is visible to PyTorch: there is nothing to tune.", file=sys.stderr)
        return 2
    load_pack()
    config = importlib.import_module("tessera.kernels._config")
    work: dict[Any, list[Callable[[], Any]]] = {}
    heads = tuple(int(n) for n in args.heads.split(","))
    for _stem, run in runs([int(n) for n in args.tokens.split(",")], "cuda", getattr(torch, args.dtype), heads):
        with config.recorded() as keys:
            run()
        for key in keys:
            work.setdefault(key, []).append(run)
    unknown = sorted(set(args.operations) - {key[0] for key in work})
    if unknown:
        parser.error(f"unknown operation {unknown[0]!r}; there are {', '.join(sorted({key[0] for key in work}))}")
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
