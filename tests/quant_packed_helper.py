"""Random packed weights of every codec, and one wide enough to have tails."""

import torch

from tessera.kernels.quant import packed

HALVES = {"q4_0": (0,), "q8_0": (0,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)}  # places of fp16 in a block


def random_packed(codec: str, rows: int, columns: int, group: int = 64, device: str = "cpu") -> packed.Packed:
    """All byte values at random; scales that are finite."""
    size = packed.row_bytes(codec, columns, group)
    data = torch.randint(0, 256, (rows, size), dtype=torch.uint8)
    if codec in packed.GGUF_BLOCKS:
        blocks = data.view(-1, packed.GGUF_BLOCKS[codec][1])
        for at in HALVES[codec]:
            values = ((torch.rand(len(blocks), 1) + 0.5) / 256).half()
            values[::2] *= -1
            blocks[:, at : at + 2] = values.view(torch.uint8).reshape(-1, 2)
        return packed.Packed(codec, columns, data.to(device))
    scale = (torch.rand(rows, -(-columns // group)) + 0.5).to(device)
    bits = packed.TABLE_BITS.get(codec)
    table = torch.randn(2**bits).to(device) if bits else None
    return packed.Packed(codec, columns, data.to(device), scale, table, group)


def parts(weight: packed.Packed) -> tuple:
    """As the custom ops take them: data, scale, table, codec, columns, group."""
    return weight.data, weight.scale, weight.table, weight.codec, weight.columns, weight.group
