"""State space duality (SSD, Mamba2): gated linear attention with one decay for each head and token.

    y_t = C_t . S_t      S_t = exp(a_t) S_{t-1} + B_t x_t^T      so y_t = sum_{s <= t} exp(g_t - g_s) (C_t . B_s) x_s

with g the running sum of the log decays a <= 0. In chunks of 64 tokens this is three products of matrices: what a chunk
adds to the state, the masked products inside a chunk, and the state that enters it (arXiv 2405.21060, section 6; LinGen,
arXiv 2412.09856, section 3.2, scans so in both directions). No factor ever exceeds 1, however strong the decay.

The reverse scan is the forward scan of the flipped tokens, flipped back: y_t = C_t . (exp(a_t) S_{t+1} + B_t x_t^T).
Direction "both" is the sum of the two in one pass: every load of x, B and C serves both, and the pairs of a chunk are
one matrix, whose lower half decays forwards and whose upper half decays backwards. A token's own term then counts
`diagonal` times: twice in a plain sum of two scans, once where the sum is to be a single weighting of all tokens.
"""

import torch

from .._triton import on_gpu
from . import _fla, _ssd_launch
from ._reference import exact, rows_like
from ._ssd_kernels import ssd_carry as ssd_carry
from ._ssd_kernels import ssd_out as ssd_out
from ._ssd_kernels import ssd_state as ssd_state
from ._ssd_launch import aot_specs as aot_specs
from ._ssd_launch import chunk_of, ready
from ._ssd_passes import DIRECTIONS, backward, forward, scan_of, stacked, starts


def _check(x, b, c, a, state, direction, a_reverse, diagonal) -> None:
    if direction not in DIRECTIONS or diagonal not in (1, 2):
        raise ValueError(f"Direction {direction!r} must be one of {[*DIRECTIONS]} and diagonal {diagonal} be 1 or 2.")
    fits = x.ndim == b.ndim == 4 and b.shape == c.shape and (b.shape[0], b.shape[2]) == (x.shape[0], x.shape[2])
    if not fits or 0 in x.shape or 0 in b.shape or x.shape[1] % b.shape[1]:
        raise ValueError(
            f"Values {[*x.shape]} do not fit B {[*b.shape]} and C {[*c.shape]}: [B, H, N, E] and twice [B, G, N, S], "
            "H a multiple of G, nothing empty."
        )
    for name, given in (("a", a), ("a_reverse", a_reverse)):
        if given is not None and (given.shape != x.shape[:3] or not given.is_floating_point()):
            raise ValueError(f"Log decays {name} {[*given.shape]} {given.dtype} must be floats {[*x.shape[:3]]}.")
    if a_reverse is not None and direction == "forward":
        raise ValueError("a_reverse is the decay of the reverse scan: choose direction 'both' or 'reverse'.")
    if not x.dtype == b.dtype == c.dtype or not x.is_floating_point():
        raise ValueError(f"Values, B and C need one float dtype, got {x.dtype}, {b.dtype}, {c.dtype}.")
    want = _state_shape(x, b, direction)
    if state is not None and (state.shape != want or state.dtype != exact(x[:0]).dtype):
        raise ValueError(
            f"The state {[*state.shape]} {state.dtype} must be {[*want]} {exact(x[:0]).dtype}, as a call returns it."
        )


def _state_shape(x, b, direction: str) -> tuple[int, ...]:
    shape = (*x.shape[:2], b.shape[3], x.shape[3])
    return (2, *shape) if direction == "both" else shape


