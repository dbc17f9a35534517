"""What each training-free attention node costs in quality on the carried digit models, beside plain top-k attention
(plain_topk.py) that spends as many query-key pairs: share read right, SSIM to the plain model's picture from the same
noise, pairs. Writes docs/attention_quality.json and docs/attention_quality.md.

    python bootstrap/attention_quality.py [--samples 20] [--curve 10] [--steps 10] [--quick] [--cache FOLDER]

Finished runs are kept in --cache, by what was run and by the sources, so that an interrupted measurement goes on."""

import argparse
import hashlib
import inspect
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import digits_score as digits
import torch
from digits_read import Reader
from pack import ROOT, load_pack, use_comfyui
from quality_page import page
from quality_settings import SETTINGS, Setting

RECORD, PAGE = ROOT / "docs/attention_quality.json", ROOT / "docs/attention_quality.md"
SAMPLES, CURVE, STEPS = 20, 10, 10
SOURCES = ("archs", "kernels/attention", "methods/attention", "nodes/attention", "patching", "bootstrap")


@dataclass
class Drawn:
    """One run: per sample, whether the digit and the direction (clips only) are read right, and the SSIM to plain."""

    right: list[bool]
    turned: list[bool] | None
    ssim: list[float]
    pairs: float  # that reach the softmax, as a share of dense attention's in all image self-attention calls
    computed: float  # of the node's report: pairs inside the blocks that it works in on a CPU
    served: float  # share of the calls
    reasons: list[str]  # why others were declined

    def first(self, n: int) -> dict[str, Any]:
        """Its means over samples 0..n-1."""
        mean = lambda x: round(sum(x[:n]) / n, 5)  # noqa: E731
        turned = None if self.turned is None else mean(self.turned)
        return {"right": mean(self.right), "turned": turned, "ssim": mean(self.ssim), "pairs": round(self.pairs, 5)}


def layout_of(kind: str):
    """The token layout of that model's attention at its training size."""
    from tessera.archs import Layout
    from tessera.methods.digits.words import TOKENS

    if kind == "image":
        return Layout((1, 16, 16), slice(TOKENS, TOKENS + 256), TOKENS + 256)
    return Layout((8, 4, 4), slice(0, 128), 128)


def shares(model, kind: str) -> tuple[float, float, float, list[str]]:
    """(pairs, computed, served, reasons) of the last run of this MODEL, whose last feature is the one in question."""
    from tessera.patching.report import latest_record

    facts = latest_record(model)["features"][-1]["facts"]
    method = model.model_options["transformer_options"]["tessera_features"][-1].method
    declined = sum(facts["declined"].values())
    over_all = lambda share: (share * facts["served"] + declined) / facts["calls"]  # noqa: E731
    seen = seen_share(method, kind, facts)
    computed = over_all(facts["pairs_fraction"])
    pairs = computed if seen is None else over_all(seen)
    return pairs, computed, facts["served"] / facts["calls"], sorted(facts["declined"])


def seen_share(method: Any, kind: str, facts: dict[str, Any]) -> float | None:
    """The share of pairs that a served call lets through, for the two patterns whose lists on a CPU name blocks of 128
    queries: half of such a small picture. None: what is computed is what is let through."""
    from tessera.methods.attention import _static, local_window, rettention

    layout = layout_of(kind)
    if isinstance(method, local_window.LocalWindow):
        window = method.radius, method.metric, method.temporal_radius
        return local_window.build(layout, *window, down_factor=method.down_factor).pairs / layout.total**2
    if isinstance(method, rettention.Rettention) and facts["served"]:
        at, rule, radius, reach = _static.places(method.pattern, layout.grid, method.density)
        dt, dy, dx = (at[:, None] - at[None]).abs().unbind(-1)
        near = dy * dy + dx * dx < radius**2 if rule == "circle" else dx <= radius
        left = int((near & (dt <= reach) | (at[:, None, 0] < 0) | (at[None, :, 0] < 0)).sum())
        share = (left + layout.total**2 - len(at) ** 2) / layout.total**2
        return share + facts["refreshed"] / facts["served"]
    return None


