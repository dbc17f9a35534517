"""Launches of the Triton kernels of hierarchical_sparse.py, and what bench/aot.py compiles of them."""

import torch

from .. import _config
from .._triton import triton
from ._hierarchical_backward import SIZES as BACKWARD_SIZES
from ._hierarchical_backward import hierarchical_keys, hierarchical_queries
from ._hierarchical_forward import SIZES as FORWARD_SIZES
from ._hierarchical_forward import hierarchical_forward
from ._hierarchical_lists import Pyramid, by_key, chosen_slots
from ._hierarchical_reference import Options
from ._tiles import split_head

MOST = 128  # channels of a head that the kernels take
PROGRAMS = 1024  # wanted of the coarsest level's keys, which are few: their queries are split up
LEAST_PART = 512  # queries of such a part


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [step for x in tensors for step in x.stride()[:3]]


def _shared(q: torch.Tensor, k: torch.Tensor, pyramid: Pyramid, options: Options) -> dict:
    d0, d1 = split_head(q.shape[3], 8 * q.element_size())
    return {
        "D": q.shape[3],
        "D0": d0,
        "D1": d1,
        "B": pyramid.block,
        "LEVELS": pyramid.levels,
        "GROUP": q.shape[1] // k.shape[1],
        "REWEIGHT": options.reweight,
        "EXCLUDE": options.exclude and options.enrich,
    }


def _tuned(operation: str, q: torch.Tensor, shared: dict) -> tuple[tuple[int, int], dict]:
    row = _config.lookup(operation, q, shared["D0"] + shared["D1"])
    return row["tile"], {"num_warps": row["warps"], "num_stages": row["stages"]}


def _flags(idx, cnt, pyramid: Pyramid, shared: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return chosen_slots(idx, cnt, pyramid) if shared["EXCLUDE"] else (idx, idx)


def _plain(x: torch.Tensor) -> torch.Tensor:
    """Channels side by side, as the kernels read them."""
    return x if x.stride(3) == 1 else x.contiguous()


def forward_on_gpu(q, k, v, kc, vc, idx, cnt, pyramid: Pyramid, options: Options, out, lse) -> None:
    """Fills out and lse."""
    q, k, v, kc, vc = (_plain(x) for x in (q, k, v, kc, vc))
    idx, cnt, shared = idx.contiguous(), cnt.contiguous(), _shared(q, k, pyramid, options)
    (bm, bn), tuned = _tuned("hierarchical_sparse", q, shared)
    hierarchical_forward[(triton.cdiv(q.shape[2], bm), q.shape[1], q.shape[0])](
        q, k, v, kc, vc, out, lse, idx, cnt, *_flags(idx, cnt, pyramid, shared), options.scale, q.shape[2],
        idx.shape[3], *_strides(q, k, v, kc, vc, out), *lse.stride()[:2], **shared, BM=bm, BN=bn,
        ENRICH=options.enrich, **tuned,
    )  # fmt: skip


def backward_on_gpu(grad_out, grad_lse, q, k, v, kc, vc, idx, cnt, out, lse, pyramid: Pyramid, options: Options):
    """Gradients of q, k, v, kc, vc."""
    q, k, v, kc, vc, g = (_plain(x) for x in (q, k, v, kc, vc, grad_out))
    idx, cnt, lse, shared = idx.contiguous(), cnt.contiguous(), lse.contiguous(), _shared(q, k, pyramid, options)
    delta = ((g.float() * out.float()).sum(-1) - grad_lse).contiguous()
    flags = _flags(idx, cnt, pyramid, shared)
    (bm, bn), tuned = _tuned("hierarchical_queries", q, shared)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    hierarchical_queries[(triton.cdiv(q.shape[2], bm), q.shape[1], q.shape[0])](
        q, k, v, kc, vc, g, lse, delta, dq, idx, cnt, *flags, options.scale, q.shape[2], idx.shape[3],
        *_strides(q, k, v, kc, vc, g), **shared, BM=bm, BN=bn, ENRICH=options.enrich, **tuned,
    )  # fmt: skip
    rows = q, g, lse, delta, idx, cnt
    dk, dv = _key_gradients(0, k, v, *rows, flags[0], pyramid, options, shared)
    coarse = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (kc, vc)]
    for level in range(1, pyramid.levels + 1 if options.enrich else 1):
        at, flag = pyramid.at(level), flags[level == pyramid.levels]
        got = _key_gradients(level, kc[:, :, at], vc[:, :, at], *rows, flag, pyramid, options, shared)
        for to, x in zip(coarse, got, strict=True):
            to[:, :, at] = x
    return dq, dk, dv, *coarse


