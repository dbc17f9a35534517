"""python bench/quant_memory.py [--folder F] [--gigabytes 1.1]: the memory that loading a quantized model takes, from outside.

Writes a tlq4 file of a Wan-shaped transformer with random codes, tensor by tensor, loads it in a child process through
Load Quantized Model's own `load`, and watches the child in /proc: anonymous and file-backed pages together, above what it
held before. Promises: at most 1.2 times the file while loading and after every weight has been read, and layers of at
most 0.32 of their size in bf16. Exits 1 where one is missed; the file is deleted in any case.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bootstrap"))

import torch
from pack import load_pack, use_comfyui

WIDTH, HIDDEN, HEAD, GROUP = 2048, 8192, 128, 64  # with 30 layers, as much of it dense as of Wan 14B: 6 % of the file
MOST_PEAK, MOST_LAYER = 1.2, 0.32
EVERY = 0.002  # s between looks at the child


def shapes(layers: int) -> dict[str, torch.Size]:
    """Of the tensors of such a transformer; nothing is allocated."""
    import comfy.ops
    from comfy.ldm.wan.model import WanModel

    model = WanModel(
        model_type="t2v", dim=WIDTH, ffn_dim=HIDDEN, num_heads=WIDTH // HEAD, num_layers=layers, device="meta",
        dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def write(path: Path, gigabytes: float) -> None:
    from tessera.methods.files.safetensors_write import SafetensorsWriter
    from tessera.methods.quant.recipe import FORMAT, MARK, mark

    one = {name: shape.numel() for name, shape in shapes(1).items() if name.startswith("blocks.")}
    layers = round(gigabytes * 1e9 / (sum(one.values()) * 4.25 / 8) + 0.5)
    found, generator = shapes(layers), torch.Generator().manual_seed(0)
    with SafetensorsWriter(path, {}, 5 * len(found)) as out:
        for name, shape in found.items():
            if not (name.startswith("blocks.") and len(shape) == 2 and name.endswith(".weight")):
                out.add(name, torch.randn(shape, generator=generator).to(torch.bfloat16) * 0.02)
                continue
            (rows, columns), layer = shape, name.removesuffix(".weight")
            out.add(name, torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator))
            out.add(f"{name}_scale", torch.full((rows, columns // GROUP), 0.02, dtype=torch.bfloat16))
            out.add(f"{name}_table", torch.linspace(-1, 1, 16))
            out.add(layer + MARK, mark({"format": FORMAT, "codec": "table4", "group": GROUP, "columns": columns}))


def child(path: str) -> None:
    """Says what it is about to do, one JSON a line, and waits for an answer."""

    def say(**told) -> None:
        print(json.dumps(told), flush=True)
        sys.stdin.readline()

    from tessera.patching.quant_layout import is_packed
    from tessera.patching.quant_load import load

    with torch.inference_mode():
        say(stage="idle")
        model = load(path)
        say(stage="loaded")
        weights = [p for p in model.model.diffusion_model.parameters() if is_packed(p)]  # p.data would copy the scales
        for weight in weights:
            weight._qdata.max()  # a sum would make numbers of 64 bits of them
        held = sum(t.nbytes for w in weights for t in w.layout_cls.get_plain_tensors(w))
        say(stage="read", layers=len(weights), share=held / sum(2 * w.numel() for w in weights))


def resident(pid: int) -> tuple[int, int]:
    """(anonymous, file-backed) bytes of a process in memory."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    anonymous, mapped, shared = (int(status[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "RssShmem"))
    return anonymous, mapped + shared


def watch(path: Path) -> dict:
    """The most that the child held above its idle state, by stage."""
    import threading

    run = subprocess.Popen(
        [sys.executable, __file__, "--child", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(iter(run.stdout.readline, "")), daemon=True)  # type: ignore[union-attr]
    reader.start()
    idle, stages, peak, seen = (0, 0), {}, (0, 0, 0), 0
    while run.poll() is None:
        try:
            now = resident(run.pid)
        except (OSError, KeyError):  # it has just ended
            break
        above = now[0] - idle[0], now[1] - idle[1]
        peak = max(peak, (sum(above), *above))
        while len(lines) > seen:
            line, seen = lines[seen], seen + 1
            if not line.startswith('{"stage"'):
                continue
            told = json.loads(line)
            now = resident(run.pid)
            above = now[0] - idle[0], now[1] - idle[1]
            if told["stage"] == "idle":
                idle = now
            else:
                stages[told.pop("stage")] = {"peak": max(peak, (sum(above), *above)), **told}
            peak = (0, 0, 0)
            run.stdin.write("\n")  # type: ignore[union-attr]
            run.stdin.flush()  # type: ignore[union-attr]
        time.sleep(EVERY)
    if run.wait() or "read" not in stages:
        raise SystemExit(f"The child ended with {run.returncode} after {', '.join(stages) or 'nothing'}.")
    return stages


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the file is written for a while; the default is temporary")
    parser.add_argument("--gigabytes", type=float, default=1.1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    use_comfyui()
    load_pack()
    if args.child:
        child(args.child)
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "model.safetensors"
        write(path, args.gigabytes)
        size, stages = path.stat().st_size, watch(path)
    share, missed = stages["read"]["share"], []
    print(f"file: {size / 1e9:.3f} GB, {stages['read']['layers']} packed layers of {share:.4f} of their size in bf16")
    for stage, told in stages.items():
        total, anonymous, mapped = (value / size for value in told["peak"])
        print(f"{stage}: at most {total:.3f} of the file ({anonymous:.3f} anonymous, {mapped:.3f} file-backed)")
        if total > MOST_PEAK:
            missed.append(f"{stage} takes {total:.3f} of the file, promised {MOST_PEAK}")
    if share > MOST_LAYER:
        missed.append(f"layers take {share:.3f} of their size in bf16, promised {MOST_LAYER}")
    print("\n".join(missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