class Bench:
    """Draws with one digit model, and remembers what it drew."""

    def __init__(self, kind: str, steps: int, most: int, reader: Reader, cache: Path):
        self.kind, self.steps, self.most, self.reader, self.cache = kind, steps, most, reader, cache
        self.model = digits.load_model(ROOT / "models" / digits.FILES[kind])
        self.sources = digest(kind)
        self.plain_pixels: torch.Tensor | None = None

    def plain(self) -> torch.Tensor:
        """Pixels of samples 0..most-1 of the model as it is."""
        if self.plain_pixels is None:
            path = self._path("plain").with_suffix(".pt")
            if not path.exists() or len(torch.load(path)) < self.most:
                torch.save(self._draw(self.model, self.most), path)
            self.plain_pixels = torch.load(path)[: self.most]
        return self.plain_pixels

    def plain_drawn(self) -> Drawn:
        return Drawn(*self._read(self.plain()), 1.0, 1.0, 1.0, [])

    def node(self, setting: Setting, samples: int) -> Drawn:
        given = setting.inputs | {"min_tokens": 0}
        return self._kept(f"{setting.node} {given}", samples, lambda: digits.with_node(self.model, setting.node, given))

    def topk(self, keep: int, samples: int) -> Drawn:
        from plain_topk import PlainTopK

        from tessera.patching.attention import AttentionFeature
        from tessera.patching.run import attach

        feature = AttentionFeature("0", "Plain top-k", method=PlainTopK(keep), min_tokens=0)
        return self._kept(f"top-k {keep}", samples, lambda: attach(self.model, feature))

    def _kept(self, name: str, samples: int, make) -> Drawn:
        path = self._path(name).with_suffix(".json")
        if not path.exists() or len(json.loads(path.read_text())["ssim"]) < samples:
            start, model = time.perf_counter(), make()
            drawn = Drawn(*self._read(self._draw(model, samples)), *shares(model, self.kind))
            path.write_text(json.dumps(asdict(drawn)))
            ssim, took = sum(drawn.ssim) / samples, time.perf_counter() - start
            print(
                f"{self.kind}, {name}: {samples} samples, SSIM {ssim:.3f}, {drawn.pairs:.1%}, {took:.0f} s", flush=True
            )
        return Drawn(**json.loads(path.read_text()))

    def _draw(self, model, samples: int) -> torch.Tensor:
        return digits.draw(model, self.kind, samples, self.steps, digits.DEFAULT_CFG[self.kind])

    def _read(self, pixels: torch.Tensor) -> tuple[list[bool], list[bool] | None, list[float]]:
        from tessera.methods.measure.quality import ssim

        found, pairs = digits.read(pixels, self.kind, self.reader), zip(self.plain(), pixels, strict=False)
        frames = ((x.reshape(-1, *x.shape[-2:], 1) for x in pair) for pair in pairs)
        likeness = [round(ssim(*pair), 6) for pair in frames]
        return found.right.tolist(), None if found.turned is None else found.turned.tolist(), likeness

    def _path(self, name: str) -> Path:
        key = f"{self.kind} {name} {self.steps} {self.sources}"
        return self.cache / hashlib.sha256(key.encode()).hexdigest()[:24]


def digest(kind: str) -> str:
    """Of the checkpoint and of everything that decides what is drawn and how it is read."""
    found = hashlib.sha256((ROOT / "models" / digits.FILES[kind]).read_bytes())
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not path.name.startswith(("attention_quality", "quality_")):
                found.update(path.read_bytes())
    return found.hexdigest()


def difference(a: list[float], b: list[float]) -> tuple[float, float]:
    """Mean of a - b over the same samples and half of its 95 % interval."""
    apart = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    half = 1.96 * apart.std().item() / len(apart) ** 0.5 if len(apart) > 1 else 0.0
    return round(apart.mean().item(), 5), round(half, 5)


def measured(bench: Bench, settings: list[Setting], counts: dict[bool, int]) -> list[dict[str, Any]]:
    """A row for each setting; counts: samples, by whether the setting is its node's main one."""
    from plain_topk import blocks_of, keep_for, pairs

    layout = layout_of(bench.kind)
    tokens, others = layout.total - layout.others, layout.others
    nodes = [bench.node(setting, counts[setting.main]) for setting in settings]
    keeps = [keep_for(drawn.pairs, tokens, others) for drawn in nodes]
    plain, rows = bench.plain_drawn(), []
    for setting, drawn, keep in zip(settings, nodes, keeps, strict=True):
        n = counts[setting.main]
        all_kept = keep >= blocks_of(tokens)
        most = max(counts[s.main] for s, other in zip(settings, keeps, strict=True) if other == keep)
        rival = plain if all_kept else bench.topk(keep, most)
        expected = pairs(tokens, others, keep) / layout.total**2
        if abs(rival.pairs - expected) > 1e-6 or not rival.served == 1:
            raise RuntimeError(f"Plain top-k computed {rival.pairs:.6f} of the pairs instead of {expected:.6f}.")
        gap, half = difference(drawn.ssim[:n], rival.ssim[:n])
        extra = {"computed": round(drawn.computed, 5), "served": round(drawn.served, 5), "declined": drawn.reasons}
        rows.append({
            "kind": bench.kind, "node": setting.node, "title": setting.title, "inputs": setting.inputs,
            "main": setting.main, "note": setting.note, "samples": n, **drawn.first(n), **extra,
            "topk": {"keep": keep, **rival.first(n)}, "ssim_over_topk": gap, "interval": half,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=inspect.getdoc(inspect.getmodule(main)))
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of each node's main setting")
    parser.add_argument("--curve", type=int, default=CURVE, help="samples of every other setting")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--quick", action="store_true", help="10 samples of the main settings; nothing is written")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "tessera_attention_quality")
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums do not depend on the number of cores
    use_comfyui()
    load_pack()
    args.cache.mkdir(parents=True, exist_ok=True)
    counts = {True: 10, False: 0} if args.quick else {True: args.samples, False: args.curve}
    reader = Reader()
    benches = {kind: Bench(kind, args.steps, max(counts.values()), reader, args.cache) for kind in SETTINGS}
    for kind, bench in benches.items():  # the main settings of both models come first
        measured(bench, [s for s in SETTINGS[kind] if s.main], counts)
    rows = []
    for kind, bench in benches.items():
        rows += measured(bench, [s for s in SETTINGS[kind] if counts[s.main]], counts)
    plain = {kind: bench.plain_drawn().first(counts[True]) for kind, bench in benches.items()}
    report = {"samples": counts[True], "curve": counts[False], "steps": args.steps, "plain": plain, "rows": rows}
    if args.quick:
        print(page(report))
        return
    RECORD.write_text(json.dumps(report, indent=1) + "\n")
    PAGE.write_text(page(report))


if __name__ == "__main__":
    main()
