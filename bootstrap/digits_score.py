"""How well a digit model draws what it is asked for, plain and accelerated: samples a saved checkpoint through
ComfyUI's own loader and sampler and lets a classifier of real digits read the result.

    python bootstrap/digits_score.py image|video [--samples 400] [--steps 25] [--cfg F] [--patch none|taylor|taylor5|window]
        [--quantize FORMAT] [--model FILE] [--batch 25] [--grid out.png]

Sample i always starts from the noise of seed i and asks for the same digit, whatever the batch size, so that two runs
can be compared sample by sample."""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from digits_data import VELOCITY
from digits_read import Reader, paired_difference
from pack import ROOT, load_pack, use_comfyui
from PIL import Image

FILES = {"image": "digits_flux.safetensors", "video": "moving_digits_wan.safetensors"}
LATENT = {"image": (16, 32, 32), "video": (16, 8, 8, 8)}  # the training sizes
DEFAULT_CFG = {"image": 2.0, "video": 3.0}
SAMPLES, STEPS, BATCH = 400, 25, 25
PATCHES = {  # node id and its inputs; the rest are the schema's defaults
    "taylor": ("TesseraTaylorCache", {}),
    "taylor5": ("TesseraTaylorCache", {"interval": 5}),
    "window": ("TesseraLocalWindowAttention", {"radius": 6, "temporal_radius": 1, "min_tokens": 0}),
}


@dataclass
class Score:
    """Which samples [N] were read as asked, and the pictures [N, H, W] or clips [N, T, H, W] themselves.

    `right` is the digit; `turned` the direction, None for images."""

    right: torch.Tensor
    turned: torch.Tensor | None
    pixels: torch.Tensor

    def __str__(self) -> str:
        parts = [f"{100 * self.right.float().mean():.2f} % read right"]
        if self.turned is not None:
            both = self.right & self.turned
            parts += [f"{100 * part.float().mean():.2f} % {what}"
                      for part, what in ((self.turned, "moving as asked"), (both, "both"))]  # fmt: skip
        return f"{', '.join(parts)} of {len(self.right)} samples"


