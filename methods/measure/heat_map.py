"""A table of shares as a picture: numbers in coloured cells, with names of rows and columns, in a small own font."""

from collections.abc import Callable

import torch

GLYPHS = {  # 7 rows of 5 dots from the top, each row a digit of base 32
    "0": "ehjlphe", "1": "4c4444e", "2": "eh1248v", "3": "v2421he", "4": "26aiv22", "5": "vgu11he", "6": "68guhhe",
    "7": "v124888", "8": "ehhehhe", "9": "ehhf12c", "A": "ehhvhhh", "B": "uhhuhhu", "C": "ehggghe", "D": "uhhhhhu",
    "E": "vgguggv", "F": "vgguggg", "G": "ehgnhhf", "H": "hhhvhhh", "I": "e44444e", "J": "72222ic", "K": "hikokih",
    "L": "ggggggv", "M": "hrllhhh", "N": "hhpljhh", "O": "ehhhhhe", "P": "uhhuggg", "Q": "ehhhlid", "R": "uhhukih",
    "S": "fgge11u", "T": "v444444", "U": "hhhhhhe", "V": "hhhhha4", "W": "hhhllla", "X": "hha4ahh", "Y": "hha4444",
    "Z": "v1248gv", " ": "0000000", ".": "00000cc", ",": "0000448", "%": "op248j3", "-": "000v000", ":": "0cc0cc0",
    "/": "01248g0", "=": "00v0v00", "(": "2488842", ")": "8422248", "<": "248g842", ">": "8421248", "+": "044v440",
}  # fmt: skip
DOT = 2  # pixels a side
WIDTH, HEIGHT = 6 * DOT, 7 * DOT  # of a letter, with the gap after it
PAD = 4 * DOT
PAPER, INK, PALE = (250, 250, 247), (28, 28, 30), (225, 225, 222)
STOPS = (0.0, 0.5, 0.8, 0.9, 0.95, 1.0)  # shares, and their colours: what lies high is told apart best
COLOURS = ((110, 24, 44), (196, 68, 58), (240, 150, 92), (250, 220, 130), (180, 214, 130), (58, 140, 92))


def text(words: str) -> torch.Tensor:
    """bool [HEIGHT, length * WIDTH], the dots of a line; letters that the font lacks are blank."""
    if not words:
        return torch.zeros(HEIGHT, 0, dtype=torch.bool)
    rows = torch.tensor([[int(c, 32) for c in GLYPHS.get(letter, GLYPHS[" "])] for letter in words.upper()])
    dots = rows[..., None] << 1 >> torch.arange(5, -1, -1)  # [letters, 7, 6], the last one the gap
    line = (dots & 1).bool().permute(1, 0, 2).flatten(1)
    return line.repeat_interleave(DOT, 0).repeat_interleave(DOT, 1)


def colour(share: float | None) -> tuple[int, int, int]:
    """Of a share 0..1, between the stops; PALE for what was not measured."""
    if share is None:
        return PALE
    share = min(1.0, max(0.0, share))
    at = max(i for i, stop in enumerate(STOPS[:-1]) if share >= stop)
    part = (share - STOPS[at]) / (STOPS[at + 1] - STOPS[at])
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(COLOURS[at], COLOURS[at + 1], strict=True))
    return red, green, blue


def heat_map(
    title: list[str],
    corner: str,
    columns: list[str],
    rows: list[tuple[str, list[float | None], str]],
    last: str,
    shade: Callable[[float], float] = float,
) -> torch.Tensor:
    """Picture [1, H, W, 3] in 0..1. rows: name, a share or None for each of the columns, and what stands in the `last`
    column; corner names rows and columns. shade: the share that a number is coloured as, where it is none itself."""
    cell = max([7, *(len(name) + 1 for name in columns)]) * WIDTH
    left = max([len(corner), *(len(name) for name, _, _ in rows)]) * WIDTH + 2 * PAD
    right = max([len(last), *(len(words) for _, _, words in rows)]) * WIDTH + 2 * PAD
    line, top = HEIGHT + 2 * PAD, PAD + len(title) * (HEIGHT + PAD)
    width = max(left + cell * len(columns) + right, max((len(words) for words in title), default=0) * WIDTH + 2 * PAD)
    sheet = torch.tensor(PAPER, dtype=torch.float32).repeat(top + line * (len(rows) + 1) + PAD, width, 1)
    for i, words in enumerate(title):
        write(sheet, PAD + i * (HEIGHT + PAD), PAD, words, INK)
    end = left + cell * len(columns)
    write(sheet, top + PAD, PAD, corner, INK)
    for j, name in enumerate(columns):
        write(sheet, top + PAD, left + j * cell + (cell - len(name) * WIDTH) // 2, name, INK)
    write(sheet, top + PAD, end + PAD, last, INK)
    for i, (name, shares, words) in enumerate(rows):
        y = top + (i + 1) * line
        write(sheet, y + PAD, left - PAD - len(name) * WIDTH, name, INK)
        for j, share in enumerate(shares):
            x, fill = left + j * cell, colour(None if share is None else shade(share))
            sheet[y : y + line - DOT, x : x + cell - DOT] = torch.tensor(fill, dtype=torch.float32)
            number = "-" if share is None else f"{share:.3f}"
            dark = 0.3 * fill[0] + 0.59 * fill[1] + 0.11 * fill[2] < 110
            write(sheet, y + PAD - DOT // 2, x + (cell - len(number) * WIDTH) // 2, number, PAPER if dark else INK)
        write(sheet, y + PAD, end + PAD, words, INK)
    return (sheet / 255)[None]


def write(sheet: torch.Tensor, y: int, x: int, words: str, ink: tuple[int, int, int]) -> None:
    """Into sheet [H, W, 3] with the upper left corner at (y, x); what does not fit is cut."""
    dots = text(words)[: sheet.shape[0] - y, : max(0, sheet.shape[1] - x)]
    sheet[y : y + dots.shape[0], x : x + dots.shape[1]][dots] = torch.tensor(ink, dtype=torch.float32)
