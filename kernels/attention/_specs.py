"""What bench/aot.py compiles for an attention kernel: every head size, with the tiles that the launcher takes."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .. import _config
from ._tiles import split_head

HEADS = (32, 64, 72, 96, 112, 128, 160, 192, 256)
BITS = {"bf16": 16, "fp16": 16, "fp32": 32}


def argument_kinds(inputs: Iterable[str], fp32: Iterable[str], wide: str, narrow: str) -> dict[str, str]:
    """{argument: type} of a block-sparse kernel; inputs: pointers of the input dtype; wide, narrow: names of int64 and
    int32 arguments, separated by spaces. The lists, coordinates and scale that all of them take are added."""
    kinds = dict.fromkeys(inputs, "*{}") | dict.fromkeys(fp32, "*fp32") | {"MODE": "*i8", "scale": "fp32"}
    kinds |= dict.fromkeys(("QC", "KC"), "*i32")
    return kinds | dict.fromkeys(wide.split(), "i64") | dict.fromkeys(narrow.split(), "i32")


def head_specs(
    kernel: str,
    operation: str,
    kinds: Mapping[str, str],
    variants: Iterable[tuple[str, str, dict[str, Any]]],
    unaligned: tuple[str, ...],
    split: Callable[[int, int], tuple[int, int]] = split_head,
    small: int = 2,
) -> list[dict]:
    """variants: (words, dtype, constants) of each compilation; the first one is in the small set, with `small`
    of the head sizes 64, 72 and 128 on each GPU."""
    specs = []
    for number, (words, dtype, flags) in enumerate(variants):
        bits = BITS[dtype]
        for d in HEADS:
            d0, d1 = split(d, bits)
            per_target = {}
            for name in _config.tables():
                tuned = _config.entry(operation, name, bits, d0 + d1)
                tile = dict(zip(("BM", "BN"), tuned["tile"], strict=True))
                per_target[name] = {"warps": tuned["warps"], "stages": tuned["stages"], "const": tile}
            const = {"D": d, "D0": d0, "D1": d1, "BM": 32, "BN": 32, "BLOCK_M": 128, "BLOCK_N": 64, "GROUP": 1}
            specs.append(
                {
                    "kernel": kernel,
                    "args": {name: kind.format(dtype) for name, kind in kinds.items()},
                    "const": const | flags,
                    "per_target": per_target,
                    "tag": f"d{d} {dtype} {words}",
                    "expect": {"sm90": "HGMMA", "gfx942": "mfma"} if bits == 16 else {},
                    "unaligned": unaligned,
                    "extra": True if number > 0 else _config.left_out(d, small),
                }
            )
    return specs
