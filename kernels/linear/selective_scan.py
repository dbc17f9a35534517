"""Selective scan (S6, Mamba): every channel d has S states of its own decays, which the tokens speed up or slow down.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t      y_t = C_t . h_t + skip u_t

with A [D, S] <= 0, delta [B, N, D] >= 0 and B_t, C_t [S] shared by the channels of a group (Mamba, arXiv 2312.00752,
section 3.2; the four scans of LaMamba-Diff, arXiv 2408.02615, are four groups, or four calls). Decays differ between
channels and states, so there is no product of matrices in it as in ssd.py: the tokens are cut into chunks that are
scanned at once, and the states between chunks follow one after another. Only decays <= 1 are ever formed.
"""

import torch

from .._triton import on_gpu, triton
from ._reference import exact
from ._selective_kernels import SIZES, selective_carry, selective_chunk
from ._selective_passes import backward, forward
from ._ssd_launch import ready

CHUNK = 64  # tokens that one program goes through
BLOCK = 256  # numbers of a state that one program carries
WIDEST = 256  # states of a channel


def _check(u, delta, a, b, c, skip, state) -> None:
    fits = u.ndim == 3 and u.shape == delta.shape and a.ndim == 2 and b.ndim == 4 and b.shape == c.shape
    if not fits or (b.shape[0], b.shape[2], b.shape[3]) != (*u.shape[:2], a.shape[1]) or a.shape[0] != u.shape[2]:
        raise ValueError(
            f"Inputs {[*u.shape]}, delta {[*delta.shape]}, A {[*a.shape]}, B {[*b.shape]} and C {[*c.shape]} must be "
            "[B, N, D] twice, [D, S] and [B, G, N, S] twice."
        )
    if 0 in u.shape or 0 in b.shape or u.shape[2] % b.shape[1]:
        raise ValueError(f"{u.shape[2]} channels of inputs {[*u.shape]} must fill {b.shape[1]} groups, nothing empty.")
    if not u.dtype == b.dtype == c.dtype or not all(x.is_floating_point() for x in (u, delta, a)):
        raise ValueError(
            f"Inputs, B and C need one float dtype and delta and A any, got {u.dtype}, {b.dtype}, {c.dtype}, "
            f"{delta.dtype}, {a.dtype}."
        )
    if skip is not None and skip.shape != u.shape[2:]:
        raise ValueError(f"skip {[*skip.shape]} must hold one number for each of {u.shape[2]} channels.")
    want = (u.shape[0], *a.shape)
    if state is not None and (state.shape != want or state.dtype != exact(u[:0]).dtype):
        raise ValueError(
            f"The state {[*state.shape]} {state.dtype} must be {[*want]} {exact(u[:0]).dtype}, as a call returns it."
        )


