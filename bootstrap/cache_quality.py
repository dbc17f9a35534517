"""Which cache loses least at equal numbers of computed evaluations: on the digit models, from the same noise, the error of
the final latent against the plain run, median over seeds; core's EasyCache beside ours. Thresholds are searched until a
policy computes as many evaluations as Taylor Cache at the interval in question (or the next higher number it can).

    python bootstrap/cache_quality.py [--seeds 32] [--steps 25] [--intervals 2,3,5]

Writes docs/cache_quality.json and docs/cache_quality.md. EasyCache runs in bfloat16, as its sum in place spoils fp32 runs of
flow models; so does everything it is compared with."""

import argparse
import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import digits_score as digits
import torch
from pack import ROOT, load_pack, use_comfyui

RECORD, PAGE = ROOT / "docs/cache_quality.json", ROOT / "docs/cache_quality.md"
SEARCH = 14  # halvings of a threshold's range
HALF = 16  # samples that one decision is pooled over


@dataclass(frozen=True)
class Rival:
    """make(model, knob) -> MODEL. searched: (low, high) of a threshold; None: the knob is Taylor's interval."""

    name: str
    make: Callable[[Any, float], Any]
    searched: tuple[float, float] | None = None


def node(node_id: str, knob: str, **inputs: Any) -> Callable[[Any, float], Any]:
    return lambda model, value: digits.with_node(model, node_id, {**inputs, knob: value})


def easycache(model, threshold: float):
    """Core's node over the whole schedule but its first and last steps, as our warm-up and tail are."""
    from comfy_extras.nodes_easycache import EasyCacheNode

    return EasyCacheNode.execute(model, threshold, 0.1, 0.98, False)[0]


COMMON = {"warmup": 3, "tail_full": 1}
RIVALS = (
    Rival("Taylor Cache", node("TesseraTaylorCache", "interval", **COMMON)),
    Rival("Taylor Cache, order 0 (reuse of the output)", node("TesseraTaylorCache", "interval", order=0, **COMMON)),
    Rival("Step Cache, FORA with residuals", node("TesseraStepCache", "interval", policy="FORA", fill="residual", threshold=1.0, **COMMON)),
    Rival("Confidence Taylor Cache", node("TesseraConfidenceTaylorCache", "threshold", **COMMON), (0.0, 2.0)),
    Rival("Step Cache, FBCache", node("TesseraStepCache", "threshold", policy="FBCache", **COMMON), (0.0, 2.0)),
    Rival("Step Cache, FBCache filled by taylor1", node("TesseraStepCache", "threshold", policy="FBCache", fill="taylor1", **COMMON), (0.0, 2.0)),
    Rival("Step Cache, EasyCache", node("TesseraStepCache", "threshold", policy="EasyCache", **COMMON), (0.0, 3.0)),
    Rival("EasyCache of ComfyUI", easycache, (0.0, 3.0)),
)  # fmt: skip


