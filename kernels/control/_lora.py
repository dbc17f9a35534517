"""The Triton kernels of grouped_lora.py: down to the ranks, and up again onto what is there."""

from .._triton import tl, triton

BM, BR, BK, BN = 32, 32, 64, 64  # tokens, ranks, inputs, outputs of one program
SIZES = ["N", "xb", "yb"]  # widths are multiples of 16 for all models: known as such, rows are loaded in vectors
_jit = triton.jit(do_not_specialize=SIZES) if hasattr(triton, "__version__") else triton.jit


@triton.jit
def _tile(TILES):
    """This program's row of the batch, first token, end of its segment, group and rank."""
    at = TILES + tl.program_id(0) * 5
    first, end, group, rank = tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    return tl.load(at).to(tl.int64), first, end, group.to(tl.int64), rank


@_jit
def lora_down(X, DOWN, H, TILES, N, K, R, xb, xn, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """H [B, N, R] = X DOWN[group]^T, BM tokens and BR ranks of it. DOWN [G, R, K]."""
    batch, first, end, group, rank = _tile(TILES)
    row, r, k = first + tl.arange(0, BM), tl.program_id(1) * BR + tl.arange(0, BR), tl.arange(0, BK)
    live, held = (row < end)[:, None], r < rank
    x_at = X + batch * xb + row.to(tl.int64)[:, None] * xn + k[None, :]
    d_at = DOWN + (group * R + r)[None, :] * K + k[:, None]
    acc = tl.zeros([BM, BR], tl.float32)
    for k0 in tl.range(0, tl.where(tl.program_id(1) * BR < rank, K, 0), BK):
        x = tl.load(x_at + k0, mask=live & (k < K - k0)[None, :], other=0.0)
        d = tl.load(d_at + k0, mask=held[None, :] & (k < K - k0)[:, None], other=0.0)
        acc = tl.dot(x, d, acc, input_precision="ieee")
    at = H + (batch * N + row)[:, None] * R + r[None, :]
    tl.store(at, acc.to(H.dtype.element_ty), mask=live & held[None, :])


@triton.jit
def _raised(H, UP, r, held, live, seen, acc, FULL: tl.constexpr):
    """acc + H UP^T over the ranks r; FULL: all of them are held, and their loads need no mask along a row."""
    if FULL:
        h = tl.load(H + r[None, :], mask=live, other=0.0)
        u = tl.load(UP + r[:, None], mask=seen, other=0.0)
    else:
        h = tl.load(H + r[None, :], mask=live & held[None, :], other=0.0)
        u = tl.load(UP + r[:, None], mask=seen & held[:, None], other=0.0)
    return tl.dot(h, u, acc, input_precision="ieee")


@_jit
def lora_up(H, UP, SCALE, Y, TILES, N, M, R, yb, yn, BM: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr):
    """Y += SCALE[group] H UP[group]^T, BM tokens and BN outputs of it. UP [G, M, R]."""
    batch, first, end, group, rank = _tile(TILES)
    row, m, r = first + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BR)
    live, seen = (row < end)[:, None], (m < M)[None, :]
    h_at, u_at = H + (batch * N + row)[:, None] * R, UP + (group * M + m)[None, :] * R
    acc = tl.zeros([BM, BN], tl.float32)
    whole = rank // BR * BR
    for r0 in tl.range(0, whole, BR):
        acc = _raised(h_at + r0, u_at + r0, r, r < BR, live, seen, acc, True)
    if whole < rank:
        acc = _raised(h_at + whole, u_at + whole, r, r < rank - whole, live, seen, acc, False)
    at = Y + batch * yb + row.to(tl.int64)[:, None] * yn + m[None, :]
    y = tl.load(at, mask=live & seen, other=0.0).to(tl.float32) + acc * tl.load(SCALE + group)
    tl.store(at, y.to(Y.dtype.element_ty), mask=live & seen)


def aot_specs() -> list[dict]:
    """Compilations for bench/aot.py, with the tiles of the launcher."""
    specs: list[dict] = []
    for dtype in ("bf16", "fp32"):
        down = dict.fromkeys(("X", "DOWN", "H"), f"*{dtype}") | dict.fromkeys(("N", "K", "R"), "i32")
        up = dict.fromkeys(("H", "UP", "Y"), f"*{dtype}") | dict.fromkeys(("N", "M", "R"), "i32") | {"SCALE": "*fp32"}
        down |= {"xb": "i64", "xn": "i64"}
        up |= {"yb": "i64", "yn": "i64"}
        for kernel, args, last in (("lora_down", down, {"BK": BK}), ("lora_up", up, {"BN": BN})):
            spec: dict = {"kernel": kernel, "args": args | {"TILES": "*i32"}, "const": {"BM": BM, "BR": BR} | last}
            spec |= {"tag": dtype, "warps": 4, "stages": 3, "unaligned": tuple(SIZES), "extra": dtype != "bf16"}
            specs.append(spec)
    return specs
