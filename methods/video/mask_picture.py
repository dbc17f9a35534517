"""A plan of a video's mask as a picture: one tile a latent frame, blue what is given, white what is made."""

import torch

from ..measure.heat_map import HEIGHT, INK, PAD, PAPER, text

SIDE = 64  # pixels of a tile's longer side, at least
ACROSS = 12  # tiles in a row
GIVEN, MADE = (58, 100, 170), (236, 236, 232)


def picture(mask: torch.Tensor) -> torch.Tensor:
    """mask [T, H, W] of 0..1, 1 is made -> [1, height, width, 3] of 0..1."""
    frames, rows, columns = mask.shape
    scale = max(1, -(-SIDE // max(rows, columns)))
    tall, wide = rows * scale, columns * scale
    across = min(frames, ACROSS)
    down = -(-frames // across)
    sheet = torch.tensor(PAPER, dtype=torch.float32)
    sheet = sheet.repeat(PAD + down * (tall + HEIGHT + 2 * PAD), PAD + across * (wide + PAD), 1)
    given, made = torch.tensor(GIVEN, dtype=torch.float32), torch.tensor(MADE, dtype=torch.float32)
    for i, tile in enumerate(mask.float().cpu()):
        top, left = PAD + i // across * (tall + HEIGHT + 2 * PAD), PAD + i % across * (wide + PAD)
        large = tile.repeat_interleave(scale, 0).repeat_interleave(scale, 1)[..., None]
        sheet[top : top + tall, left : left + wide] = given + (made - given) * large
        dots = text(str(i))[:, :wide]
        under = top + tall + PAD // 2
        sheet[under : under + HEIGHT, left : left + dots.shape[1]][dots] = torch.tensor(INK, dtype=torch.float32)
    return (sheet / 255)[None]