class Lab:
    """One digit model in one precision, and what it drew plainly."""

    def __init__(self, kind: str, seeds: int, steps: int, dtype: torch.dtype):
        self.kind, self.seeds, self.steps = kind, seeds, steps
        self.model = digits.load_model(ROOT / "models" / digits.FILES[kind])
        self.model.set_model_compute_dtype(dtype)
        stack = self.model.model.diffusion_model
        self.last = (getattr(stack, "single_blocks", None) or stack.blocks)[-1]
        self.plain, self.full = self.run(self.model)

    @torch.inference_mode()
    def run(self, model) -> tuple[torch.Tensor, list[int]]:
        """Final latents [seeds, ...] and computed evaluations of each batch."""
        out, counts = [], []
        for start in range(0, self.seeds, HALF):
            seen: list[int] = []
            name, module = next((n, m) for n, m in self.last.named_modules() if isinstance(m, torch.nn.Linear))
            handle = module.register_forward_hook(lambda _, given, out, seen=seen: seen.append(given[0].shape[0]))
            try:
                out.append(digits.latents(model, self.kind, start, min(HALF, self.seeds - start), self.steps))
            finally:
                handle.remove()
            counts.append(sum(seen) // min(HALF, self.seeds - start))  # rows: CFG may be joined or not
        return torch.cat(out), counts

    def error(self, latents: torch.Tensor) -> tuple[float, float, float]:
        """Quartiles of the relative error of each seed: (median, lower, upper)."""
        apart = (latents - self.plain).flatten(1).norm(dim=1) / self.plain.flatten(1).norm(dim=1)
        return tuple(round(float(apart.quantile(q)), 5) for q in (0.5, 0.25, 0.75))  # type: ignore[return-value]

    def at(self, rival: Rival, wanted: int) -> tuple[torch.Tensor, float, float]:
        """Latents, computed evaluations of a batch (mean) and threshold: the largest that computes at least `wanted`."""
        assert rival.searched is not None
        low, high = rival.searched
        best = None
        for _ in range(SEARCH):
            middle = (low + high) / 2
            latents, counts = self.run(rival.make(self.model, middle))
            mean = sum(counts) / len(counts) / self.calls
            if mean >= wanted:
                low, best = middle, (latents, mean, middle)
                if mean == wanted:
                    break
            else:
                high = middle
        if best is None:
            latents, counts = self.run(rival.make(self.model, low))
            best = latents, sum(counts) / len(counts) / self.calls, low
        return best

    @functools.cached_property
    def calls(self) -> int:
        """Rows of one picture in one evaluation: 2 under CFG."""
        return self.full[0] // self.steps


def measure(lab: Lab, interval: int) -> list[dict[str, Any]]:
    """A row for each rival at as many computed evaluations as Taylor Cache has at this interval."""
    rows, wanted = [], 0
    for rival in RIVALS:
        if rival.searched is None:
            latents, counts = lab.run(rival.make(lab.model, interval))
            full, knob = sum(counts) / len(counts) / lab.calls, float(interval)
            wanted = wanted or round(full)
        else:
            latents, full, knob = lab.at(rival, wanted)
        median, low, high = lab.error(latents)
        rows.append({"kind": lab.kind, "interval": interval, "name": rival.name, "full": full, "knob": round(knob, 5),
                     "error": median, "low": low, "high": high})  # fmt: skip
        print(f"{lab.kind} {interval}: {rival.name}: {full:g} full, error {median} ({low} to {high})", flush=True)
    return rows


def page(report: dict[str, Any]) -> str:
    """The whole file."""
    lines = [
        "# Which cache loses least",
        "",
        f"Written by `make cache-quality` on the digit models of this repository: {report['steps']} Euler steps, "
        f"{report['seeds']} seeds, bfloat16. Every row of a group computes as many evaluations as Taylor Cache does at that "
        "interval, or the next number above that its threshold can reach; decisions are pooled over 16 pictures. **error** is "
        "that of the final latent against the plain run, relative, median over the seeds (and quartiles).",
        "",
    ]
    names = {"image": "Pictures", "video": "Clips"}
    for kind in names:
        lines += [
            f"## {names[kind]}",
            "",
            "| interval | cache | setting | computed | error | quartiles |",
            "|---" * 6 + "|",
        ]
        for row in (r for r in report["rows"] if r["kind"] == kind):
            lines.append(
                f"| {row['interval']} | {row['name']} | {row['knob']:g} | {row['full']:g} | {row['error']:.4f} | "
                f"{row['low']:.4f} to {row['high']:.4f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=inspect.getdoc(inspect.getmodule(main)))
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--steps", type=int, default=digits.STEPS)
    parser.add_argument("--intervals", default="2,3,5")
    parser.add_argument("--kinds", default="image,video")
    args = parser.parse_args()
    use_comfyui()
    load_pack()
    rows = []
    for kind in args.kinds.split(","):
        lab = Lab(kind, args.seeds, args.steps, torch.bfloat16)
        for interval in map(int, args.intervals.split(",")):
            rows += measure(lab, interval)
    report = {"seeds": args.seeds, "steps": args.steps, "rows": rows}
    RECORD.write_text(json.dumps(report, indent=1) + "\n")
    PAGE.write_text(page(report))


if __name__ == "__main__":
    main()
