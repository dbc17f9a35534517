"""The Triton kernels of norm_modulate.py and gated_norm_modulate.py: one row of channels at a time, in fp32."""

from .._triton import tl, triton

WIDEST_BACKWARD = 4096  # channels; wider rows and the three sums beside them spill registers on every NVIDIA GPU
SIZES = ["N", "C", "ROWS", "xb", "hb", "gb", "sb", "tb", "yb", "zb", "db", "gn", "sn", "tn"]
_jit = triton.jit(do_not_specialize=SIZES) if hasattr(triton, "__version__") else triton.jit


@triton.jit
def _load(X, c, C):
    return tl.load(X + c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit
def _normalised(x, c, C, eps, RMS: tl.constexpr):
    """norm(x) and 1 / its divisor; 0 past the last channel."""
    if RMS:
        share = tl.math.rsqrt(tl.sum(x * x, 0) / C + eps)
    else:
        x = tl.where(c < C, x - tl.sum(x, 0) / C, 0.0)
        share = tl.math.rsqrt(tl.sum(x * x, 0) / C + eps)
    return x * share, share


@_jit
def norm_forward(
    X, H, GATE, SCALE, SHIFT, SUM, Y, N, C, eps, xb, xn, hb, hn, gb, gn, sb, sn, tb, tn,
    RMS: tl.constexpr, GATED: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Y = norm(x) (1 + SCALE) + SHIFT for one row x of X; GATED: x = X + GATE H, stored in SUM. A stride of 0 over rows
    serves modulation by vector."""
    n, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BC)
    to = (batch * N + n) * C + c
    x = _load(X + batch * xb + n * xn, c, C)
    if GATED:
        x += _load(GATE + batch * gb + n * gn, c, C) * _load(H + batch * hb + n * hn, c, C)
        stored = x.to(SUM.dtype.element_ty)
        tl.store(SUM + to, stored, mask=c < C)
        x = stored.to(tl.float32)  # y belongs to the x' that the next layer reads
    y, _ = _normalised(x, c, C, eps, RMS)
    y = y * (1.0 + _load(SCALE + batch * sb + n * sn, c, C)) + _load(SHIFT + batch * tb + n * tn, c, C)
    tl.store(Y + to, y.to(Y.dtype.element_ty), mask=c < C)


@_jit
def norm_backward(
    G, GX, X, H, GATE, SCALE, DX, DH, DGATE, DSCALE, DSHIFT, N, C, ROWS, eps, db, dn, zb, zn, xb, xn, hb, hn, gb, gn, sb, sn,
    RMS: tl.constexpr, GATED: tl.constexpr, EACH: tl.constexpr, EACH_GATE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradients from G, that of y, and (GATED) GX, that of x'; X is what was normalised. One program takes ROWS rows.
    EACH: scale and shift are per token, so are their gradients; else DSCALE, DSHIFT [B, programs, C] are sums over the
    program's rows. EACH_GATE says the same of the gate."""
    batch, c = tl.program_id(1).to(tl.int64), tl.arange(0, BC)
    part = (batch * tl.num_programs(0) + tl.program_id(0)) * C + c
    of_scale = tl.zeros([BC], tl.float32)
    of_shift = tl.zeros([BC], tl.float32)
    of_gate = tl.zeros([BC], tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for step in tl.range(0, ROWS):
        n = first + step
        live = c < tl.where(n < N, C, 0)
        n = tl.where(n < N, n, 0)
        to = (batch * N + n) * C + c
        g = tl.load(G + batch * db + n * dn + c, mask=live, other=0.0).to(tl.float32)
        y, share = _normalised(_load(X + batch * xb + n * xn, c, C), c, C, eps, RMS)
        if EACH:
            tl.store(DSCALE + to, (g * y).to(DSCALE.dtype.element_ty), mask=live)
            tl.store(DSHIFT + to, g.to(DSHIFT.dtype.element_ty), mask=live)
        else:
            of_scale += g * y
            of_shift += g
        g *= 1.0 + _load(SCALE + batch * sb + n * sn, c, C)
        d = g - y * (tl.sum(g * y, 0) / C)
        if not RMS:
            d -= tl.sum(g, 0) / C
        d *= share
        if GATED:
            d += tl.load(GX + batch * zb + n * zn + c, mask=live, other=0.0).to(tl.float32)
            h = tl.load(H + batch * hb + n * hn + c, mask=live, other=0.0).to(tl.float32)
            tl.store(DH + to, (d * _load(GATE + batch * gb + n * gn, c, C)).to(DH.dtype.element_ty), mask=live)
            if EACH_GATE:
                tl.store(DGATE + to, (d * h).to(DGATE.dtype.element_ty), mask=live)
            else:
                of_gate += tl.where(live, d * h, 0.0)
        tl.store(DX + to, d.to(DX.dtype.element_ty), mask=live)
    if not EACH:
        tl.store(DSCALE + part, of_scale, mask=c < C)
        tl.store(DSHIFT + part, of_shift, mask=c < C)
    if GATED and not EACH_GATE:
        tl.store(DGATE + part, of_gate, mask=c < C)


def warps(channels: int, backward: bool) -> int:
    """Warps of a row that is padded to a power of two: 8 elements or fewer a thread and array (backward: 4, of more
    arrays), up to 16 warps."""
    return min(16, max(1, channels // (128 if backward else 256)))


def aot_specs() -> list[dict]:
    """Widths 1152 to 8192, both norms, gated and plain."""
    specs = []
    for widest, dtype, gated, rms in (
        (4096, "bf16", True, False),
        (2048, "bf16", False, True),
        (8192, "fp32", True, True),
        (1024, "fp32", False, False),
    ):
        rows = dict.fromkeys(("X", "H", "GATE", "SCALE", "SHIFT", "SUM", "Y", "G", "GX", "DX", "DH"), f"*{dtype}")
        rows |= dict.fromkeys(("DGATE", "DSCALE", "DSHIFT"), "*fp32")
        for kernel in (norm_forward, norm_backward):
            width = min(widest, WIDEST_BACKWARD) if kernel is norm_backward else widest
            const = {"RMS": rms, "GATED": gated, "EACH": False, "EACH_GATE": False, "BC": width}
            const = {name: value for name, value in const.items() if name in kernel.arg_names}
            args = {
                name: "i32" if name in ("N", "C", "ROWS") else "i64" for name in kernel.arg_names if name not in const
            }
            args |= {name: kind for name, kind in rows.items() if name in args} | {"eps": "fp32"}
            tag = f"{width} {dtype} {'rms' if rms else 'layer'}{' gated' if gated else ''}"
            spec = {
                "kernel": kernel.__name__,
                "args": args,
                "const": const,
                "warps": warps(width, kernel is norm_backward),
                "stages": 1,
                "tag": tag,
            }
            specs.append(spec | {"unaligned": tuple(SIZES), "extra": widest != 4096})
    return specs