def wanted(kind: str, samples: int) -> tuple[list[int], list[str]]:
    """Digits and directions of samples 0..N-1: every digit in turn, every direction with each of them."""
    names = list(VELOCITY)
    return [i % 10 for i in range(samples)], [names[i // 10 % 4] for i in range(samples)] if kind == "video" else []


def prompts(kind: str, samples: int) -> list[str]:
    """What sample i asks for, as Digits Prompt takes it."""
    load_pack()
    from tessera.methods.digits.words import DIGITS

    digits, directions = wanted(kind, samples)
    tails = [f" moving {name}" for name in directions] or [""] * samples
    return [DIGITS[digit] + tail for digit, tail in zip(digits, tails, strict=True)]


def load_model(path: Path):
    """The MODEL of a checkpoint file, as Load Diffusion Model gives it."""
    use_comfyui()
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(path))


def patched(model, patch: str):
    """The MODEL after the node that `patch` names. ValueError where the pack has no such node."""
    return model if patch == "none" else with_node(model, *PATCHES[patch])


def with_node(model, node_id: str, inputs: dict[str, Any]):
    """The MODEL after this node; inputs that are not given are the schema's defaults. ValueError where the pack has no
    such node."""
    load_pack()
    from tessera.nodes import discover

    node = next((n for n in discover() if n.GET_SCHEMA().node_id == node_id), None)
    if node is None:
        raise ValueError(f"This pack has no node {node_id}.")
    given = {i.id: _default(i) for i in node.GET_SCHEMA().inputs if hasattr(i, "default")} | inputs
    return node.PREPARE_CLASS_CLONE(None).execute(model, **given).args[0]


def quantized(model, format: str, folder: Path):
    """The MODEL after Quantize Model without a calibration; its file lies in the folder."""
    load_pack()
    from tessera.patching.quant_layer import Asked
    from tessera.patching.quantize import quantize

    return quantize(model, Asked(format), None, folder / f"{format}.safetensors", "", "replace")[0]


def _default(entry):
    default = getattr(entry, "default", None)  # sockets have none
    return entry.options[0] if default is None and getattr(entry, "options", None) else default


@torch.inference_mode()
def draw(model, kind: str, samples: int, steps: int, cfg: float, batch: int = BATCH) -> torch.Tensor:
    """Pictures [N, 128, 128] or clips [N, 8, 32, 32] in 0..1 of samples 0..N-1: Euler, the "simple" schedule."""
    load_pack()
    from tessera.methods.digits import codec

    parts = ((start, min(batch, samples - start)) for start in range(0, samples, batch))
    return torch.cat([codec.decode(latents(model, kind, start, count, steps, cfg)) for start, count in parts])


@torch.inference_mode()
def latents(model, kind: str, start: int, count: int, steps: int, cfg: float | None = None) -> torch.Tensor:
    """Final latents fp32 [count, ...] of samples start..start+count-1, sampled as one batch."""
    load_pack()
    import comfy.sample

    from tessera.methods.digits import words

    part = torch.tensor([words.parse(text) for text in prompts(kind, start + count)])[start:]
    noise = torch.stack(
        [torch.randn(LATENT[kind], generator=torch.Generator().manual_seed(start + i)) for i in range(count)]
    )
    positive, negative = (_conditioning(words.encode(text)) for text in (part, torch.zeros_like(part)))
    return comfy.sample.sample(
        model, noise, steps, DEFAULT_CFG[kind] if cfg is None else cfg, "euler", "simple", positive, negative,
        torch.zeros(count, *LATENT[kind]), disable_pbar=True, seed=start,
    ).float().cpu()  # fmt: skip


def _conditioning(encoded):
    tokens, pooled = encoded
    return [[tokens, {"pooled_output": pooled}]]


def score(model, kind: str, reader: Reader, samples=SAMPLES, steps=STEPS, cfg=None, batch=BATCH) -> Score:
    """Draws samples 0..N-1 with the MODEL and reads them; cfg None is DEFAULT_CFG of this kind."""
    pixels = draw(model, kind, samples, steps, DEFAULT_CFG[kind] if cfg is None else cfg, batch)
    return read(pixels, kind, reader)


def read(pixels: torch.Tensor, kind: str, reader: Reader) -> Score:
    """The score of pictures or clips of samples 0..N-1, wherever they were drawn."""
    digits, directions = wanted(kind, len(pixels))
    if kind == "image":
        return Score(reader.read_images(pixels) == torch.tensor(digits), None, pixels)
    labels, seen = reader.read_clips(pixels)
    turned = torch.tensor([a == b for a, b in zip(seen, directions, strict=True)])
    return Score(labels == torch.tensor(digits), turned, pixels)


def save_grid(pixels: torch.Tensor, path: Path, columns: int = 10) -> None:
    """Pictures [N, H, W], ten a row; clips [N, T, H, W], one a row with its frames side by side."""
    cells = pixels[:40].flatten(0, 1) if pixels.ndim == 4 else pixels[:100]
    columns = pixels.shape[1] if pixels.ndim == 4 else columns
    cells = cells[: len(cells) // columns * columns].unflatten(0, (-1, columns))
    sheet = cells.transpose(1, 2).flatten(2).flatten(0, 1)
    Image.fromarray((sheet * 255).round().to(torch.uint8).numpy()).save(path)


def _print_beside(plain: Score, shown: Score, name: str) -> None:
    from tessera.methods.measure.quality import ssim

    alike = torch.tensor(
        [ssim(x[..., None], y[..., None]) for x, y in zip(_frames(plain), _frames(shown), strict=True)]
    )
    print(f"{name}: {shown}, SSIM {alike.mean():.3f}")
    for what in ("right", "turned") if plain.turned is not None else ("right",):
        middle, low, high = (100 * x for x in paired_difference(getattr(plain, what), getattr(shown, what)))
        print(f"{what}: {middle:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}")


def _frames(found: Score) -> torch.Tensor:
    """Pictures as clips of one frame, [N, T, H, W]."""
    return found.pixels if found.pixels.ndim == 4 else found.pixels[:, None]


@torch.inference_mode()  # as ComfyUI runs everything
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(FILES))
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--cfg", type=float, help="default: image {image}, video {video}".format(**DEFAULT_CFG))
    parser.add_argument("--patch", choices=["none", *PATCHES], default="none")
    parser.add_argument(
        "--quantize", metavar="FORMAT", help="such as tlq4 or int8_row; with --patch the cache acts on it"
    )
    parser.add_argument("--model", type=Path, help="checkpoint file, default models/…")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--grid", type=Path, help="write the samples as a picture")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model(args.model or ROOT / "models" / FILES[args.kind])
    settings = (args.kind, Reader(), args.samples, args.steps, args.cfg, args.batch)
    plain = score(model, *settings)
    print(f"plain: {plain}", flush=True)
    shown = plain
    if args.patch != "none" or args.quantize:
        with tempfile.TemporaryDirectory() as folder:
            model = quantized(model, args.quantize, Path(folder)) if args.quantize else model
            shown = score(patched(model, args.patch), *settings)
        _print_beside(plain, shown, "+".join(filter(None, (args.quantize, args.patch.removesuffix("none")))))
    if args.grid:
        save_grid(shown.pixels, args.grid)


if __name__ == "__main__":
    main()