def reference(
    x: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    a: torch.Tensor,
    state: torch.Tensor | None = None,
    direction: str = "forward",
    a_reverse: torch.Tensor | None = None,
    diagonal: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, H, N, E], b and c [B, G, N, S] with H a multiple of G, any strides, one float dtype; a [B, H, N], natural
    logarithm of the decays, <= 0 (-inf: forgets), any float dtype; a_reverse like a, decays of the reverse scan (None:
    a); state fp32 [B, H, S, E], what came before (None: nothing), and behind the last token for "reverse"; for "both"
    [2, B, H, S, E], forward first. diagonal: how often a token's own term counts in "both", 1 or 2.

    -> out [B, H, N, E] (token-major memory if x's is) and the state(s) after the scan, fp32 (fp64 for fp64). Raises
    ValueError when shapes, dtypes or names do not fit.
    """
    _check(x, b, c, a, state, direction, a_reverse, diagonal)
    return forward(x, b, c, a, state, direction, a_reverse, diagonal)


ssd = torch.library.custom_op("tessera::ssd", reference, mutates_args=())


@ssd.register_fake
def _fake(x, b, c, a, state=None, direction="forward", a_reverse=None, diagonal=1):
    return rows_like(x, x.shape[3]), x.new_empty(_state_shape(x, b, direction), dtype=exact(x[:0]).dtype)


@on_gpu(ssd)
def launch(
    x: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    a: torch.Tensor,
    state: torch.Tensor | None = None,
    direction: str = "forward",
    a_reverse: torch.Tensor | None = None,
    diagonal: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference, which serves fp64."""
    _check(x, b, c, a, state, direction, a_reverse, diagonal)
    if x.dtype == torch.float64:
        return forward(x, b, c, a, state, direction, a_reverse, diagonal)
    scan = scan_of(a, a_reverse, direction, diagonal, torch.float32, chunk_of(8 * x.element_size()))
    high, low, enter, leave, total = _ssd_launch.vectors(scan.of)
    like, (x, b, c) = x, (ready(t) for t in (x, b, c))
    states = _ssd_launch.parts(b, x, leave, total.shape[3])
    last = _ssd_launch.carried(states, total, starts(state, direction), len(scan.ways), direction)
    twice = diagonal if direction == "both" else 1
    out = _ssd_launch.outputs(c, b, x, high, low, enter, states, 1.0, direction, twice, like)
    return out, stacked([*last], direction)


def backward_reference(
    grad: torch.Tensor,
    grad_state: torch.Tensor,
    x: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    a: torch.Tensor,
    state: torch.Tensor | None,
    direction: str,
    a_reverse: torch.Tensor | None,
    diagonal: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, b, c, a, a_reverse (empty where not given) and the state that came in; products of matrices on
    every device."""
    given = grad, grad_state, x, b, c, a, state, direction, a_reverse, diagonal
    dx, db, dc, da, da_reverse, dstate = backward(*given)
    none = torch.zeros_like(a)
    da, da_reverse = (none if d is None else d.to(a.dtype) for d in (da, da_reverse))
    if a_reverse is None:
        da, da_reverse = da + da_reverse, a.new_empty(0)
    return dx, db, dc, da, da_reverse.to((a if a_reverse is None else a_reverse).dtype), dstate


ssd_backward = torch.library.custom_op("tessera::ssd_backward", backward_reference, mutates_args=())


@ssd_backward.register_fake
def _fake_backward(grad, grad_state, x, b, c, a, state, direction, a_reverse, diagonal):
    second = a.new_empty(0) if a_reverse is None else torch.empty_like(a_reverse)
    rows = [rows_like(t, t.shape[3]) for t in (x, b, c)]
    return *rows, torch.empty_like(a), second, torch.empty_like(grad_state)


def _save(ctx, inputs, output):
    x, b, c, a, state, ctx.direction, a_reverse, ctx.diagonal = inputs
    ctx.save_for_backward(x, b, c, a, state, a_reverse)


def _gradients(ctx, grad, grad_state):
    *tensors, a_reverse = ctx.saved_tensors
    given = ctx.direction, a_reverse, ctx.diagonal
    dx, db, dc, da, da_reverse, dstate = ssd_backward(grad, grad_state, *tensors, *given)
    started = tensors[-1] is not None
    return dx, db, dc, da, dstate if started else None, None, da_reverse if a_reverse is not None else None, None


ssd.register_autograd(_gradients, setup_context=_save)


def by_fla(
    x: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    a: torch.Tensor,
    state: torch.Tensor | None = None,
    direction: str = "forward",
    a_reverse: torch.Tensor | None = None,
    diagonal: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference, by flash-linear-attention, which scans forwards only: the reverse scan is one of flipped tokens, and
    B and C are repeated for each head of a group. Decays below e^-100 count as e^-100. RuntimeError where it is not
    installed, without a GPU, for fp32 and fp64, and for more than 256 states."""
    _check(x, b, c, a, state, direction, a_reverse, diagonal)
    _fla.check(c)
    scan = _fla.function("simple_gla", "chunk_simple_gla")
    b, c = (t.repeat_interleave(x.shape[1] // b.shape[1], 1) for t in (b, c))

    def scanned(start: torch.Tensor | None, decay: torch.Tensor, reverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, g = (t.flip(2) if reverse else t for t in (c, b, x, decay))
        given = {"q": _fla.rows(q), "k": _fla.rows(k), "v": _fla.rows(v), "g": _fla.gates(g), "scale": 1.0}
        out, last = scan(**given, initial_state=start, output_final_state=True)
        return (out.flip(1) if reverse else out).transpose(1, 2), last

    back = a if a_reverse is None else a_reverse
    if direction != "both":
        return scanned(state, back if direction == "reverse" else a, direction == "reverse")
    first, second = (None, None) if state is None else state.unbind(0)
    (forth, last), (out, end) = scanned(first, a, False), scanned(second, back, True)
    out = forth.float() + out.float()
    if diagonal == 1:
        out = out - (b.float() * c.float()).sum(-1, keepdim=True) * x.float()
    return out.to(x.dtype), torch.stack((last, end))


def example(tokens: int, device: str, dtype: torch.dtype) -> tuple:
    """A LinGen layer's mixer, both directions: 32 heads of 64 that share one B and C of 64; decays of a few tokens to
    a few hundred."""
    x = torch.randn(1, tokens, 32, 64, device=device).to(dtype).transpose(1, 2)
    b, c = (0.125 * torch.randn(1, 1, tokens, 64, device=device) for _ in range(2))
    a = -torch.exp(torch.empty(1, 32, tokens, device=device).uniform_(-6, 0))
    return x, b.to(dtype), c.to(dtype), a, None, "both"
