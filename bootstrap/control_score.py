"""How well a trained control holds a layout: trains Train EasyControl on digits that the image model drew and their blurred
versions, as the template train_easycontrol does, then gives it blurred real digits that nothing was trained on.

    python bootstrap/control_score.py [--samples 100] [--steps 200] [--grid out.png]

A sample counts where a classifier of real digits reads the digit that was asked for, and the picture, reduced to 16 x 16,
correlates with the given layout by at least 0.9. Beside it: the plain model from the same noise."""

import argparse
import math
from pathlib import Path

import torch
from digits_data import IMAGE_SIDE, images, real_digits
from digits_read import Reader
from digits_score import load_model
from pack import ROOT, load_pack, use_comfyui
from PIL import Image
from torch.nn.functional import avg_pool2d, interpolate, normalize

CELLS, SEEN = 16, 64  # side of the layout in cells; of the condition in pixels
PAIRS, CFG, BATCH = 8, 2.0, 20  # pairs of each digit
SHARE = 0.9  # correlation from which a layout counts as held
Z95 = 1.959964


def layout(pixels: torch.Tensor) -> torch.Tensor:
    """Pictures [N, 128, 128] -> [N, 16, 16]."""
    return avg_pool2d(pixels[:, None], IMAGE_SIDE // CELLS)[:, 0]


def condition(pixels: torch.Tensor) -> torch.Tensor:
    """Pictures [N, 128, 128] -> blurred ones [N, 64, 64]."""
    return interpolate(layout(pixels)[:, None], size=(SEEN, SEEN), mode="bilinear")[:, 0]


def alike(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Correlation of the layouts of pictures a and b [N, 128, 128] -> [N]."""
    a, b = (layout(x).flatten(1) for x in (a, b))
    return (normalize(a - a.mean(1, keepdim=True)) * normalize(b - b.mean(1, keepdim=True))).sum(1)


def prompt(labels: list[int]) -> list:
    """One CONDITIONING entry of a row for each label; -1 is the empty prompt."""
    from tessera.methods.digits import words

    rows = torch.tensor([words.parse(words.DIGITS[i] if i >= 0 else "") for i in labels])
    tokens, pooled = words.encode(rows)
    return [[tokens, {"pooled_output": pooled}]]


def draw(model, labels: list[int], steps: int, seed: int) -> torch.Tensor:
    """Pictures [N, 128, 128]; the noise of row i depends on the seed and its place alone."""
    import comfy.sample

    from tessera.methods.digits import codec

    empty = torch.zeros(len(labels), codec.CHANNELS, IMAGE_SIDE // codec.PATCH, IMAGE_SIDE // codec.PATCH)
    noise = comfy.sample.prepare_noise(empty, seed)
    made = comfy.sample.sample(model, noise, steps, CFG, "euler", "simple", prompt(labels), prompt([-1] * len(labels)), empty,
                               disable_pbar=True, seed=seed)  # fmt: skip
    return codec.decode(made)


def trained(model, steps: int):
    """Weights of Train EasyControl, and the first and the last tenth of its errors."""
    from tessera.methods.digits import codec
    from tessera.patching.train_easycontrol import Settings, train

    targets, seen, prompts = [], [], []
    for digit in range(10):
        pixels = draw(model, [digit] * PAIRS, 10, 1)
        targets.append({"samples": codec.encode(pixels)})
        seen.append({"samples": codec.encode(condition(pixels))})
        prompts.append(prompt([digit]))
    weights, losses = train(
        model, None, targets, seen, prompts, prompt([-1]), Settings(steps=steps, batch=8, rate=2e-3)
    )
    part = -(-len(losses) // 10)
    return weights, sum(losses[:part]) / part, sum(losses[-part:]) / part


def interval(share: float, count: int) -> str:
    """Wilson's 95 % interval in words."""
    z = Z95**2
    middle = (share + z / (2 * count)) / (1 + z / count)
    half = Z95 * math.sqrt(share * (1 - share) / count + z / (4 * count**2)) / (1 + z / count)
    return f"{100 * share:.1f} % ({100 * (middle - half):.1f} to {100 * (middle + half):.1f})"


def score(model, weights, samples: int, grid: Path | None) -> None:
    from tessera.methods.digits import codec
    from tessera.patching.easycontrol_apply import apply

    digits, labels = real_digits(held_out=True)
    given = images(digits[:samples], torch.Generator().manual_seed(5))
    asked, reader = labels[:samples], Reader()
    sides: dict[str, list[torch.Tensor]] = {"with control": [], "plain": []}
    for start in range(0, samples, BATCH):
        rows = slice(start, start + BATCH)
        seen = {"samples": codec.encode(condition(given[rows]))}
        controlled = apply(model, None, weights, None, None, seen, "spatial", 512, 1.0, 1.0, 0.0, 1.0,
                           "step_invariant", "auto")  # fmt: skip
        for name, side in (("with control", controlled), ("plain", model)):
            sides[name].append(draw(side, asked[rows].tolist(), 25, 1000 + start))
    for name, parts in sides.items():
        pixels = torch.cat(parts)
        right, held = reader.read_images(pixels) == asked, alike(pixels, given)
        both = (right & (held >= SHARE)).float().mean().item()
        print(
            f"{name}: digit and layout {interval(both, samples)}, digit {100 * right.float().mean():.1f} %, correlation "
            f"{held.mean():.3f} (lowest {held.min():.3f})"
        )
    if grid is not None:
        rows = [given, interpolate(condition(given)[:, None], size=(IMAGE_SIDE,) * 2)[:, 0]]
        rows += [torch.cat(parts) for parts in sides.values()]
        picture = torch.cat([row[:8].movedim(0, 1).flatten(1) for row in rows])
        Image.fromarray((picture * 255).byte().numpy()).save(grid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--grid", type=Path)
    args = parser.parse_args()
    use_comfyui()
    load_pack()
    with torch.inference_mode():
        model = load_model(ROOT / "models/digits_flux.safetensors")
        weights, first, last = trained(model, args.steps)
        print(f"error of the velocity: {first:.4f} at first, {last:.4f} at last", flush=True)
        score(model, weights, args.samples, args.grid)


if __name__ == "__main__":
    main()
