"""Checks, the turn by RoPE, and the two Triton kernels of gather_rows.py and scatter_rows.py."""

import torch

from .._triton import tl, triton

SIZES = ["N", "M", "C", "PAIRS", "xb", "rb", "yb", "ib", "fb"]
_jit = triton.jit(do_not_specialize=SIZES) if hasattr(triton, "__version__") else triton.jit


def check_index(x: torch.Tensor, idx: torch.Tensor) -> None:
    """x [B, N, C]; idx [M] or [B, M], integers."""
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"Rows must be floating point [B, N, C], got {[*x.shape]} {x.dtype}.")
    if idx.dtype not in (torch.int32, torch.int64) or idx.ndim not in (1, 2) or (idx.ndim == 2 and len(idx) != len(x)):
        raise ValueError(f"The index {[*idx.shape]} {idx.dtype} must be int32 or int64, [M] or [{x.shape[0]}, M].")
    if idx.device.type == "cpu" and idx.numel() and (int(idx.min()) < 0 or int(idx.max()) >= x.shape[1]):
        raise ValueError(f"The index runs from {int(idx.min())} to {int(idx.max())}, but there are {x.shape[1]} rows.")


def check_freqs(x: torch.Tensor, freqs: torch.Tensor | None) -> None:
    """freqs [N, P, 2, 2] or [B, N, P, 2, 2] for x [B, N, C], C a multiple of 2 P."""
    if freqs is None:
        return
    fits = freqs.ndim in (4, 5) and freqs.shape[-2:] == (2, 2) and freqs.shape[-4] == x.shape[1]
    if not fits or x.shape[2] % (2 * freqs.shape[-3]) or (freqs.ndim == 5 and len(freqs) not in (1, len(x))):
        raise ValueError(
            f"Rotations {[*freqs.shape]} must be [{x.shape[1]}, P, 2, 2] (or one for each of the batch) with 2 P a "
            f"divisor of the {x.shape[2]} channels."
        )


def expanded(idx: torch.Tensor, batch: int) -> torch.Tensor:
    """idx int64 [B, M]."""
    return idx.long().expand(batch, idx.shape[-1])


def turned(rows: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """Each pair of channels [.., C] times its 2 x 2 matrix of freqs [.., P, 2, 2], the same for every head of 2 P."""
    exact = torch.float64 if rows.dtype == torch.float64 else torch.float32
    pairs = rows.to(exact).unflatten(-1, (-1, freqs.shape[-3], 2))
    matrix = freqs.to(exact).unsqueeze(-4)
    return (matrix * pairs.unsqueeze(-2)).sum(-1).flatten(-3).to(rows.dtype)


@triton.jit
def _row(X, F, c, live, PAIRS, xc, TURN: tl.constexpr, BACK: tl.constexpr):
    """Channels c of one row in fp32, turned by F [PAIRS, 2, 2] (BACK: by its transpose)."""
    x = tl.load(X + c * xc, mask=live, other=0.0).to(tl.float32)
    if TURN:
        other = tl.load(X + (c ^ 1) * xc, mask=live, other=0.0).to(tl.float32)
        odd = c % 2
        at = F + ((c // 2) % PAIRS) * 4
        same = tl.load(at + odd * 3, mask=live, other=0.0)
        if BACK:
            cross = tl.load(at + 2 - odd, mask=live, other=0.0)
        else:
            cross = tl.load(at + 1 + odd, mask=live, other=0.0)
        x = x * same + other * cross
    return x


@_jit
def gather_kernel(
    X, IDX, F, Y, N, M, C, PAIRS, xb, xn, xc, ib, fb, yb, TURN: tl.constexpr, BACK: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Y[m] = X[IDX[m]], turned by F[IDX[m]]; one program a row and BC channels. An index outside gives zeros."""
    m, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    n = tl.load(IDX + batch * ib + m).to(tl.int64)
    live = (c < C) & (n >= 0) & (n < N)
    n = tl.where((n >= 0) & (n < N), n, 0)
    y = _row(X + batch * xb + n * xn, F + batch * fb + n * PAIRS * 4, c, live, PAIRS, xc, TURN, BACK)
    tl.store(Y + batch * yb + m * C + c, y.to(Y.dtype.element_ty), mask=c < C)


@_jit
def scatter_kernel(
    X, ROWS, SOURCE, F, Y, N, M, C, PAIRS, xb, xn, xc, rb, rn, rc, fb, yb,
    TURN: tl.constexpr, BACK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Y[n] = ROWS[SOURCE[n]] turned by F[n], or X[n] where SOURCE[n] < 0."""
    n, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    m = tl.load(SOURCE + batch * N + n).to(tl.int64)
    if m >= 0:
        at = F + batch * fb + n * PAIRS * 4
        y = _row(ROWS + batch * rb + m * rn, at, c, c < C, PAIRS, rc, TURN, BACK)
    else:
        y = tl.load(X + batch * xb + n * xn + c * xc, mask=c < C, other=0.0).to(tl.float32)
    tl.store(Y + batch * yb + n * C + c, y.to(Y.dtype.element_ty), mask=c < C)


def table(x: torch.Tensor, freqs: torch.Tensor | None) -> tuple[torch.Tensor, int, int]:
    """What the kernels read as F: fp32 contiguous, pairs, batch stride."""
    if freqs is None:
        return x, 1, 0
    freqs = freqs.float().contiguous()
    return freqs, freqs.shape[-3], freqs.stride(0) if freqs.ndim == 5 and len(freqs) > 1 else 0


def block(channels: int) -> int:
    return min(1024, max(16, 1 << (channels - 1).bit_length()))


def specs(kernel: str, pointers: tuple[str, ...], strides: tuple[str, ...]) -> list[dict]:
    """Compilations for bench/aot.py: plain and turned rows."""
    found = []
    for dtype, turn in (("bf16", True), ("bf16", False), ("fp32", True)):
        args = dict.fromkeys(pointers, f"*{dtype}") | dict.fromkeys(("N", "M", "C", "PAIRS"), "i32")
        args |= {"F": "*fp32" if turn else f"*{dtype}"} | dict.fromkeys(strides, "i64")
        args |= {"IDX": "*i32"} if kernel == "gather_kernel" else {"SOURCE": "*i32"}
        const = {"TURN": turn, "BACK": False, "BC": 1024}
        spec = {"kernel": kernel, "args": args, "const": const, "tag": f"{dtype}{' turned' if turn else ''}"}
        unaligned = (*SIZES, "xc", "rc")
        found.append(spec | {"warps": 4, "stages": 3, "unaligned": unaligned, "extra": dtype != "bf16" or not turn})
    return found
