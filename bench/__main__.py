"""python bench [stem ...] [--gpu]: checks each kernel and method against the truth, then times it against its rivals in
the same process, and writes bench/results/<device>.json. Exits 1 when a result is wrong or a promise is missed.
"""

import argparse
import contextlib
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bootstrap"))

import torch
from case import Case, Run
from cases import all_cases
from ceilings import ceilings
from growth import measure_growth
from operators import growths
from rivals import DENSE, left_out
from timing import machine, rounds, summary

OURS = "tessera"
ROOM = 3  # times our tolerance that a rival of the same operation may be off


def distance(got, want, outputs: int = 1) -> float:
    """The largest relative L2 error of so many outputs; NaN where one is NaN."""
    got, want = (x[:outputs] if isinstance(x, (tuple, list)) else (x,) for x in (got, want))
    pairs = [(a.double(), b.double()) for a, b in zip(got, want, strict=True)]
    return torch.stack([(a - b).norm() / b.norm().clamp_min(1e-30) for a, b in pairs]).max().item()


def usable(case: Case) -> dict[str, Run]:
    """Its rivals without those that must compute the same operation and fail or compute something else: why they do, goes
    into case.left_out."""

    def agrees(name: str) -> None:
        error, most = distance(case.rivals[name](), case.same[name](), case.outputs), ROOM * case.tolerance
        if not error <= most:
            raise ValueError(f"error {error:.1e} against the truth over its own lists, {most:.0e} is allowed")

    for name in case.same:
        if name not in case.left_out:
            case.left_out |= left_out(name, lambda name=name: agrees(name))
    return {name: run for name, run in case.rivals.items() if name not in case.left_out}


def peak(run) -> int:
    """Bytes of GPU memory that one call takes beyond what is held before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def measure(case: Case, device: str) -> dict:
    """One row of the report; without times when ours is wrong."""
    row = {"name": case.name, "case": case.title, **case.facts}
    if case.truth is not None:
        error = distance(case.ours(), case.truth(), case.outputs)
        row |= {"error": error, "tolerance": case.tolerance}
        if not error <= case.tolerance:
            return row | {"failed": f"error {error:.1e} exceeds {case.tolerance:.0e}: no times are given"}
    runs = {OURS: case.ours, **usable(case)}
    if device == "cuda":
        row["bytes"] = {name: peak(run) for name, run in runs.items()}
    row["times"] = summary(rounds(runs, device, case.flush), OURS)
    row |= {"left_out": case.left_out} if case.left_out else {}
    share = next((case.facts[name] for name in ("flops", "computed", "pairs") if name in case.facts), None)
    if share and not {*DENSE}.isdisjoint(runs):
        row["flop_ratio"] = 1 / share
    missed = {n: bar for n, bar in case.bars.items() if n in runs and row["times"][n]["speedup_of_ours"] < bar}
    row["bars"] = case.bars
    if missed:
        row["failed"] = "; ".join(
            f"{row['times'][n]['speedup_of_ours']:.2f}x {n}, promised {bar}x" for n, bar in missed.items()
        )
    return row


def show(row: dict) -> None:
    facts = "".join(f", {name} {row[name]:.1%}" for name in ("pairs", "computed") if name in row)
    facts += f", error {row['error']:.1e}" if "error" in row else ""
    facts += f": slope {row['slope']:.2f}" if "slope" in row else ""
    print(f"{row['name']}  {row['case']}{facts}")
    for name, time in row.get("times", {}).items():
        faster = "" if name == OURS else f"  {time['speedup_of_ours']:6.2f}x"
        if name in DENSE and "flop_ratio" in row:
            faster += f"  {row['flop_ratio']:6.2f}x in FLOP"
        held = f"  {row['bytes'][name] / 2**20:9.1f} MiB" if "bytes" in row else ""
        print(f"    {name:16s} {time['ms']:10.3f} ms{faster}{held}")
    for name, why in row.get("left_out", {}).items():
        print(f"    {name:16s} left out, {why}")
    if "failed" in row:
        print(f"    FAILED: {row['failed']}")


def versions() -> dict[str, str]:
    """What was measured with what."""
    asked = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    found = {"torch": torch.__version__, "python": platform.python_version(), "commit": asked.stdout.strip()}
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("stems", nargs="*", help="kernels or methods; all when none is named")
    parser.add_argument("--gpu", action="store_true", help="on the CUDA or ROCm device instead of the CPU")
    args = parser.parse_args()
    device = "cuda" if args.gpu else "cpu"
    if args.gpu and not torch.cuda.is_available():
        parser.error("No CUDA or ROCm device is visible to torch.")
    torch.manual_seed(0)
    named = machine(device)
    print(f"{named}, torch {torch.__version__}")
    built = {"commit": versions()["commit"]}  # of each row: a run of some stems keeps the other rows
    rows = []
    with torch.inference_mode():
        most = ceilings(device)
        print(", ".join(f"{name} {value:g}" for name, value in most.items()), flush=True)
        for case in all_cases(device):
            if not args.stems or case.name in args.stems:
                rows.append(measure(case, device) | built)
                show(rows[-1])
        for case in growths(device):
            if not args.stems or case.name in args.stems:
                rows.append(measure_growth(case, device) | built)
                show(rows[-1])
    if not rows:
        parser.error(f"No kernel or method is called {' or '.join(args.stems)}.")
    path = ROOT / "bench" / "results" / f"{re.sub(r'[^a-z0-9]+', '-', named.lower()).strip('-')}.json"
    path.parent.mkdir(exist_ok=True)
    kept = json.loads(path.read_text())["rows"] if path.exists() and args.stems else []
    kept = [row for row in kept if row["name"] not in {r["name"] for r in rows}]
    report = {"machine": named, **versions(), "ceilings": most, "rows": kept + rows}
    path.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
