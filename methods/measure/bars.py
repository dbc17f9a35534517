"""A profile as a picture: bars of shares by kind of operator, and a strip with a cell for each block."""

from collections.abc import Sequence

import torch

from .heat_map import HEIGHT, INK, PAD, PALE, PAPER, WIDTH, write

COLOURS = {
    "attention": (196, 68, 58), "linear": (40, 110, 170), "convolution": (110, 84, 160), "norm": (214, 152, 60),
    "other": (130, 130, 128), "outside": (80, 140, 110), "profiler": (200, 200, 196),
}  # fmt: skip
WIDE, TALL = 480, 24  # pixels of the longest bar, and of a strip
COLD, HOT = (232, 236, 240), (150, 24, 40)

Bar = tuple[str, float | None, str]  # name, share 0..1 or None, words behind it


def bars(
    title: Sequence[str], groups: Sequence[tuple[str, Sequence[Bar]]], strips: Sequence[tuple[str, Sequence[float]]]
):
    """Picture [1, H, W, 3] in 0..1. groups: a heading and its bars; strips: a heading and one value >= 0 a block."""
    every = [bar for _, rows in groups for bar in rows]
    left = max((len(name) for name, _, _ in every), default=0) * WIDTH + 2 * PAD
    right = max((len(words) for _, _, words in every), default=0) * WIDTH + 2 * PAD
    words = [*title, *(heading for heading, _ in groups), *(heading for heading, _ in strips)]
    width = max(left + WIDE + right, max(map(len, words), default=0) * WIDTH + 2 * PAD)
    line = HEIGHT + PAD
    lines = len(title) + len(every) + len(groups)
    tall = 2 * PAD + line * lines + len(strips) * (line + TALL + 2 * PAD) + PAD * len(groups)
    sheet = torch.tensor(PAPER, dtype=torch.float32).repeat(tall, width, 1)
    y = PAD
    for sentence in title:
        write(sheet, y, PAD, sentence, INK)
        y += line
    for heading, rows in groups:
        y += PAD
        write(sheet, y, PAD, heading, INK)
        y += line
        for name, share, said in rows:
            _bar(sheet, y, left, name, share, said)
            y += line
    for heading, values in strips:
        y += PAD
        write(sheet, y, PAD, heading, INK)
        _strip(sheet, y + line, values, width - 2 * PAD)
        y += line + TALL + PAD
    return (sheet / 255)[None]


def _bar(sheet: torch.Tensor, y: int, left: int, name: str, share: float | None, said: str) -> None:
    write(sheet, y, PAD, name, INK)
    sheet[y : y + HEIGHT, left : left + WIDE] = torch.tensor(PALE, dtype=torch.float32)
    wide = round(WIDE * min(1.0, max(0.0, share or 0.0)))
    if share and share > 0:
        fill = torch.tensor(COLOURS.get(name.lower(), COLOURS["other"]), dtype=torch.float32)
        sheet[y : y + HEIGHT, left : left + max(1, wide)] = fill
    write(sheet, y, left + WIDE + PAD, said, INK)


def _strip(sheet: torch.Tensor, y: int, values: Sequence[float], wide: int) -> None:
    """Cells from cold to hot, the hottest block hot."""
    top = max([*values, 0.0]) or 1.0
    edges = [PAD + round(wide * i / max(1, len(values))) for i in range(len(values) + 1)]
    cold, hot = torch.tensor(COLD, dtype=torch.float32), torch.tensor(HOT, dtype=torch.float32)
    for value, x, end in zip(values, edges, edges[1:], strict=False):
        gap = 1 if end - x > 3 else 0
        sheet[y : y + TALL, x : end - gap] = cold + (hot - cold) * (max(0.0, value) / top)
