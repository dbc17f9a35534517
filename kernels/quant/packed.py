"""Packed weights: what one quantized Linear weight [N, K] consists of, and its exact decoding in plain torch.

Codecs with our own packing, in groups of `group` columns (the last one padded with zeros):
  table4   w = scale[n, k // group] * table[q], 4-bit q. In a group, byte j holds column j (low four bits) and column
           j + group/2 (high), so that a tile decodes into two halves without interleaving.
  table3   the same with 3-bit q, in planes: group/4 bytes with the two low bits (byte j: columns j, j + group/4, ...,
           two bits each, lowest first), then group/8 bytes with the high bit (byte j: columns j, j + group/8, ...).
  int8     w = scale[n, k // group] * q, q int8 stored as bytes; group K is one scale a row.
Codecs of GGUF files, whose blocks carry their scales within the bytes: q4_0, q8_0 (blocks of 32 columns), q4_k, q5_k,
q6_k (blocks of 256), as ggml-common.h lays them out.
"""

from dataclasses import dataclass

import torch

GGUF_BLOCKS = {
    "q4_0": (32, 18),
    "q8_0": (32, 34),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
}  # columns, bytes
TABLE_BITS = {"table4": 4, "table3": 3}
CODECS = (*TABLE_BITS, "int8", *GGUF_BLOCKS)
CPU_CHUNK, GPU_CHUNK = 1 << 20, 1 << 24  # elements decoded at once: on a CPU what they pass through stays in the cache


@dataclass(frozen=True)
class Packed:
    """One weight. data uint8 [N, bytes of a row]; scale floating [N, groups] and table floating [2**bits] where the codec
    has them. ValueError where the parts do not fit each other."""

    codec: str
    columns: int  # K
    data: torch.Tensor
    scale: torch.Tensor | None = None
    table: torch.Tensor | None = None
    group: int = 64

    def __post_init__(self):
        check(self.codec, self.columns, self.data, self.scale, self.table, self.group)


