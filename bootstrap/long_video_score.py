"""How far a clip of the moving-digits model can be carried beyond the length that it was trained for: samples clips block by
block, each block going on from the last clean frames, and lets a classifier of real digits read every block.

    python bootstrap/long_video_score.py [--clips 20] [--times 4] [--block 4] [--steps 25] [--cfg 3] [--rival too] [--grid out.png]

Clip i starts from the noise of seed i. A block counts where its digit and its direction are read as asked. --rival too
also samples the same clips whole through core's context windows of the trained length."""

import argparse
import math
import time
from pathlib import Path

import torch
from digits_read import Z95, Reader
from digits_score import DEFAULT_CFG, FILES, LATENT, load_model, prompts, save_grid, wanted
from pack import ROOT, load_pack

TRAINED = LATENT["video"][1]  # frames


def by_blocks(model, per_block: int):
    """(MODEL, SAMPLER) that keep as many clean frames before a block as the trained length leaves room for."""
    load_pack()
    import comfy.samplers

    from tessera.patching.block_features import NAME, feature_of
    from tessera.patching.block_sampler import BlockSampler
    from tessera.patching.run import attach

    feature = feature_of("frames", None, per_block, max(1, TRAINED // per_block - 1), 0, "model dtype", "device")
    sampler = BlockSampler(NAME, per_block, feature.memory, inner=comfy.samplers.ksampler("euler"))
    return attach(model, feature), sampler


def by_windows(model):
    """(MODEL, SAMPLER) of core's context windows, half of each shared with the next one."""
    import comfy.samplers
    from comfy.context_windows import (
        ContextFuseMethods,
        ContextSchedules,
        IndexListContextHandler,
        create_prepare_sampling_wrapper,
        get_matching_context_schedule,
        get_matching_fuse_method,
    )

    patched = model.clone()
    patched.model_options["context_handler"] = IndexListContextHandler(
        get_matching_context_schedule(ContextSchedules.STATIC_STANDARD),
        get_matching_fuse_method(ContextFuseMethods.PYRAMID),
        context_length=TRAINED,
        context_overlap=TRAINED // 2,
        dim=2,
    )
    create_prepare_sampling_wrapper(patched)
    return patched, comfy.samplers.ksampler("euler")


@torch.inference_mode()
def draw(model, sampler, clips: int, frames: int, steps: int, cfg: float, batch: int) -> torch.Tensor:
    """Clips [N, frames, 32, 32] in 0..1."""
    import comfy.sample
    import comfy.samplers

    from tessera.methods.digits import codec, words

    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    rows = torch.tensor([words.parse(text) for text in prompts("video", clips)])
    noise = torch.stack(
        [
            torch.randn(LATENT["video"][0], frames, *LATENT["video"][2:], generator=torch.Generator().manual_seed(i))
            for i in range(clips)
        ]
    )
    made = []
    for start in range(0, clips, batch):
        at = slice(start, start + batch)
        positive, negative = ([[words.encode(part)[0], {}]] for part in (rows[at], torch.zeros_like(rows[at])))
        made.append(comfy.sample.sample_custom(
            model, noise[at], cfg, sampler, sigmas, positive, negative, torch.zeros_like(noise[at]), disable_pbar=True, seed=0
        ))  # fmt: skip
    return codec.decode(torch.cat(made).float().cpu())


def readable(pixels: torch.Tensor, per_block: int, reader: Reader) -> torch.Tensor:
    """Clips [N, T, H, W] -> whether each block [N, blocks] shows its digit and moves as asked."""
    digits, directions = wanted("video", len(pixels))
    found = []
    for first in range(0, pixels.shape[1], per_block):
        labels, seen = reader.read_clips(pixels[:, first : first + per_block])
        turned = torch.tensor([a == b for a, b in zip(seen, directions, strict=True)])
        found.append((labels == torch.tensor(digits)) & turned)
    return torch.stack(found, 1)


def told(found: torch.Tensor) -> str:
    """The share of blocks [N, blocks] with its 95 % interval, from the spread between clips."""
    each = found.double().mean(1)
    half = Z95 * float(each.std()) / math.sqrt(len(each)) if len(each) > 1 else 1.0
    middle = float(each.mean())
    by_block = " ".join(f"{100 * share:.0f}" for share in found.double().mean(0).tolist())
    low, high = (100 * min(max(middle + sign * half, 0.0), 1.0) for sign in (-1, 1))
    return f"{100 * middle:.1f} % of blocks readable, 95 % interval {low:.1f} to {high:.1f}; by block {by_block}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--times", type=int, default=4, help="the trained length")
    parser.add_argument("--block", type=int, default=4, help="frames")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg", type=float, default=DEFAULT_CFG["video"])
    parser.add_argument("--rival", choices=["no", "too", "only"], default="no", help="core's context windows")
    parser.add_argument("--grid", type=Path, help="write the clips as a picture, one a row")
    args = parser.parse_args()
    model, reader, frames = load_model(ROOT / "models" / FILES["video"]), Reader(), TRAINED * args.times
    ways = {"block by block": (*by_blocks(model, args.block), args.clips)}
    if args.rival != "no":
        ways = {} if args.rival == "only" else ways
        ways["core's context windows"] = (*by_windows(model), 1)  # they take no batch in ComfyUI 0.30
    for name, (patched, sampler, batch) in ways.items():
        start = time.perf_counter()
        pixels = draw(patched, sampler, args.clips, frames, args.steps, args.cfg, batch)
        seconds = time.perf_counter() - start
        print(
            f"{name}, {args.clips} clips of {frames} frames: {told(readable(pixels, args.block, reader))}; {seconds:.0f} s",
            flush=True,
        )
        if args.grid:
            save_grid(pixels, args.grid.with_stem(f"{args.grid.stem}_{name.split()[0].strip(chr(39))}"))


if __name__ == "__main__":
    main()
