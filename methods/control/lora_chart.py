"""A response curve as a picture: what was measured, the fit, and the straight line that calibration makes of it."""

import torch

from ..measure.heat_map import HEIGHT, INK, PAD, PALE, PAPER, WIDTH, text
from .lora_curve import Curve

SIDE = 320  # pixels of the plot
LEFT, UNDER = 7 * WIDTH, HEIGHT + 2 * PAD
FIT, MEASURED, LINEAR = (58, 140, 92), (196, 68, 58), (150, 150, 160)


def chart(curve: Curve) -> torch.Tensor:
    """[1, H, W, 3] in 0..1: amount over strength."""
    title = [curve.lora, "amount over strength", "dots measured, green fitted, grey calibrated"]
    top = PAD + len(title) * (HEIGHT + PAD)
    width = max(LEFT + SIDE + 3 * PAD, max(len(words) for words in title) * WIDTH + 2 * PAD)
    sheet = torch.tensor(PAPER, dtype=torch.float32).repeat(top + SIDE + UNDER + 2 * PAD, width, 1)
    for i, words in enumerate(title):
        _write(sheet, PAD + i * (HEIGHT + PAD), PAD, words)
    x0, x1 = curve.strengths[0], curve.strengths[-1]
    amounts = [curve.amount(x0 + (x1 - x0) * i / (SIDE - 1)) for i in range(SIDE)]
    raw = [_raw(curve, value) for value in curve.signed]
    low, high = min(0.0, x0, *amounts, *raw), max(1.0, x1, *amounts, *raw)
    plot = sheet[top : top + SIDE, LEFT : LEFT + SIDE]

    def row(value: float) -> int:
        return round((SIDE - 1) * (high - value) / (high - low))

    def column(value: float) -> int:
        return round((SIDE - 1) * (value - x0) / (x1 - x0))

    for mark in (0.0, 0.5, 1.0, 1.5):
        if low <= mark <= high:
            plot[row(mark)] = torch.tensor(PALE, dtype=torch.float32)
            _write(sheet, top + row(mark) - HEIGHT // 2, PAD, f"{mark:g}")
        if x0 <= mark <= x1:
            plot[:, column(mark)] = torch.tensor(PALE, dtype=torch.float32)
            _write(sheet, top + SIDE + PAD, LEFT + column(mark) - WIDTH // 2, f"{mark:g}")
    straight = [x0 + (x1 - x0) * i / (SIDE - 1) for i in range(SIDE)]
    _line(plot, [row(value) for value in straight], LINEAR)
    _line(plot, [row(value) for value in amounts], FIT)
    for strength, value in zip(curve.strengths, raw, strict=True):
        y, x = row(value), column(strength)
        plot[max(0, y - 3) : y + 4, max(0, x - 3) : x + 4] = torch.tensor(MEASURED, dtype=torch.float32)
    return (sheet / 255)[None]


def _raw(curve: Curve, response: float) -> float:
    zero, one = curve.at(0.0), curve.at(1.0)
    return (response - zero) / (one - zero)


def _line(plot: torch.Tensor, rows: list[int], ink: tuple[int, int, int]) -> None:
    """One pixel row for each column of plot [H, W, 3], joined."""
    before = rows[0]
    for x, y in enumerate(rows):
        first, last = sorted((before, y))
        plot[max(0, first - 1) : last + 1, x] = torch.tensor(ink, dtype=torch.float32)
        before = y


def _write(sheet: torch.Tensor, y: int, x: int, words: str) -> None:
    dots = text(words)[: sheet.shape[0] - y, : max(0, sheet.shape[1] - x)]
    sheet[y : y + dots.shape[0], x : x + dots.shape[1]][dots] = torch.tensor(INK, dtype=torch.float32)
