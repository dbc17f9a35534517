"""Compilations of the linear attention kernels for bench/aot.py, with the tiles that the launcher takes on each GPU."""

from .. import _config
from ._gradients import linear_gradient, linear_rows
from ._kernels import MAPS, SIZES, linear_apply, linear_scan, linear_state
from ._launch import padded

KERNELS = {fn.__name__: fn for fn in (linear_state, linear_scan, linear_apply, linear_rows, linear_gradient)}
POINTERS = {
    **dict.fromkeys(("X", "XR", "V", "G", "H", "DX", "DXR"), "*{}"),
    **dict.fromkeys(("FACTOR", "SLOPE", "PART", "SHARE", "S", "START", "GRAD"), "*fp32"),
    **dict.fromkeys(("SPANS", "GROUPS"), "*i32"),
    **dict.fromkeys(("gain", "eps"), "fp32"),
}
CASES = [  # head size, dtype, feature map, normalizer, rotated numerator
    (64, "bf16", "softmax", 1, False),
    (112, "bf16", "relu", 1, True),
    (128, "bf16", "hedgehog", 1, False),
    (32, "bf16", "relu", 1, False),
    (72, "bf16", "softmax", 1, False),
    (72, "fp16", "relu", 1, False),
    (128, "fp16", "elu1", 2, False),
    (128, "bf16", "softmax", 1, False),
    (256, "bf16", "relu", 2, True),
    (256, "fp16", "hedgehog", 1, False),
    (64, "fp32", "elu1", 1, False),
    (128, "fp32", "relu", 1, True),
    (256, "fp32", "softmax", 2, False),
]


def _spec(kernel: str, d: int, dtype: str, feature_map: str, norm: int, dual: bool, backward: bool) -> dict:
    bits = 32 if dtype == "fp32" else 16
    const = {"D": d, "E": d, "BD": padded(d), "BE": padded(d), "BN": 32, "NORM": norm, "BLOCK": 1024}
    const |= {"MAP": MAPS[feature_map], "HALVES": 2 if feature_map == "hedgehog" else 1, "DUAL": dual}
    const |= dict.fromkeys(("WEIGHTED", "STARTED", "GIVEN", "REVERSE"), backward)
    kinds = {}
    for name in KERNELS[kernel].arg_names:
        if name not in const:
            stored = {"OUT": "*fp32" if kernel == "linear_scan" else "*{}"} | POINTERS
            kinds[name] = stored.get(name, "i64" if name[1:] in ("b", "h") else "i32").format(dtype)
    const = {name: value for name, value in const.items() if name in KERNELS[kernel].arg_names}
    spec: dict = {"kernel": kernel, "args": kinds, "const": const, "warps": 4, "per_target": {}, "expect": {}}
    if kernel not in ("linear_scan", "linear_rows"):
        for name in _config.tables():
            tuned = _config.entry(kernel, name, bits, padded(d))
            tile = {"BN": tuned["tile"][0], "BE": min(tuned["tile"][1], padded(d))}
            spec["per_target"][name] = {"warps": tuned["warps"], "stages": tuned["stages"], "const": tile}
        spec["expect"] = {"sm90": "H?G?MMA", "gfx942": "mfma"} if bits == 16 else {}
    words = f"d{d} {dtype} {feature_map}{' dual' if dual else ''}{' backward' if backward else ''}"
    return spec | {"tag": words, "unaligned": tuple(SIZES)}


def aot_specs() -> list[dict]:
    specs = []
    for case in CASES:
        extra = _config.left_out(case[0], 1) if case[1:3] == CASES[0][1:3] else True
        for kernel in ("linear_state", "linear_apply", "linear_gradient"):
            specs.append(_spec(kernel, *case, False) | {"extra": extra})
            if kernel != "linear_apply":
                specs.append(_spec(kernel, *case, True) | {"extra": True})
        specs.append(_spec("linear_rows", *case, True) | {"extra": extra})
    specs += [_spec("linear_scan", *CASES[0], backward) | {"extra": backward} for backward in (False, True)]
    return specs