def row_bytes(codec: str, columns: int, group: int = 64) -> int:
    """Bytes of one row. ValueError for a codec that does not exist or columns that do not fit its blocks."""
    if codec in GGUF_BLOCKS:
        block, size = GGUF_BLOCKS[codec]
        if columns % block:
            raise ValueError(f"{codec} packs blocks of {block} columns, and the weight has {columns}.")
        return columns // block * size
    if codec == "int8":
        return columns
    if codec not in TABLE_BITS:
        raise ValueError(f"Unknown codec {codec!r}. Known are {', '.join(CODECS)}.")
    if group < 8 or group % 8:
        raise ValueError(f"{codec} needs a group of a multiple of 8 columns, got {group}.")
    return -(-columns // group) * group * TABLE_BITS[codec] // 8


def check(codec: str, columns: int, data: torch.Tensor, scale, table, group: int) -> None:
    """Raises ValueError, with the sizes, where the parts of a packed weight do not fit each other."""
    wanted = row_bytes(codec, columns, group)
    if data.dtype != torch.uint8 or data.ndim != 2 or data.shape[1] != wanted:
        raise ValueError(
            f"{codec} with {columns} columns needs bytes [N, {wanted}], got {str(data.dtype)[6:]} {[*data.shape]}."
        )
    if codec in GGUF_BLOCKS:
        return
    groups = -(-columns // group)
    if scale is None or not scale.is_floating_point() or tuple(scale.shape) != (data.shape[0], groups):
        got = "none" if scale is None else f"{str(scale.dtype)[6:]} {[*scale.shape]}"
        raise ValueError(f"{codec} in groups of {group} needs scales [{data.shape[0]}, {groups}], got {got}.")
    if codec in TABLE_BITS and (table is None or tuple(table.shape) != (2 ** TABLE_BITS[codec],)):
        got = "none" if table is None else str([*table.shape])
        raise ValueError(f"{codec} needs a table of {2 ** TABLE_BITS[codec]} values, got {got}.")


def pack_codes(codes: torch.Tensor, codec: str, group: int) -> torch.Tensor:
    """Codes uint8 [N, G * group] of table4 or table3 -> bytes [N, ...]; the inverse of unpack_codes."""
    g = codes.reshape(codes.shape[0], -1, group).to(torch.uint8)
    if codec == "table4":
        low, high = g.split(group // 2, dim=-1)
        return (low | high << 4).flatten(1)
    low = [part << 2 * i for i, part in enumerate((g & 3).split(group // 4, dim=-1))]
    high = [part << i for i, part in enumerate((g >> 2).split(group // 8, dim=-1))]
    planes = [torch.stack(parts).sum(0, dtype=torch.uint8) for parts in (low, high)]
    return torch.cat(planes, dim=-1).flatten(1)


def unpack_codes(data: torch.Tensor, codec: str, group: int) -> torch.Tensor:
    """Bytes [N, ...] of table4 or table3 -> codes uint8 [N, G * group]."""
    g = data.reshape(data.shape[0], -1, group * TABLE_BITS[codec] // 8)
    if codec == "table4":
        return torch.cat((g & 15, g >> 4), dim=-1).flatten(1)
    low = torch.cat([g[..., : group // 4] >> 2 * i & 3 for i in range(4)], dim=-1)
    high = torch.cat([g[..., group // 4 :] >> i & 1 for i in range(8)], dim=-1)
    return (low | high << 2).flatten(1)


def decode(weight: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight [N, K], formed in fp32 and rounded once to dtype; contiguous. A few rows at a time."""
    out = weight.data.new_empty(weight.data.shape[0], weight.columns, dtype=dtype)
    step = max(1, (CPU_CHUNK if out.device.type == "cpu" else GPU_CHUNK) // max(1, weight.columns))
    luts = _luts(weight)
    for start in range(0, len(out), step):
        rows = slice(start, start + step)
        out[rows] = _values(weight, rows, luts)[:, : weight.columns]
    return out


def _values(weight: Packed, rows: slice, luts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Some rows in fp32, the padding of the last group still on them."""
    data = weight.data[rows]
    if weight.codec in GGUF_BLOCKS:
        return _GGUF[weight.codec](data.reshape(-1, GGUF_BLOCKS[weight.codec][1])).view(len(data), -1)
    if weight.codec == "int8":
        values = data.contiguous().view(torch.int8).float()
        padding = -values.shape[1] % weight.group
        values = torch.nn.functional.pad(values, (0, padding)) if padding else values
    else:
        packed = weight.codec == "table4"  # there a byte has a table of its own, and nothing is unpacked
        index = (data if packed else unpack_codes(data, weight.codec, weight.group)).to(torch.int32).flatten()
        half = weight.group // len(luts)
        values = torch.stack([lut.index_select(0, index).view(len(data), -1, half) for lut in luts], dim=2)
    groups = values.view(len(data), -1, weight.group) * weight.scale[rows].float().unsqueeze(-1)  # type: ignore[index]
    return groups.view(len(data), -1)


def _luts(weight: Packed) -> tuple[torch.Tensor, ...]:
    """Tables fp32 [256] of a byte's low and high code; [8] of three bits."""
    if weight.table is None or weight.codec not in TABLE_BITS:
        return ()
    table = weight.table.float()
    return (table.repeat(16), table.repeat_interleave(16)) if weight.codec == "table4" else (table,)


def _half(bytes_: torch.Tensor) -> torch.Tensor:
    return bytes_.contiguous().view(torch.float16).float()


def _q4_0(b: torch.Tensor) -> torch.Tensor:
    q = torch.cat((b[:, 2:] & 15, b[:, 2:] >> 4), dim=-1).float() - 8
    return _half(b[:, :2]) * q


def _q8_0(b: torch.Tensor) -> torch.Tensor:
    return _half(b[:, :2]) * b[:, 2:].contiguous().view(torch.int8).float()


def _six_bit(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minima [M, 8] of the twelve bytes of q4_k and q5_k."""
    low, middle, high = scales.split(4, dim=-1)
    scale = torch.cat((low & 63, (high & 15) | (low >> 6) << 4), dim=-1)
    minimum = torch.cat((middle & 63, (high >> 4) | (middle >> 6) << 4), dim=-1)
    return scale.float(), minimum.float()


def _k_blocks(b: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """q [M, 8, 32] of a block with fp16 d and dmin, six-bit scales and minima."""
    scale, minimum = _six_bit(b[:, 4:16])
    return ((_half(b[:, :2]) * scale).unsqueeze(-1) * q.float() - (_half(b[:, 2:4]) * minimum).unsqueeze(-1)).flatten(1)


def _nibbles(b: torch.Tensor) -> torch.Tensor:
    """128 bytes -> [M, 8, 32]: each 32 bytes hold two runs of 32 columns, the low four bits first."""
    chunks = b.reshape(-1, 4, 1, 32)
    return torch.cat((chunks & 15, chunks >> 4), dim=2).flatten(1, 2)


def _q4_k(b: torch.Tensor) -> torch.Tensor:
    return _k_blocks(b, _nibbles(b[:, 16:]))


def _q5_k(b: torch.Tensor) -> torch.Tensor:
    fifth = torch.stack([b[:, 16:48] >> i & 1 for i in range(8)], dim=1)
    return _k_blocks(b, _nibbles(b[:, 48:]) | fifth << 4)


def _q6_k(b: torch.Tensor) -> torch.Tensor:
    low, high = b[:, :128].reshape(-1, 2, 2, 32), b[:, 128:192].reshape(-1, 2, 1, 32)
    low = torch.cat((low & 15, low >> 4), dim=2)  # [M, 2, 4, 32]
    high = torch.cat([high >> 2 * i & 3 for i in range(4)], dim=2)
    q = ((low | high << 4).float() - 32).reshape(-1, 16, 16)
    scale = b[:, 192:208].contiguous().view(torch.int8).float()
    return ((_half(b[:, 208:]) * scale).unsqueeze(-1) * q).flatten(1)


_GGUF = {"q4_0": _q4_0, "q8_0": _q8_0, "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k}
