"""Decoding in registers, shared by the kernels of packed weights (packed.py says how the bytes lie).

A row is walked in steps. One step reads one run of bytes and gives PARTS tiles of as many columns, each with one scale
a row (two in q6_k): the low and the high half of a nibble, the four quarters of a table3 group, one run of int8. A part
is BR columns wide, a power of two, of which RUN are the most that a unit (a group or a block) holds. Every part can go
into a matrix product at once, in any order of columns, so nothing is interleaved.
"""

from typing import Any

import torch

from .._triton import tl, triton
from .packed import GGUF_BLOCKS

MOST = 64  # columns of one part
PARTS = {"table4": 2, "table3": 4, "int8": 1, "q4_0": 2, "q8_0": 1, "q4_k": 2, "q5_k": 2, "q6_k": 2}


def constants(codec: str, group: int, least: int = 16) -> dict[str, Any]:
    """Compile-time arguments of the decoding functions. SUB steps make one unit of GROUP columns; a part has at least so
    many, as the matrix product asks for."""
    unit = GGUF_BLOCKS[codec][0] if codec in GGUF_BLOCKS else group
    run = 32 if unit == 256 and codec in GGUF_BLOCKS else unit // PARTS[codec]
    br = min(MOST, max(least, 1 << (run - 1).bit_length()))
    sub = 4 if codec in ("q4_k", "q5_k", "q6_k") else -(-run // br)
    return {"CODEC": codec, "GROUP": unit, "RUN": run, "BR": br, "SUB": sub, "PARTS": PARTS[codec]}


def steps(codec: str, columns: int, group: int, least: int = 16) -> int:
    """Steps of one row."""
    found = constants(codec, group, least)
    return -(-columns // found["GROUP"]) * found["SUB"]


def units(codec: str, columns: int, group: int) -> int:
    """Groups or blocks of one row; its columns where codes are whole bytes."""
    return columns if codec == "int8" else steps(codec, columns, group) // constants(codec, group)["SUB"]


def pointers(data, scale, table) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the kernels take as DATA, SCALE and TABLE: contiguous, the table in fp32."""
    data = data.contiguous()
    scale = data if scale is None else scale.contiguous()
    return data, scale, data if table is None else table.float().contiguous()


@triton.jit
def half_at(AT, live):
    """fp16 in two bytes, which may lie at an odd address, as fp32."""
    low = tl.load(AT, mask=live, other=0).to(tl.uint16)
    high = tl.load(AT + 1, mask=live, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def rows_of(DATA, n, units, CODEC: tl.constexpr, RUN: tl.constexpr):
    """Pointers [BN] to the first bytes of rows n. The bytes of a row are so many times a constant, from which the
    compiler sees how wide its loads may be."""
    if CODEC == "table4":
        size = units * RUN
    elif CODEC == "table3":
        size = units * (3 * RUN // 2)
    elif CODEC == "q4_0":
        size = units * 18
    elif CODEC == "q8_0":
        size = units * 34
    elif CODEC == "q4_k":
        size = units * 144
    elif CODEC == "q5_k":
        size = units * 176
    elif CODEC == "q6_k":
        size = units * 210
    else:
        size = units
    return DATA + n.to(tl.int64) * size


@triton.jit
def columns_of(step, P: tl.constexpr, CODEC: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, BR: tl.constexpr,
               SUB: tl.constexpr):  # fmt: skip
    """Columns of part P [BR], and which of them belong to the unit."""
    b = tl.arange(0, BR)
    unit, sub = step // SUB, step % SUB
    if CODEC == "q4_k" or CODEC == "q5_k":
        return unit * 256 + sub * 64 + P * 32 + b, b < BR
    elif CODEC == "q6_k":
        return unit * 256 + (sub // 2) * 128 + (sub % 2) * 32 + P * 64 + b, b < BR
    return unit * GROUP + P * RUN + sub * BR + b, sub * BR + b < RUN


@triton.jit
def bytes_of(ROW, live, step, K, CODEC: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, BR: tl.constexpr,
             SUB: tl.constexpr):  # fmt: skip
    """ROW [BN]: pointers to the rows' first bytes; live [BN] -> the step's bytes [BN, BR], and the bytes with its high
    bits (the same where the codec has none)."""
    b = tl.arange(0, BR)
    ROW, live = ROW[:, None], live[:, None]
    unit, sub = step // SUB, step % SUB
    if CODEC == "table4":
        j = sub * BR + b
        low = tl.load(ROW + (unit * RUN + j)[None, :], mask=live & (j < RUN)[None, :], other=0)
        high = low
    elif CODEC == "table3":
        j = sub * BR + b
        at, held = ROW + unit * (3 * RUN // 2), live & (j < RUN)[None, :]
        low = tl.load(at + j[None, :], mask=held, other=0)
        high = tl.load(at + (RUN + j % (RUN // 2))[None, :], mask=held, other=0)
    elif CODEC == "int8":
        j = sub * BR + b
        low = tl.load(
            ROW + (unit * GROUP + j)[None, :], mask=live & ((j < RUN) & (unit * GROUP + j < K))[None, :], other=0
        )
        high = low
    elif CODEC == "q4_0":
        low = tl.load(ROW + unit * 18 + 2 + b[None, :], mask=live & (b < BR)[None, :], other=0)
        high = low
    elif CODEC == "q8_0":
        low = tl.load(ROW + unit * 34 + 2 + b[None, :], mask=live & (b < BR)[None, :], other=0)
        high = low
    elif CODEC == "q4_k":
        low = tl.load(ROW + unit * 144 + 16 + sub * 32 + b[None, :], mask=live & (b < BR)[None, :], other=0)
        high = low
    elif CODEC == "q5_k":
        low = tl.load(ROW + unit * 176 + 48 + sub * 32 + b[None, :], mask=live & (b < BR)[None, :], other=0)
        high = tl.load(ROW + unit * 176 + 16 + b[None, :], mask=live & (b < BR)[None, :], other=0)
    else:
        low = tl.load(ROW + unit * 210 + sub * 32 + b[None, :], mask=live & (b < BR)[None, :], other=0)
        high = tl.load(ROW + unit * 210 + 128 + (sub // 2) * 32 + b[None, :], mask=live & (b < BR)[None, :], other=0)
    return low, high


@triton.jit
def looked_up(table, q):
    """table[q]: table fp32 [16] lies in the registers of every warp."""
    flat = tl.reshape(q.to(tl.int32), [q.shape[0] * q.shape[1]])
    return tl.reshape(tl.gather(table, flat, 0), q.shape)


@triton.jit
def codes_of(low, high, step, P: tl.constexpr, CODEC: tl.constexpr, RUN: tl.constexpr, BR: tl.constexpr,
             SUB: tl.constexpr):  # fmt: skip
    """The integers of part P: int32 [BN, BR], signed where the codec's are."""
    sub = step % SUB
    if CODEC == "int8" or CODEC == "q8_0":
        return low.to(tl.int8, bitcast=True).to(tl.int32)
    elif CODEC == "table3":
        place = 2 * P + (sub * BR + tl.arange(0, BR)) // (RUN // 2)
        bit = (high.to(tl.int32) >> place[None, :]) & 1
        return ((low.to(tl.int32) >> (2 * P)) & 3) | (bit << 2)
    q = (low.to(tl.int32) >> (4 * P)) & 15
    if CODEC == "q4_0":
        q = q - 8
    elif CODEC == "q5_k":
        q = q | (((high.to(tl.int32) >> (2 * sub + P)) & 1) << 4)
    elif CODEC == "q6_k":
        q = (q | (((high.to(tl.int32) >> (4 * P + 2 * (sub % 2))) & 3) << 4)) - 32
    return q


@triton.jit
def six_bits(AT, live, j):
    """Scale and minimum number j of the twelve bytes at AT [BN], as fp32."""
    wide = tl.load(AT + j + 4, mask=live, other=0).to(tl.int32)
    scale = tl.load(AT + j % 4, mask=live, other=0).to(tl.int32)
    least = tl.load(AT + 4 + j % 4, mask=live, other=0).to(tl.int32)
    if j < 4:
        scale = scale & 63
        least = least & 63
    else:
        scale = (wide & 15) | ((scale >> 6) << 4)
        least = (wide >> 4) | ((least >> 6) << 4)
    return scale.to(tl.float32), least.to(tl.float32)


@triton.jit
def decoded(ROW, SCALE_ROW, table, low, high, live, step, P: tl.constexpr, CODEC: tl.constexpr, GROUP: tl.constexpr,
            RUN: tl.constexpr, BR: tl.constexpr, SUB: tl.constexpr):  # fmt: skip
    """Part P of the weight, fp32 [BN, BR]. ROW, SCALE_ROW: pointers [BN]; live [BN]; table [16]. What a row has once is
    loaded as [BN]: as [BN, 1] each thread would load it for every one of its columns."""
    q = codes_of(low, high, step, P, CODEC, RUN, BR, SUB)
    unit, sub = step // SUB, step % SUB
    if CODEC == "table4" or CODEC == "table3":
        gain = tl.load(SCALE_ROW + unit, mask=live, other=0.0).to(tl.float32)
        return looked_up(table, q) * gain[:, None]
    elif CODEC == "int8":
        return q.to(tl.float32) * tl.load(SCALE_ROW + unit, mask=live, other=0.0).to(tl.float32)[:, None]
    elif CODEC == "q4_0":
        return half_at(ROW + unit * 18, live)[:, None] * q.to(tl.float32)
    elif CODEC == "q8_0":
        return half_at(ROW + unit * 34, live)[:, None] * q.to(tl.float32)
    elif CODEC == "q6_k":
        at = ROW + unit * 210
        d = half_at(at + 208, live)
        first = at + 192 + (sub // 2) * 8 + P * 4 + (sub % 2) * 2  # a scale serves 16 columns
        left = d * tl.load(first, mask=live, other=0).to(tl.int8, bitcast=True).to(tl.float32)
        right = d * tl.load(first + 1, mask=live, other=0).to(tl.int8, bitcast=True).to(tl.float32)
        return tl.where((tl.arange(0, BR) < 16)[None, :], left[:, None], right[:, None]) * q.to(tl.float32)
    if CODEC == "q4_k":
        at = ROW + unit * 144
    else:
        at = ROW + unit * 176
    scale, least = six_bits(at + 4, live, 2 * sub + P)
    gain, shift = half_at(at, live) * scale, half_at(at + 2, live) * least
    return gain[:, None] * q.to(tl.float32) - shift[:, None]


@triton.jit
def table_of(TABLE, CODEC: tl.constexpr):
    """The table's values in registers, [16]; zeros for a codec without one."""
    i = tl.arange(0, 16)
    if CODEC == "table4":
        return tl.load(TABLE + i)
    elif CODEC == "table3":
        return tl.load(TABLE + i, mask=i < 8, other=0.0)
    return tl.zeros([16], tl.float32)