def reference(
    u: torch.Tensor,
    delta: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """u [B, N, D] and delta [B, N, D] >= 0; a [D, S] <= 0; b, c [B, G, N, S], D a multiple of G; u, b and c of one
    float dtype, any strides; skip [D] (None: 0); state fp32 [B, D, S], what came before, in the order of the scan
    (None: nothing). reverse: from the last token to the first, as flip, scan, flip.

    -> out [B, N, D] like u and the state after the scan, fp32 (fp64 for fp64). Raises ValueError when shapes or dtypes
    do not fit.
    """
    _check(u, delta, a, b, c, skip, state)
    return forward(u, delta, a, b, c, skip, state, reverse)


selective_scan = torch.library.custom_op("tessera::selective_scan", reference, mutates_args=())


@selective_scan.register_fake
def _fake(u, delta, a, b, c, skip=None, state=None, reverse=False):
    return torch.empty_like(u), u.new_empty(u.shape[0], *a.shape, dtype=exact(u[:0]).dtype)


def _tile(states: int, width: int) -> dict[str, int]:
    """Constants of selective_chunk: a tile of 1024 numbers, eight a thread."""
    padded = 1 << (states - 1).bit_length()
    channels = min(max(4, 1024 // padded), 128, max(4, 1 << (width - 1).bit_length()))
    return {"WIDTH": width, "S": states, "BS": padded, "BD": channels, "L": CHUNK}


@on_gpu(selective_scan)
def launch(
    u: torch.Tensor,
    delta: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference, which serves fp64 and more than 256 states a channel."""
    _check(u, delta, a, b, c, skip, state)
    (batch, n, channels), groups, states = u.shape, b.shape[1], a.shape[1]
    if u.dtype == torch.float64 or states > WIDEST:
        return forward(u, delta, a, b, c, skip, state, reverse)
    b, c, a, chunks = ready(b), ready(c), a.float().contiguous(), triton.cdiv(n, CHUNK)
    held = u.new_empty(batch, chunks, channels, states, dtype=torch.float32)
    sums = u.new_empty(batch, chunks, channels, dtype=torch.float32)
    last, out = u.new_empty(batch, channels, states, dtype=torch.float32), torch.empty_like(u)
    tile = _tile(states, channels // groups)
    grid = (chunks, groups * triton.cdiv(tile["WIDTH"], tile["BD"]), batch)
    given = (
        u, delta, a, b, c, a if skip is None else skip.float().contiguous(), held, sums, out, n, chunks, channels,
        *u.stride(), *delta.stride(), *b.stride()[:3], *c.stride()[:3], *out.stride(),
    )  # fmt: skip
    flags = {"SKIPPED": skip is not None, "REVERSE": reverse, "num_warps": 4}
    selective_chunk[(grid)](*given, WRITE=False, **flags, **tile)
    selective_carry[(triton.cdiv(channels * states, BLOCK), batch)](
        a, sums, held, last if state is None else state.contiguous(), last, chunks, channels,
        S=states, STARTED=state is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    selective_chunk[(grid)](*given, WRITE=True, **flags, **tile)
    return out, last


def backward_reference(
    grad: torch.Tensor,
    grad_state: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    skip: torch.Tensor | None,
    state: torch.Tensor | None,
    reverse: bool,
) -> list[torch.Tensor]:
    """Gradients of u, delta, a, b, c, skip (empty where not given) and the state that came in, on every device."""
    du, ddelta, da, db, dc, dskip, first = backward(grad, grad_state, u, delta, a, b, c, skip, state, reverse)
    of_skip = u.new_empty(0) if skip is None or dskip is None else dskip.to(skip.dtype)
    return [du, ddelta, da.to(a.dtype), db, dc, of_skip, first]


selective_scan_backward = torch.library.custom_op(
    "tessera::selective_scan_backward", backward_reference, mutates_args=()
)


@selective_scan_backward.register_fake
def _fake_backward(grad, grad_state, u, delta, a, b, c, skip, state, reverse):
    rows = [torch.empty_like(x.transpose(1, 2)).transpose(1, 2) for x in (b, c)]
    of_skip = u.new_empty(0) if skip is None else skip.new_empty(skip.shape)
    first = torch.empty_like(grad_state, memory_format=torch.contiguous_format)
    return [torch.empty_like(u), torch.empty_like(delta), a.new_empty(a.shape), *rows, of_skip, first]


def _save(ctx, inputs, output):
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad, grad_state):
    *_, skip, state = ctx.saved_tensors
    *got, dskip, first = selective_scan_backward(grad, grad_state, *ctx.saved_tensors, ctx.reverse)
    return *got, None if skip is None else dskip, None if state is None else first, None


selective_scan.register_autograd(_gradients, setup_context=_save)


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """One scan of a LaMamba-Diff block: 640 channels of one state (its XL width), decays of a few to many tokens."""
    u = torch.randn(1, tokens, 640, device=device).to(dtype)
    delta = torch.exp(torch.empty(1, tokens, 640, device=device).uniform_(-6, 0)).to(dtype)
    b, c = torch.randn(2, 1, 1, tokens, 1, device=device).to(dtype)
    return u, delta, -torch.ones(640, 1, device=device), b, c, torch.ones(640, device=device)


def aot_specs() -> list[dict]:
    """Compilations for bench/aot.py: LaMamba's one state, Mamba's 16, and the most that the kernel takes."""
    strides = "un ud dn dd bn cn on od"
    args = dict.fromkeys(["U", "B", "CC", "OUT"], "*{}") | dict.fromkeys(["A", "SKIP", "STATES", "SUMS"], "*fp32")
    args |= dict.fromkeys(SIZES, "i64") | dict.fromkeys(strides.split() + ["N", "C", "CHANNELS"], "i32")
    made: list[dict] = []
    for dtype, states, write, reverse in [
        ("bf16", 16, True, False), ("bf16", 16, False, False), ("bf16", 1, True, True), ("fp16", 16, True, True),
        ("fp32", 16, True, False), ("fp32", 64, False, True), ("bf16", 256, True, False), ("bf16", 7, True, True),
    ]:  # fmt: skip
        const = {**_tile(states, 1280), "WRITE": write, "SKIPPED": True, "REVERSE": reverse}
        kinds = {name: kind.format(dtype) for name, kind in args.items()} | {"DELTA": "*fp32"}
        tag = f"{states} states {dtype} {'outputs' if write else 'states'}{' reverse' if reverse else ''}"
        spec = {"kernel": "selective_chunk", "args": kinds, "const": const, "tag": tag, "extra": bool(made)}
        made.append(
            spec | {"warps": 4, "stages": 3, "per_target": {}, "expect": {}, "unaligned": (*SIZES, *strides.split())}
        )
    args = dict.fromkeys(["A", "SUMS", "STATES", "START", "LAST"], "*fp32") | {"C": "i32", "CHANNELS": "i32"}
    const = {"S": 16, "STARTED": True, "BLOCK": BLOCK}
    carry = {"kernel": "selective_carry", "args": args, "const": const, "tag": "16 states", "warps": 4, "stages": 3}
    return [*made, carry | {"per_target": {}, "expect": {}, "unaligned": ("C", "CHANNELS")}]
