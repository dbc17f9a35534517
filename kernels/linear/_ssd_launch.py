"""Launches the kernels of _ssd_kernels.py, and names what ahead-of-time compilation checks of them."""

from typing import Any

import torch

from .._triton import triton
from ._reference import rows_like
from ._ssd_chunks import Decays
from ._ssd_kernels import BOTH, FORWARD, REVERSE, SIZES, ssd_carry, ssd_out, ssd_state

CARRY_BLOCK = 512  # numbers of a state that one program carries
NUMBER = {"forward": FORWARD, "reverse": REVERSE, "both": BOTH}


def chunk_of(bits: int) -> int:
    """Tokens of a chunk: products of fp32 keep their operands in registers, which holds half as many."""
    return 64 if bits == 16 else 32


def width(d: int, bits: int) -> int:
    """Columns of a tile of a head of size d."""
    return min(64 if bits == 16 else 16, max(16, 1 << (d - 1).bit_length()))


def sizes(d: int, e: int, bits: int) -> dict[str, Any]:
    """Constants of a launch: head size d of B and C, e of x."""
    return {"DS": d, "E": e, "L": chunk_of(bits), "BS": width(d, bits), "BE": width(e, bits)}


def out_sizes(d: int, e: int, bits: int, direction: int, half: bool) -> dict[str, Any]:
    """sizes() for ssd_out. half: fp16, whose products with a state are scaled before they are summed; where the states
    of both directions take several steps, registers hold that for half as many rows a step."""
    made = sizes(d, e, bits)
    return made | {"BS": 32} if half and direction == BOTH and d > made["BS"] else made


def warps(direction: int, bits: int, d: int) -> int:
    """Of ssd_out: two directions hold one more tile in registers, which fp32 feels where a state is one step of it."""
    return 8 if direction == BOTH and (bits == 16 or d <= width(d, bits)) else 4


