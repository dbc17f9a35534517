"""What every accelerator costs and saves on the digit models: score, SSIM and latent error against computed work, from the
same noise. Writes docs/fidelity.json, the charts in web/docs/fidelity, and the tables of docs/fidelity.md and README.md.

    python bootstrap/fidelity.py [--samples 32] [--steps 25] [--kinds image,video] [--threads 1] [--pages] [--cache FOLDER]

Work is counted, not timed: floating point operations of matrix products and attention in one run. --pages only writes the
pages from docs/fidelity.json. Finished runs are kept in --cache, so that an interrupted measurement goes on."""

import argparse
import hashlib
import inspect
import json
import math
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import digits_score as digits
import torch
from attention_quality import shares
from digits_read import Reader, paired_difference
from fidelity_page import write_pages
from fidelity_settings import POINTS, Point
from pack import ROOT, load_pack, use_comfyui
from torch.utils.flop_counter import FlopCounterMode

RECORD = ROOT / "docs/fidelity.json"
SAMPLES, STEPS = 32, 25
SOURCES = ("archs", "kernels", "methods", "nodes", "patching")


def attention_flops(q, k, v, *args, out_shape=None, **kwargs) -> int:
    """Of torch's attention on a CPU, which its counter passes over; shapes q [B, H, N, D], k [B, H, M, D], v [B, H, M, E]."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}


class Lab:
    """One digit model, and what it draws plainly."""

    def __init__(self, kind: str, samples: int, steps: int, cache: Path, folder: Path):
        self.kind, self.samples, self.steps, self.cache, self.folder = kind, samples, steps, cache, folder
        self.model = digits.load_model(ROOT / "models" / digits.FILES[kind])
        self.reader, self.sources = Reader(), digest()
        self.plain_latents = self.drawn("plain", lambda: self.model)
        self.plain_work = self.operations(lambda: self.model)
        self.plain = self.read(self.plain_latents)

    def path(self, name: str, what: str) -> Path:
        key = f"{self.sources} {self.kind} {self.samples} {self.steps} {name} {what}"
        return self.cache / hashlib.sha256(key.encode()).hexdigest()[:24]

    def drawn(self, name: str, make) -> torch.Tensor:
        """Final latents of samples 0..N-1."""
        path = self.path(name, "latents").with_suffix(".pt")
        if not path.exists():
            model, batch = make(), digits.BATCH
            parts = [digits.latents(model, self.kind, at, min(batch, self.samples - at), self.steps)
                     for at in range(0, self.samples, batch)]  # fmt: skip
            torch.save(torch.cat(parts), path)
        return torch.load(path)

    def operations(self, make) -> tuple[float, float]:
        """(all, those of attention) in a run of one sample."""
        with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
            digits.latents(make(), self.kind, 0, 1, self.steps)
        kinds = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
        logits = 2 * kinds.get("aten.baddbmm", 0)  # ComfyUI's attention on a CPU: as much again for the values
        attention = logits + sum(n for op, n in kinds.items() if "scaled_dot_product" in op)
        return counter.get_total_flops(), attention

    def work(self, name: str, point: Point) -> float:
        """Share of the plain run's operations. The counter does not see into sparse attention, whose report tells its pairs,
        nor into the products of packed weights, which are as many as before."""
        path = self.path(name, "part").with_suffix(".json")
        if not path.exists():
            whole, attention = self.plain_work
            if "min_tokens" in point.inputs:
                model = self.made(point)
                digits.latents(model, self.kind, 0, 1, self.steps)
                share = 1 - attention / whole * (1 - shares(model, self.kind)[0])
            elif point.node == "TesseraQuantizeModel":
                share = 1.0
            else:
                share = self.operations(lambda: self.made(point))[0] / whole
            path.write_text(json.dumps(share))
        return json.loads(path.read_text())

    def weights(self, point: Point) -> float | None:
        """Bytes of a quantized model's weights as a share of the plain file's."""
        if point.node != "TesseraQuantizeModel":
            return None
        self.made(point)  # the run may have been kept from before, and its file not
        file, plain = self.folder / f"{point.inputs['format']}.safetensors", ROOT / "models" / digits.FILES[self.kind]
        return round(share_of_bytes(file, plain), 3)

    def read(self, latents: torch.Tensor):
        from tessera.methods.digits import codec

        return digits.read(codec.decode(latents), self.kind, self.reader)

    def made(self, point: Point):
        """The MODEL at this point."""
        if point.node == "TesseraQuantizeModel":
            return digits.quantized(self.model, point.inputs["format"], self.folder)
        if point.node:
            return digits.with_node(self.model, point.node, point.inputs)
        from comfy_extras.nodes_easycache import EasyCacheNode

        model = self.model.clone()
        model.set_model_compute_dtype(torch.bfloat16)  # its sum in place spoils fp32 runs of flow models
        return EasyCacheNode.execute(model, point.inputs["threshold"], 0.1, 0.98, False)[0]

    def row(self, point: Point) -> dict[str, Any]:
        """All numbers of one point."""
        name = json.dumps(asdict(point), sort_keys=True)
        latents, work = self.drawn(name, lambda: self.made(point)), self.work(name, point)
        shown = self.read(latents)
        apart = (latents - self.plain_latents).flatten(1).norm(dim=1) / self.plain_latents.flatten(1).norm(dim=1)
        right = [s.right if s.turned is None else s.right & s.turned for s in (self.plain, shown)]
        middle, low, high = paired_difference(*right)
        alike = ssims(digits._frames(self.plain), digits._frames(shown))
        return {"kind": self.kind, "node": point.node, "title": point.title, "setting": point.label, "main": point.main,
                "work": round(work, 4), "weights": self.weights(point), "score": round(float(right[1].float().mean()), 4),
                "difference": [round(x, 4) for x in (middle, low, high)], "ssim": round(sum(alike) / len(alike), 5),
                "ssim_worst": round(min(alike), 5), "latent_error": round(float(apart.median()), 5)}  # fmt: skip


def share_of_bytes(file: Path, plain: Path) -> float:
    """Tensors that a quantized file keeps count as the plain one stores them: ComfyUI loads bf16 as fp32 on a CPU."""
    packed, whole = header(file), header(plain)
    kept = {name for name, (kind, shape, _) in packed.items() if kind == "F32" and whole.get(name, "  ")[1] == shape}
    total = sum((whole if name in kept else packed)[name][2] for name in packed)
    return total / sum(size for *_, size in whole.values())


def header(path: Path) -> dict[str, tuple[str, list[int], int]]:
    """Of each tensor of a safetensors file its type, shape and bytes."""
    with path.open("rb") as file:
        told = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    told.pop("__metadata__", None)
    return {name: (t["dtype"], t["shape"], t["data_offsets"][1] - t["data_offsets"][0]) for name, t in told.items()}


def ssims(plain: torch.Tensor, other: torch.Tensor) -> list[float]:
    """Of each sample [N, T, H, W]."""
    from tessera.methods.measure.quality import ssim

    return [ssim(x[..., None], y[..., None]) for x, y in zip(plain, other, strict=True)]


def digest() -> str:
    """Of the sources that a run depends on."""
    found = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()


@torch.inference_mode()
def measure(kind: str, samples: int, steps: int, cache: Path, folder: Path) -> dict[str, Any]:
    lab, rows = Lab(kind, samples, steps, cache, folder), []
    for point in POINTS[kind]:
        start = time.perf_counter()
        row = lab.row(point)
        rows.append(row)
        took = time.perf_counter() - start
        print(
            f"{kind}: {point.title}, {point.label}: work {row['work']:.1%}, SSIM {row['ssim']:.3f}, {took:.0f} s",
            flush=True,
        )
        if not math.isfinite(row["latent_error"]):
            raise SystemExit(f"{point.title} ({point.label}) gave values that are not finite.")
    right = lab.plain.right if lab.plain.turned is None else lab.plain.right & lab.plain.turned
    return {
        "kind": kind,
        "samples": samples,
        "steps": steps,
        "plain": round(float(right.float().mean()), 4),
        "rows": rows,
    }


def joined(made: list[dict[str, Any]]) -> dict[str, Any]:
    """What was measured now, and the kinds that were measured before."""
    before = json.loads(RECORD.read_text())["kinds"] if RECORD.exists() else []
    kinds = {entry["kind"]: entry for entry in [*before, *made]}
    return {"kinds": [kinds[name] for name in ("image", "video") if name in kinds]}


def main() -> None:
    parser = argparse.ArgumentParser(description=inspect.getdoc(inspect.getmodule(main)))
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--kinds", default="image,video")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "tessera_fidelity")
    parser.add_argument("--pages", action="store_true")
    args = parser.parse_args()
    if not args.pages:
        torch.set_num_threads(args.threads)
        args.cache.mkdir(parents=True, exist_ok=True)
        use_comfyui()
        load_pack()
        with tempfile.TemporaryDirectory() as folder:
            made = [measure(kind, args.samples, args.steps, args.cache, Path(folder)) for kind in args.kinds.split(",")]
        RECORD.write_text(json.dumps(joined(made), indent=1) + "\n")
    write_pages(json.loads(RECORD.read_text()))


if __name__ == "__main__":
    main()
