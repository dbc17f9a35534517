"""The four steps of linear attention in torch; _launch.py holds the same functions on a GPU. Each works on chunks given
by their bounds (0, .., N). A state is packed, [B, H, C, F (E + 1)]: F rows of E sums, then F masses."""

import itertools

import torch

PIECE = (
    1 << 20
)  # bytes of features at a time on a CPU: they stay in its cache, so that cost grows no faster than tokens


def exact(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype that sums are kept in: fp64 for fp64, else fp32."""
    return x if x.dtype == torch.float64 else x.float()


def rows_like(x: torch.Tensor, width: int) -> torch.Tensor:
    """Uninitialised [B, H, N, width] for x [B, H, N, D]; token-major memory where x is."""
    b, h, n, _ = x.shape
    token_major = x.stride(2) > x.stride(1)
    return x.new_empty(b, n, h, width).transpose(1, 2) if token_major else x.new_empty(b, h, n, width)


def features(x: torch.Tensor, feature_map: str) -> torch.Tensor:
    """phi(x) [.., F] for x [.., D] in x's precision; F = 2 D for hedgehog, else D."""
    if feature_map == "relu":
        return x.relu()
    if feature_map == "elu1":
        return torch.nn.functional.elu(x) + 1
    if feature_map == "softmax":
        return x.softmax(-1)
    if feature_map == "hedgehog":
        return torch.cat((x.softmax(-1), (-x).softmax(-1)), -1)
    return x


def _chain(g: torch.Tensor, x: torch.Tensor, feature_map: str) -> torch.Tensor:
    """Gradient of x from g, that of phi(x)."""
    if feature_map == "relu":
        return g * (x > 0)
    if feature_map == "elu1":
        return g * x.clamp(max=0).exp()
    if feature_map == "softmax":
        f = x.softmax(-1)
        return f * (g - (f * g).sum(-1, keepdim=True))
    if feature_map == "hedgehog":
        up, down = g.chunk(2, -1)
        return _chain(up, x, "softmax") - _chain(down, -x, "softmax")
    return g


def _pieces(x, rotated, chunk, feature_map):
    """Features of one chunk: those of the sums, those of the mass."""
    f = features(exact(x[:, :, chunk]), feature_map)
    return (f if rotated is None else exact(rotated[:, :, chunk])), f


def _chunks(bounds):
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def _steps(x: torch.Tensor, chunk: slice) -> list[slice]:
    """The chunk in pieces; whole on devices where each call costs more than the memory traffic."""
    if x.device.type != "cpu":
        return [chunk]
    b, h, _, d = x.shape
    step = max(128, PIECE // (4 * b * h * d))
    return [slice(n, min(n + step, chunk.stop)) for n in range(chunk.start, chunk.stop, step)]


def _split(state: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed [B, H, F (E + 1)] -> sums [B, H, F, E], mass [B, H, F]."""
    f = state.shape[-1] // (width + 1)
    return state[..., : f * width].unflatten(-1, (f, width)), state[..., f * width :]


def state(x, rotated, v, bounds, feature_map, start=None, grad=None, factor=None, slope=None, reverse=False):
    """Running totals [B, H, C, W] over chunks of sum a^T v (a = rotated or phi(x)) and sum phi(x), from `start`
    [B, H, W]. Row n counts factor [B, H, N] in the sums, slope in the mass. reverse: totals over this chunk and the
    later ones, each adding its grad [B, H, C, W]."""
    totals, run = [], start
    order = list(enumerate(_chunks(bounds)))
    for c, chunk in reversed(order) if reverse else order:
        own = None if grad is None else grad[:, :, c]
        for step in _steps(x, chunk):
            a, f = _pieces(x, rotated, step, feature_map)
            if factor is not None:
                a, f = a * factor[:, :, step, None], f * slope[:, :, step, None]
            sums = torch.cat(((a.transpose(2, 3) @ exact(v[:, :, step])).flatten(2), f.sum(2)), -1)
            own = sums if own is None else own + sums
        run = own if run is None else run + own
        totals.append(run)
    return torch.stack(totals[::-1] if reverse else totals, 2)


def apply(x, rotated, state, bounds, feature_map, normalizer, eps, width):
    """out [B, H, N, width] = share b S with b = rotated or phi(x), and share [B, H, N]."""
    out = rows_like(x, width)
    shares = []
    for c, chunk in enumerate(_chunks(bounds)):
        sums, mass = _split(state[:, :, c], width)
        for step in _steps(x, chunk):
            b, f = _pieces(x, rotated, step, feature_map)
            y = b @ sums
            if normalizer == "rms":
                share = y.square().mean(-1).add(eps).rsqrt()
            elif normalizer == "none":
                share = torch.ones_like(y[..., 0])
            else:
                total = (f @ mass[..., None])[..., 0] + eps
                share = torch.where(total == 0, 0, 1 / torch.where(total == 0, 1, total))
            out[:, :, step] = y * share[..., None]
            shares.append(share)
    return out, torch.cat(shares, 2)


def rows(grad, out, share, normalizer):
    """slope [B, H, N], the gradient of phi(q) z, and h like grad: share h is the gradient of the numerator."""
    if normalizer == "none":
        return torch.zeros_like(share), grad
    dot = (exact(grad) * exact(out)).sum(-1)
    if normalizer == "rms":
        h = exact(grad) - exact(out) * (dot / out.shape[3])[..., None]
        return torch.zeros_like(share), h.to(grad.dtype)
    return -dot * share, grad


def gradient(x, v, state, bounds, feature_map, dual, factor=None, slope=None):
    """Gradients of x and (dual, else empty) of the rotated rows that were multiplied by the state's sums in its place:
    phi'(x) (factor v S^T + slope z); factor, slope [B, H, N], None: ones."""
    dx = rows_like(x, x.shape[3])
    rotated = rows_like(x, x.shape[3]) if dual else x.new_empty(0)
    for c, chunk in enumerate(_chunks(bounds)):
        sums, mass = _split(state[:, :, c], v.shape[3])
        g = exact(v[:, :, chunk]) @ sums.transpose(2, 3)
        of_mass = mass[:, :, None]
        if factor is not None:
            g, of_mass = g * factor[:, :, chunk, None], of_mass * slope[:, :, chunk, None]
        if dual:
            rotated[:, :, chunk] = g
            g = 0
        dx[:, :, chunk] = _chain(g + of_mass, exact(x[:, :, chunk]), feature_map)
    return dx, rotated