def ready(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def vectors(of: tuple[Decays, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """High and low part of the logs, enter and leave [ways, B, H, C L], total [ways, B, H, C], all fp32."""
    log = torch.stack([d.log for d in of]).flatten(3)
    high = log.float()
    enter, leave = (torch.stack([getattr(d, name).float() for d in of]).flatten(3) for name in ("enter", "leave"))
    return high, (log - high).float(), enter, leave, torch.stack([d.total.float() for d in of])


def carried(states, total, start, ways: int, direction: str) -> torch.Tensor:
    """Parts [ways, B, H, C, S, E] become the states before each chunk, in place -> the last states [ways, B, H, S, E]."""
    lines, chunks, size = states.shape[1] * states.shape[2], states.shape[3], states.shape[4] * states.shape[5]
    last = states.new_empty(*states.shape[:3], *states.shape[4:])
    first = last if start is None else start.float().contiguous()
    ssd_carry[(triton.cdiv(size, CARRY_BLOCK), lines, ways)](
        states, total, first, last, chunks, lines, size,
        STARTED=start is not None, DIRECTION=NUMBER[direction], BLOCK=CARRY_BLOCK, num_warps=4,
    )  # fmt: skip
    return last


def parts(b, x, leave, chunks: int) -> torch.Tensor:
    """What each chunk adds to the state: [ways, B, H, C, S, E] fp32."""
    (batch, heads, n, e), (groups, d), ways = x.shape, (b.shape[1], b.shape[3]), leave.shape[0]
    made = x.new_empty(ways, batch, heads, chunks, d, e, dtype=torch.float32)
    tile = sizes(d, e, 8 * x.element_size())
    count = triton.cdiv(d, tile["BS"]) * triton.cdiv(e, tile["BE"])
    ssd_state[(chunks * count, heads, batch)](
        b, x, leave, made, n, chunks, leave[0].numel(), heads, *b.stride()[:3], *x.stride()[:3],
        GROUP=heads // groups, WAYS=ways, num_warps=4, num_stages=1, **tile,
    )  # fmt: skip
    return made


def outputs(c, b, x, high, low, enter, states, scale: float, direction: str, diagonal: int, like) -> torch.Tensor:
    """scale (pairs inside the chunks + what entered them), [B, H, N, E] with the memory order of `like`."""
    (batch, heads, n, e), (groups, d) = x.shape, (b.shape[1], b.shape[3])
    out = rows_like(like, e)
    bits = 8 * x.element_size()
    number = NUMBER[direction]
    tile = out_sizes(d, e, bits, number, x.dtype == torch.float16)
    ssd_out[(states.shape[3] * triton.cdiv(e, tile["BE"]), heads, batch)](
        c, b, x, high, low, enter, states, out, scale, n, states.shape[3], enter[0].numel(), heads,
        *c.stride()[:3], *b.stride()[:3], *x.stride()[:3], *out.stride()[:3],
        GROUP=heads // groups, DIRECTION=number, DIAGONAL=diagonal, num_warps=warps(number, bits, d), num_stages=2,
        **tile,
    )  # fmt: skip
    return out


BITS = {"bf16": 16, "fp16": 16, "fp32": 32}


def kinds(pointers: str, fp32: str, wide: str, narrow: str, dtype: str) -> dict[str, str]:
    """{argument: type}, names separated by spaces: pointers of the dtype, fp32 pointers, int64 and int32 numbers."""
    made = dict.fromkeys(pointers.split(), f"*{dtype}") | dict.fromkeys(fp32.split(), "*fp32")
    return made | dict.fromkeys(wide.split(), "i64") | dict.fromkeys(narrow.split(), "i32")


def spec(kernel: str, args: dict[str, str], const: dict[str, Any], tag: str, **more: Any) -> dict[str, Any]:
    unaligned = tuple(name for name in SIZES if name in args)
    made = {"kernel": kernel, "args": args, "const": const, "tag": tag, "warps": 4, "stages": 1, "per_target": {}}
    return made | {"expect": {}, "unaligned": unaligned} | more


def out_args(dtype: str) -> dict[str, str]:
    strides = "cb cg bb bg xb xh ob oh"
    return kinds("CC B X OUT", "HIGH LOW ENTER STATES", strides, "N C CN HEADS cn bn xn on", dtype) | {"scale": "fp32"}


MMA = {"sm90": "HGMMA", "gfx942": "mfma"}
SHAPES = [(64, 64), (128, 64), (128, 128), (96, 72), (16, 16), (256, 256)]  # sizes of B and C, and of x


def aot_specs() -> list[dict]:
    """Compilations for bench/aot.py: every direction, one pass over both as the small set."""
    made = []
    for dtype, direction in [("bf16", BOTH), ("bf16", FORWARD), ("bf16", REVERSE), ("fp16", BOTH), ("fp32", BOTH)]:
        bits = BITS[dtype]
        for d, e in SHAPES:
            tag = f"s{d} e{e} {dtype} direction {direction}"
            more: dict[str, Any] = {"extra": (dtype, direction) != ("bf16", BOTH) or (d, e) != SHAPES[1]}
            more["expect"] = MMA if bits == 16 and min(d, e) >= 64 else {}
            const = {**sizes(d, e, bits), "GROUP": 1}
            args = kinds("B X", "LEAVE PART", "bb bg xb xh", "N C CN HEADS bn xn", dtype)
            ways = {"WAYS": 2 if direction == BOTH else 1}
            made.append(spec("ssd_state", args, const | ways, tag, **more))
            of = {"DIRECTION": direction, "DIAGONAL": 2 if direction == BOTH else 1}
            of |= {**out_sizes(d, e, bits, direction, dtype == "fp16"), "GROUP": 1}
            more |= {"warps": warps(direction, bits, d), "stages": 2}
            made.append(spec("ssd_out", out_args(dtype), of, tag, **more))
    args = kinds("", "STATES TOTAL START LAST", "", "C HEADS W", "")
    for direction in (FORWARD, REVERSE, BOTH):
        const = {"STARTED": 1, "DIRECTION": direction, "BLOCK": CARRY_BLOCK}
        made.append(spec("ssd_carry", args, const, f"direction {direction}", extra=direction != BOTH))
    return made
