"""Handwritten digits (the 8x8 set that scikit-learn ships) as images and as moving clips."""

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate

HELD_OUT = 297  # the last digits of the set, by other writers, never trained on
IMAGE_SIDE, IMAGE_DIGIT, IMAGE_JITTER = 128, 96, 8
CLIP_SIDE, CLIP_DIGIT, CLIP_FRAMES = 32, 16, 8
# Clips start on a raster of one token of the model, so that few shifts within a token are to be learnt. In a clip a digit
# moves less than half around, so that on average "left" lies left: from 4 pixels a frame on, positions cancel over a
# clip, and the model learns the axis of a motion long before its sign.
CLIP_START, CLIP_STEP = 8, 2  # pixels, pixels a frame
VELOCITY = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (dy, dx) a frame, in CLIP_STEP pixels


def real_digits(held_out: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, 8, 8] in 0..1 and labels [N]."""
    data = load_digits()
    part = slice(-HELD_OUT, None) if held_out else slice(0, -HELD_OUT)
    return torch.tensor(data.images[part] / 16, dtype=torch.float32), torch.tensor(data.target[part])


def enlarge(digits: torch.Tensor, side: int) -> torch.Tensor:
    """[N, 8, 8] -> [N, side, side], bicubic, clamped to 0..1."""
    return interpolate(digits[:, None], size=(side, side), mode="bicubic", antialias=False)[:, 0].clamp(0, 1)


def images(digits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """[N, 8, 8] -> [N, 128, 128]: each digit near the middle of a black square."""
    out = torch.zeros(len(digits), IMAGE_SIDE, IMAGE_SIDE)
    middle = (IMAGE_SIDE - IMAGE_DIGIT) // 2
    places = torch.randint(middle - IMAGE_JITTER, middle + IMAGE_JITTER + 1, (len(digits), 2), generator=generator)
    places = places.tolist()
    for canvas, digit, (y, x) in zip(out, enlarge(digits, IMAGE_DIGIT), places, strict=True):
        canvas[y : y + IMAGE_DIGIT, x : x + IMAGE_DIGIT] = digit
    return out


def clips(digits: torch.Tensor, directions: list[str], generator: torch.Generator) -> torch.Tensor:
    """[N, 8, 8] and N directions -> [N, 8, 32, 32]: each digit moves and wraps around, from a random place
    on the raster of CLIP_START pixels."""
    still = torch.zeros(len(digits), CLIP_SIDE, CLIP_SIDE)
    still[:, :CLIP_DIGIT, :CLIP_DIGIT] = enlarge(digits, CLIP_DIGIT)
    starts = torch.randint(0, CLIP_SIDE // CLIP_START, (len(digits), 2), generator=generator) * CLIP_START
    out = torch.empty(len(digits), CLIP_FRAMES, CLIP_SIDE, CLIP_SIDE)
    for clip, digit, direction, (y, x) in zip(out, still, directions, starts.tolist(), strict=True):
        dy, dx = VELOCITY[direction]
        for t in range(CLIP_FRAMES):
            clip[t] = digit.roll((y + t * dy * CLIP_STEP, x + t * dx * CLIP_STEP), (0, 1))
    return out