def _key_gradients(level, k, v, q, g, lse, delta, idx, cnt, flags, pyramid, options, shared) -> list[torch.Tensor]:
    """Of k, v [B, Hkv, N_level, D]."""
    (b, h, n, d), (kv, size) = q.shape, k.shape[1:3]
    (bm, bn), tuned = _tuned("hierarchical_keys", q, shared)
    parts = 1
    if level == pyramid.levels:
        tiles = triton.cdiv(size, bn) * b * h
        parts = min(triton.cdiv(PROGRAMS, tiles), triton.cdiv(n, LEAST_PART))
        start = entry = idx
    else:
        bn = min(bn, pyramid.block & -pyramid.block)  # a tile lies in one block
        above = pyramid.at(level + 1)
        start, entry = by_key(idx[:, :, above], cnt[:, :, above], pyramid.sizes[level + 1])
    part = triton.cdiv(triton.cdiv(n, parts), bm) * bm
    dtype = q.dtype if parts == 1 and h == kv else torch.float32
    sums = [torch.empty(parts, b * h, size, d, dtype=dtype, device=q.device) for _ in range(2)]
    hierarchical_keys[(triton.cdiv(size, bn), parts, b * h)](
        q, g, k, v, lse, delta, *sums, start, entry, flags, options.scale, n, idx.shape[3], size, part,
        *_strides(q, g, k, v), **shared, BM=bm, BN=bn, LEVEL=level, H=h, **tuned,
    )  # fmt: skip
    if parts == 1 and h == kv:
        return [x.view(b, h, size, d) for x in sums]
    return [x.view(parts, b, kv, h // kv, size, d).sum((0, 3)).to(q.dtype) for x in sums]


# How many head sizes every test run compiles in bf16 on each GPU, by operation and level.
SMALL: dict[tuple[str, int | None], int] = {("hierarchical_sparse", None): 2, ("hierarchical_queries", None): 1}
SMALL |= {("hierarchical_keys", 0): 1, ("hierarchical_keys", 2): 1}


def aot_specs() -> list[dict]:
    """Each kernel for the head sizes and the tiles that the launchers take on each GPU; two levels hold all code."""
    pointers = ("Q", "K", "V", "KC", "VC", "OUT", "G", "DQ", "DK", "DV")
    kinds = dict.fromkeys(pointers, "*{}") | dict.fromkeys(("LSE", "DELTA"), "*fp32") | {"scale": "fp32"}
    kinds |= dict.fromkeys(("IDX", "CNT", "START", "ENTRY"), "*i32") | dict.fromkeys(("INNER", "TOP", "FLAGS"), "*i8")
    kinds |= dict.fromkeys(("N", "W", "size", "PART"), "i32")
    kernels: dict[str, tuple] = {"hierarchical_sparse": (hierarchical_forward, [{}])}
    kernels["hierarchical_queries"] = (hierarchical_queries, [{}])
    kernels["hierarchical_keys"] = (hierarchical_keys, [{"LEVEL": level, "H": 6} for level in (0, 1, 2)])
    specs = []
    for operation, (kernel, variants) in kernels.items():
        for d in (64, 72, 96, 112, 128):
            for bits, exclude in ((16, False), (16, True), (32, True)):
                if d in (64, 128) or (bits == 16 and not exclude):
                    specs += [_spec(operation, kernel.fn, kinds, d, bits, exclude, own) for own in variants]
    return specs


def _spec(operation: str, kernel, kinds: dict, d: int, bits: int, exclude: bool, own: dict) -> dict:
    d0, d1 = split_head(d, bits)
    const = {"D": d, "D0": d0, "D1": d1, "B": 16, "LEVELS": 2, "GROUP": 1, "REWEIGHT": True, "EXCLUDE": exclude} | own
    per_target, names = {}, kernel.__code__.co_varnames[: kernel.__code__.co_argcount]
    const |= {"ENRICH": True} if "ENRICH" in names else {}
    fine_keys = own.get("LEVEL", 2) < 2
    for name in _config.tables():
        tuned = _config.entry(operation, name, bits, d0 + d1)
        bm, bn = tuned["tile"]
        tile = {"BM": bm, "BN": min(bn, 16) if fine_keys else bn}
        per_target[name] = {"warps": tuned["warps"], "stages": tuned["stages"], "const": tile}
    const |= {"BM": 64, "BN": 16}
    strides = {name: "i32" if name[1] == "n" else "i64" for name in names if name not in kinds and name not in const}
    arguments = {name: kind.format(f"{'bf' if bits == 16 else 'fp'}{bits}") for name, kind in kinds.items()}
    return {
        "kernel": kernel.__name__,
        "args": {name: kind for name, kind in (arguments | strides).items() if name in names},
        "const": const,
        "per_target": per_target,
        "tag": f"d{d} {'bf16' if bits == 16 else 'fp32'}{' exclude' if exclude else ''} {own or ''}".strip(),
        "expect": {"sm90": "HGMMA", "gfx942": "mfma"} if bits == 16 and operation == "hierarchical_sparse" else {},
        "unaligned": tuple({*FORWARD_SIZES, *BACKWARD_SIZES}),
        "extra": True if bits == 32 or exclude else _config.left_out(d, SMALL.get((operation, own.get("LEVEL")), 0)),
    }
