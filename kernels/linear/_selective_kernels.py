"""The Triton kernels of selective_scan.py: a tile of channels goes through the tokens of one chunk, its state in
registers. Every chunk is scanned twice, once from nothing, for what it adds to the state, and once from the state that
selective_carry found to precede it, for its outputs; so all chunks run at once."""

from .._triton import tl, triton

SIZES = ["N", "C", "CHANNELS", "ub", "db", "bb", "bg", "cb", "cg", "ob"]
_jit = triton.jit(do_not_specialize=SIZES) if hasattr(triton, "__version__") else triton.jit


@_jit
def selective_chunk(
    U, DELTA, A, B, CC, SKIP, STATES, SUMS, OUT, N, C, CHANNELS,
    ub, un, ud, db, dn, dd, bb, bg, bn, cb, cg, cn, ob, on, od,
    WIDTH: tl.constexpr, S: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, L: tl.constexpr,
    WRITE: tl.constexpr, SKIPPED: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """BD channels of one group of WIDTH. Without WRITE: STATES [B, C, CHANNELS, S] gets the state that the chunk alone
    leaves, SUMS [B, C, CHANNELS] its sum of delta. With it: OUT, from the state in STATES."""
    chunk, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    tiles: tl.constexpr = (WIDTH + BD - 1) // BD
    group, own = tl.program_id(1) // tiles, (tl.program_id(1) % tiles) * BD + tl.arange(0, BD)
    s, live = tl.arange(0, BS), own < WIDTH
    channel = (group * WIDTH + own).to(tl.int64)
    cell = channel[:, None] * S + s[None, :]
    held = live[:, None] & (s < S)[None, :]
    a = tl.load(A + cell, mask=held, other=0.0)
    state = STATES + (batch * C + chunk) * CHANNELS * S + cell
    h, total = tl.zeros([BD, BS], tl.float32), tl.zeros([BD], tl.float32)
    if WRITE:
        h = tl.load(state, mask=held, other=0.0)
    if SKIPPED:
        skip = tl.load(SKIP + channel, mask=live, other=0.0)
    u_at, d_at, o_at = U + batch * ub + channel * ud, DELTA + batch * db + channel * dd, OUT + batch * ob + channel * od
    b_at, c_at = B + batch * bb + group * bg + s, CC + batch * cb + group * cg + s
    for step in tl.range(0, tl.minimum(L, N - chunk * L)):
        t = batch * 0 + chunk * L + step  # 64 bits
        if REVERSE:
            t = N - 1 - t
        u = tl.load(u_at + t * un, mask=live, other=0.0).to(tl.float32)
        delta = tl.load(d_at + t * dn, mask=live, other=0.0).to(tl.float32)
        b = tl.load(b_at + t * bn, mask=s < S, other=0.0).to(tl.float32)
        h = tl.exp(delta[:, None] * a) * h + (delta * u)[:, None] * b[None, :]
        if WRITE:
            c = tl.load(c_at + t * cn, mask=s < S, other=0.0).to(tl.float32)
            y = tl.sum(h * c[None, :], 1)
            if SKIPPED:
                y += skip * u
            tl.store(o_at + t * on, y.to(OUT.dtype.element_ty), mask=live)
        else:
            total += delta
    if not WRITE:
        tl.store(state, h, mask=held)
        tl.store(SUMS + (batch * C + chunk) * CHANNELS + channel, total, mask=live)


@_jit
def selective_carry(
    A, SUMS, STATES, START, LAST, C, CHANNELS,
    S: tl.constexpr, STARTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to the state becomes the state before it, in place; LAST [B, CHANNELS, S]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    mask = i < CHANNELS * S
    a = tl.load(A + i, mask=mask, other=0.0)
    run = tl.zeros([BLOCK], tl.float32)
    if STARTED:
        run = tl.load(START + batch * CHANNELS * S + i, mask=mask, other=0.0)
    for chunk in tl.range(0, C):
        line = (batch * C + chunk) * CHANNELS
        part = tl.load(STATES + line * S + i, mask=mask, other=0.0)
        total = tl.load(SUMS + line + i // S, mask=mask, other=0.0)
        tl.store(STATES + line * S + i, run, mask=mask)
        run = run * tl.exp(total * a) + part
    tl.store(LAST + batch * CHANNELS * S + i, run, mask=mask)
