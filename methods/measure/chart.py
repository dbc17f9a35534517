"""Speed against loss as a picture, in the letters of heat_map.py."""

from typing import Any

import torch

from .heat_map import HEIGHT, INK, PAD, PALE, PAPER, WIDTH, text

SIZE = (560, 360)  # pixels of the field, width and height
LEFT, BELOW = 9 * WIDTH, 3 * (HEIGHT + PAD)
FRONT, BEATEN = (11, 110, 190), (150, 150, 150)
SIDE = 9  # pixels of a point


def front_chart(points: list[dict[str, Any]], loss_of: str) -> torch.Tensor:
    """Picture [1, H, W, 3] in 0..1 of points with name, ratio (times faster), loss and front; numbered as in the list under
    the field. loss_of: what the loss is. A line joins the front."""
    width, height = SIZE
    listed = [f"{n + 1} {p['name']}: {p['ratio']:.2f}X, {p['loss']:.4f}" for n, p in enumerate(points)]
    across = max([LEFT + width + 4 * WIDTH, *(len(line) * WIDTH + 2 * PAD for line in listed)])
    sheet = torch.tensor(PAPER, dtype=torch.float32).repeat(
        2 * PAD + HEIGHT + height + BELOW + len(listed) * (HEIGHT + PAD), across, 1
    )
    top = PAD + HEIGHT + PAD
    high = max([1.0, *(p["ratio"] for p in points)]) * 1.05
    worst = max([1e-3, *(p["loss"] for p in points)]) * 1.05
    place = lambda p: (top + round(p["loss"] / worst * height), LEFT + round(p["ratio"] / high * width))  # noqa: E731
    _write(sheet, PAD, PAD, f"{loss_of}, down is worse: times faster, right is faster", INK)
    for part in (0.0, 0.5, 1.0):
        y, x = top + round(part * (height - 1)), LEFT + round(part * (width - 1))
        _line(sheet, (y, LEFT), (y, LEFT + width - 1), PALE)
        _line(sheet, (top, x), (top + height - 1, x), PALE)
        _write(sheet, min(y, top + height - HEIGHT), PAD, f"{part * worst:.3f}", INK)
        label = f"{part * high:.1f}X"
        _write(sheet, top + height + PAD, x - len(label) * WIDTH // 2, label, INK)
    leading = sorted((p for p in points if p["front"]), key=lambda p: p["ratio"])
    for a, b in zip(leading, leading[1:], strict=False):
        _line(sheet, place(a), place(b), FRONT)
    for n, p in enumerate(points):
        y, x = place(p)
        _point(sheet, y, x, FRONT if p["front"] else BEATEN)
        _write(sheet, y - HEIGHT // 2, x + SIDE, str(n + 1), INK)
    for n, line in enumerate(listed):
        _write(sheet, top + height + BELOW - PAD + n * (HEIGHT + PAD), PAD, line, INK)
    return (sheet / 255)[None]


def _write(sheet: torch.Tensor, y: int, x: int, words: str, ink: tuple[int, int, int]) -> None:
    dots = text(words)[:, : max(0, sheet.shape[1] - x)]
    if y >= 0 and x >= 0:
        sheet[y : y + HEIGHT, x : x + dots.shape[1]][dots] = torch.tensor(ink, dtype=torch.float32)


def _point(sheet: torch.Tensor, y: int, x: int, ink: tuple[int, int, int]) -> None:
    half = SIDE // 2
    sheet[max(0, y - half) : y + half + 1, max(0, x - half) : x + half + 1] = torch.tensor(ink, dtype=torch.float32)


def _line(sheet: torch.Tensor, a: tuple[int, int], b: tuple[int, int], ink: tuple[int, int, int]) -> None:
    count = max(abs(a[0] - b[0]), abs(a[1] - b[1])) + 1
    ys, xs = (torch.linspace(a[n], b[n], count).round().long().clamp(0, sheet.shape[n] - 1) for n in (0, 1))
    sheet[ys, xs] = torch.tensor(ink, dtype=torch.float32)


def strip(pictures: list[torch.Tensor]) -> torch.Tensor:
    """Images [N, H, W, C] of each model. Two: a, b and their stretched difference, side by side. More: one row of pictures
    above one of their differences from the first."""
    first = pictures[0]
    apart = [(p - first).abs() for p in pictures]
    most = max(float(d.max()) for d in apart) or 1.0
    if len(pictures) == 2:
        return torch.cat([*pictures, apart[1] / max(most, 1e-6)], dim=2)
    return torch.cat([torch.cat(pictures, 2), torch.cat([d / max(most, 1e-6) for d in apart], 2)], dim=1)
