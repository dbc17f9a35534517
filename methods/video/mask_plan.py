"""Which places of a video latent are given and which are to be made: the tasks of VDT's unified mask modelling (arXiv
2305.13311), as masks [T, H, W] over latent cells, 1 where something is to be made.

Frames are counted in the video. Behind a causal VAE of temporal stride s, latent frame 0 holds frame 0 and latent frame i
holds frames (i - 1) s + 1 .. i s."""

import re
from collections.abc import Iterable

import torch
import torch.nn.functional as F

TASKS = ("predict", "backward", "interpolate", "frames", "single", "random", "spatial", "unconditional")
OPERATIONS = ("union", "intersection", "difference", "either_one")
RANGE = re.compile(r"(-?\d+)(?::(-?\d+))?")
TRIES = 10_000


def frames_of(latent_frames: int, stride: int) -> int:
    """Frames of the video."""
    return (latent_frames - 1) * stride + 1


def latent_of(frame: int, stride: int) -> int:
    """The latent frame that holds this frame."""
    return -(-frame // stride)


def held(latent: int, stride: int) -> range:
    """The frames that this latent frame holds."""
    return range(0, 1) if latent == 0 else range((latent - 1) * stride + 1, latent * stride + 1)


def indices(text: str, frames: int) -> list[int]:
    """'0, 8:11, -1' -> frames 0, 8 to 11 and the last one. ValueError for others, and for frames that are not there."""
    found: list[int] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = RANGE.fullmatch(part)
        if match is None:
            raise ValueError(
                f"frame_indices {part!r} is no frame; write numbers and ranges with commas, such as 0, 8:11, -1."
            )
        first, last = (int(g) if g is not None else int(match[1]) for g in match.groups())
        if not all(-frames <= f < frames for f in (first, last)):
            raise ValueError(f"frame_indices {part!r} lies outside of the video's {frames} frames (0 to {frames - 1}).")
        first, last = first % frames, last % frames
        if last < first:
            raise ValueError(f"frame_indices {part!r} runs backwards; write the earlier frame first.")
        found.extend(range(first, last + 1))
    if not found:
        raise ValueError("frame_indices is empty; write the frames that are given, such as 0, 8:11, -1.")
    return found


def given_frames(
    task: str, latent_frames: int, given: int, stride: int, text: str, ratio: float, seed: int, causal: int
) -> set[int]:
    """The latent frames that are given, for the tasks that give whole frames. A run of given frames gives a latent frame
    where it covers all that it holds; single keyframes give the latent frame that they are in."""
    frames = frames_of(latent_frames, causal)
    every = range(latent_frames)
    if task == "predict":
        return {i for i in every if held(i, causal)[-1] < given}
    if task == "backward":
        return {i for i in every if held(i, causal)[0] >= frames - given}
    if task == "interpolate":
        return {latent_of(f, causal) for f in range(0, frames, stride)}
    if task == "frames":
        return {latent_of(f, causal) for f in indices(text, frames)}
    generator = torch.Generator().manual_seed(seed)
    if task == "single":
        return {int(torch.randint(latent_frames, (1,), generator=generator))}
    if task == "random":
        order = torch.randperm(latent_frames, generator=generator).tolist()
        return set(order[round(latent_frames * ratio) :])
    return set()


def plan(
    task: str, shape: tuple[int, int, int], given: int = 8, stride: int = 16, text: str = "", ratio: float = 0.5, seed: int = 0,
    causal: int = 4, feather: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Mask [T, H, W] of a latent of that shape. ValueError where nothing would be given, or nothing made, against the task."""
    frames, height, width = shape
    if task == "spatial":
        mask = blocks(height, width, ratio, seed)[None].repeat(frames, 1, 1)
    else:
        known = given_frames(task, frames, given, stride, text, ratio, seed, causal)
        mask = torch.ones(shape)
        mask[sorted(known)] = 0.0
    check(task, mask, frames_of(frames, causal), causal)
    return feathered(mask, feather, task == "spatial")


def check(task: str, mask: torch.Tensor, frames: int, causal: int) -> None:
    what = f"The task {task} on {mask.shape[0]} latent frames ({frames} frames at causal_stride {causal})"
    if not mask.any():
        raise ValueError(f"{what} gives every place and leaves nothing to make; give less, or check causal_stride.")
    if task != "unconditional" and mask.all():
        raise ValueError(f"{what} gives no whole latent frame; give more, or check causal_stride.")


def blocks(height: int, width: int, ratio: float, seed: int) -> torch.Tensor:
    """Mask [H, W] of rectangles at random places, after BEiT's block-wise masking, of round(ratio H W) cells."""
    generator = torch.Generator().manual_seed(seed)
    mask, wanted = torch.zeros(height, width), round(ratio * height * width)
    for _ in range(TRIES):
        missing = wanted - int(mask.sum())
        if missing <= 0:
            break
        area = missing * float(torch.empty(1).uniform_(0.3, 1.0, generator=generator))
        aspect = float(torch.empty(1).uniform_(-1.2, 1.2, generator=generator).exp())
        rows = min(max(round((area * aspect) ** 0.5), 1), height)
        columns = min(max(round((area / aspect) ** 0.5), 1), width)
        top = int(torch.randint(height - rows + 1, (1,), generator=generator))
        left = int(torch.randint(width - columns + 1, (1,), generator=generator))
        new = torch.zeros_like(mask)
        new[top : top + rows, left : left + columns] = 1.0
        if int(torch.maximum(mask, new).sum()) <= wanted:
            mask = torch.maximum(mask, new)
    missing = wanted - int(mask.sum())
    if missing > 0:  # no rectangle fitted any more
        mask.view(-1)[(mask.flatten() == 0).nonzero()[:missing, 0]] = 1.0
    return mask


def feathered(mask: torch.Tensor, cells: int, spatial: bool) -> torch.Tensor:
    """A place to be made that is d latent frames (or cells, in space) from a given one gets d / (cells + 1), at most 1."""
    if cells == 0:
        return mask
    window = (1, 3, 3) if spatial else (3, 1, 1)
    padding = tuple(w // 2 for w in window)
    near, made = 1 - mask, mask.clone()
    for d in range(1, cells + 1):
        wider = F.max_pool3d(near[None, None], window, stride=1, padding=padding)[0, 0]
        made = torch.where((wider > 0) & (near == 0), d / (cells + 1), made)
        near = wider
    return made


def compose(a: torch.Tensor, b: torch.Tensor, operation: str) -> torch.Tensor:
    """Masks of one shape, 0 to 1. union: made where either is; intersection: where both are; difference: where a is and
    b is not; either_one: where exactly one is."""
    if operation == "union":
        return torch.maximum(a, b)
    if operation == "intersection":
        return torch.minimum(a, b)
    if operation == "difference":
        return torch.minimum(a, 1 - b)
    return torch.maximum(torch.minimum(a, 1 - b), torch.minimum(b, 1 - a))


def words(given: Iterable[int]) -> str:
    """Runs of numbers, '0-3, 7'."""
    runs: list[list[int]] = []
    for number in sorted(given):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs) or "none"
