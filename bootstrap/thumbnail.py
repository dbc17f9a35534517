"""The picture beside a workflow in the template browser: what the workflow makes."""

import math
from pathlib import Path

from PIL import Image, ImageSequence

SIDE, PICTURES, QUALITY = 512, 16, 85  # pixels of its longer side, pictures on it at most, JPEG quality


def pictures(files: list[Path]) -> list[Image.Image]:
    """Every picture of the files, and every frame of the moving ones."""
    out = []
    for file in files:
        with Image.open(file) as opened:
            out += [frame.convert("RGB") for frame in ImageSequence.Iterator(opened)]
    return out


def save_thumbnail(files: list[Path], path: Path) -> None:
    """The first PICTURES pictures side by side, enlarged by a whole number to about SIDE pixels."""
    shown = pictures(files)[:PICTURES]
    if not shown:
        raise ValueError(f"{path.stem} shows no picture, so it has no thumbnail. Let it end in Save Image.")
    columns = math.ceil(math.sqrt(len(shown)))
    width, height = shown[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(shown) / columns) * height))
    for i, picture in enumerate(shown):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    scale = max(1, round(SIDE / max(sheet.size)))
    sheet = sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)
    if max(sheet.size) > 2 * SIDE:
        sheet.thumbnail((SIDE, SIDE))
    sheet.save(path, quality=QUALITY)
