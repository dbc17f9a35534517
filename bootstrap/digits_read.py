"""Reads what the digit models draw: a classifier trained on the real digits only, the direction of a clip, and the
interval that belongs to a paired comparison."""

import math

import torch
from digits_data import IMAGE_DIGIT, IMAGE_SIDE, VELOCITY, clips, images, real_digits
from sklearn.svm import SVC
from torch.nn.functional import avg_pool2d, pad

CELLS = 10  # side of the window that is read, in cells of the 8x8 originals
SIDE = 2 * CELLS  # the window in pixels: two a cell, as in the clips
INK = 0.25  # what is darker than this share of the brightest pixel is background
ORIENTATIONS = 8
SHIFTS = ((0, 0), (1, -1), (-1, 1))  # augmentation, in pixels of the window
Z95 = 1.959964


def _middle(ink: torch.Tensor) -> torch.Tensor:
    """Middle of profiles [N, L] on a ring, in pixels [N]: the phase of the first harmonic."""
    length = ink.shape[-1]
    angle = torch.arange(length, dtype=torch.float64) * (2 * math.pi / length)
    wave = torch.complex(angle.cos(), angle.sin())
    return (ink.to(wave.dtype) @ wave).angle() * (length / (2 * math.pi)) % length


def windows(pixels: torch.Tensor, side: int, shift: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """Pictures [N, H, W] that wrap around -> [N, side, side], centred on the ink and then moved by `shift`."""
    ink = (pixels - INK * pixels.amax((-2, -1), keepdim=True)).clamp_min(0)
    rows, columns = _middle(ink.sum(-1)).round().long(), _middle(ink.sum(-2)).round().long()
    across = torch.arange(side) - side // 2
    y = (rows[:, None] - shift[0] + across) % pixels.shape[-2]
    x = (columns[:, None] - shift[1] + across) % pixels.shape[-1]
    return pixels[torch.arange(len(pixels))[:, None, None], y[:, :, None], x[:, None, :]]


def from_images(pixels: torch.Tensor, shift: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """Pictures [N, 128, 128] -> windows [N, 20, 20]."""
    if pixels.ndim != 3 or pixels.shape[-2:] != (IMAGE_SIDE, IMAGE_SIDE):
        raise ValueError(f"Digits are read from [N, {IMAGE_SIDE}, {IMAGE_SIDE}] pictures, got {list(pixels.shape)}.")
    scale = IMAGE_DIGIT // 8 // 2
    framed = pad(pixels, (IMAGE_SIDE // 2,) * 4)  # an image does not wrap: black keeps its edges apart
    return avg_pool2d(windows(framed, SIDE * scale, (shift[0] * scale, shift[1] * scale))[:, None], scale)[:, 0]


def from_clips(pixels: torch.Tensor, shift: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """Clips [N, T, H, W] -> windows [N, 20, 20]: the digit is located in every frame, then averaged."""
    if pixels.ndim != 4:
        raise ValueError(f"Moving digits are read from [N, T, H, W] clips, got {list(pixels.shape)}.")
    return windows(pixels.flatten(0, 1), SIDE, shift).unflatten(0, pixels.shape[:2]).mean(1)


def gradients(window: torch.Tensor) -> torch.Tensor:
    """Windows [N, 20, 20] -> [N, 648] histograms of gradient orientation (Dalal and Triggs 2005), unit length."""
    smooth = avg_pool2d(pad(window[:, None], (1,) * 4), 3, 1)
    down = pad(smooth[:, :, 2:] - smooth[:, :, :-2], (0, 0, 1, 1))
    right = pad(smooth[..., 2:] - smooth[..., :-2], (1, 1))
    turn = torch.atan2(down, right) * (ORIENTATIONS / (2 * math.pi))
    distance = turn - torch.arange(ORIENTATIONS).view(1, -1, 1, 1)
    distance = (distance + ORIENTATIONS / 2) % ORIENTATIONS - ORIENTATIONS / 2
    votes = (1 - distance.abs()).clamp_min(0) * (down.square() + right.square()).sqrt()
    histograms = avg_pool2d(votes, 4, 2).flatten(1).sqrt()
    return histograms / histograms.norm(dim=1, keepdim=True).clamp_min(1e-6)


def directions(pixels: torch.Tensor) -> list[str]:
    """Clips [N, T, H, W] -> "left", "right", "up" or "down", the direction most pairs of frames move in, or "none"
    where most pairs do not move. A pair's motion is the peak of its circular cross-correlation."""
    height, width = pixels.shape[-2:]
    spectra = torch.fft.rfft2(pixels - pixels.mean((-2, -1), keepdim=True))
    peaks = torch.fft.irfft2(spectra[:, 1:] * spectra[:, :-1].conj(), s=(height, width)).flatten(-2).argmax(-1)
    dy = (peaks // width + height // 2) % height - height // 2
    dx = (peaks % width + width // 2) % width - width // 2
    names = ("none", *VELOCITY)
    sideways = torch.where(dx < 0, names.index("left"), names.index("right"))
    upright = torch.where(dy < 0, names.index("up"), names.index("down"))
    votes = torch.where(dx.abs() > dy.abs(), sideways, upright)
    votes = torch.where(torch.maximum(dx.abs(), dy.abs()) > 0, votes, 0)
    return [names[int(row.bincount(minlength=len(names)).argmax())] for row in votes]


class Reader:
    """A support vector classifier of pictures and clips, trained on the real digits that the models train on."""

    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        digits, labels = real_digits()
        picks = torch.randint(0, len(VELOCITY), (len(digits),), generator=generator).tolist()
        stills = images(digits, generator)
        moving = clips(digits, [list(VELOCITY)[i] for i in picks], generator)
        rows = [
            gradients(cut(drawn, s)) for cut, drawn in ((from_images, stills), (from_clips, moving)) for s in SHIFTS
        ]
        self._model = SVC(C=10, gamma=1.0).fit(torch.cat(rows).numpy(), labels.repeat(len(rows)).numpy())

    def _labels(self, window: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._model.predict(gradients(window).numpy()))

    def read_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pictures [N, 128, 128] in 0..1 -> labels [N]."""
        return self._labels(from_images(pixels.float().cpu()))

    def read_clips(self, pixels: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
        """Clips [N, T, H, W] in 0..1 -> labels [N] and N directions (see `directions`)."""
        pixels = pixels.float().cpu()
        return self._labels(from_clips(pixels)), directions(pixels)


def paired_difference(plain: torch.Tensor, other: torch.Tensor) -> tuple[float, float, float]:
    """Right or wrong [N] of the same samples twice -> other - plain as a share, and its 95 % interval (low, high).

    Agresti and Min 2005: the interval of the paired difference after half a sample is added to every cell of the
    2x2 table, which keeps its width honest where few samples change. Identical answers still leave a width."""
    if plain.shape != other.shape or plain.ndim != 1 or len(plain) == 0:
        raise ValueError(
            f"A paired difference needs two equally long rows, got {list(plain.shape)}, {list(other.shape)}."
        )
    gained = int((other.bool() & ~plain.bool()).sum())
    lost = int((plain.bool() & ~other.bool()).sum())
    count, better, worse = len(plain) + 2, gained + 0.5, lost + 0.5
    middle = (better - worse) / count
    half = Z95 * math.sqrt(better + worse - (better - worse) ** 2 / count) / count
    return (gained - lost) / len(plain), middle - half, middle + half
