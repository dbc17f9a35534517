"""One picture laid over another, and back (the blends of DiffDecompose, arXiv 2505.21541, each with an alpha).

With foreground x, background y and alpha a, all 0 to 1, the composite z is

    alpha     (1 - a) y + a x             add       y + a x
    screen    y + a x (1 - y)             multiply  y - a y (1 - x)

which is (1 - a) y + a B(x, y) with the blend B that gives the mode its name (screen: 1 - (1 - x)(1 - y)); add is not
cut at 1. Known a: three equations for three unknowns, solved wherever the factor of x is not 0. Unknown a: one unknown too
many; of the foregrounds that explain z exactly, the one with the least alpha is given. What no foreground within 0 to 1
explains is the residual.
"""

import torch

MODES = ("alpha", "screen", "add", "multiply")
LEAST = 1e-6  # a smaller factor of x than this tells nothing about it


def _wide(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """In fp64, on the CPU where a device lacks it."""
    return tuple((t.cpu() if t.device.type == "mps" else t).double() for t in tensors)


def _mixed(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, mode: str) -> torch.Tensor:
    """x, y [B, H, W, 3], a [B, H, W, 1] -> z."""
    if mode == "alpha":
        return (1 - a) * y + a * x
    return y + {"screen": a * x * (1 - y), "add": a * x, "multiply": -a * y * (1 - x)}[mode]


def blend(foreground: torch.Tensor, background: torch.Tensor, alpha: torch.Tensor, mode: str) -> torch.Tensor:
    """foreground, background [B, H, W, 3], alpha [B, H, W] -> composite like background. Alpha 0 is the background
    bit for bit."""
    x, y, a = _wide(foreground, background, alpha)
    return _mixed(x, y, a[..., None], mode).to(background)


def _solved(z: torch.Tensor, y: torch.Tensor, a: torch.Tensor, mode: str) -> torch.Tensor:
    """The foreground at this alpha, before it is cut to 0..1. Where z tells nothing: black, in multiply white."""
    rise = z - y
    factor = a * {"screen": 1 - y, "multiply": y}.get(mode, torch.ones_like(y))
    told = factor > LEAST
    x = rise / torch.where(told, factor, torch.ones_like(factor))
    x = x + {"alpha": y, "multiply": torch.ones_like(y)}.get(mode, torch.zeros_like(y))
    return torch.where(told, x, torch.full_like(x, 1.0 if mode == "multiply" else 0.0))


def _least_alpha(z: torch.Tensor, y: torch.Tensor, mode: str) -> torch.Tensor:
    """[B, H, W, 1]: the smallest alpha at which a foreground within 0..1 gives z in every channel, if one does."""
    rise = z - y
    if mode == "alpha":
        rise, room = rise.abs(), torch.where(rise > 0, 1 - y, y)
    elif mode == "multiply":
        rise, room = -rise, y
    else:
        room = 1 - y if mode == "screen" else torch.ones_like(y)
    told = room > LEAST
    share = torch.where(told, rise / torch.where(told, room, torch.ones_like(room)), torch.zeros_like(rise))
    return share.clamp(0, 1).amax(-1, keepdim=True)


def unblend(
    composite: torch.Tensor, background: torch.Tensor, mode: str, alpha: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """composite, background [B, H, W, 3], alpha [B, H, W] or None -> foreground [B, H, W, 3] within 0..1, alpha
    [B, H, W], and |composite - their blend| [B, H, W, 3]."""
    z, y = _wide(composite, background)
    a = _wide(alpha)[0][..., None] if alpha is not None else _least_alpha(z, y, mode)
    x = _solved(z, y, a, mode).clamp(0, 1)
    residual = (z - _mixed(x, y, a, mode)).abs()
    return x.to(composite), a[..., 0].to(composite) if alpha is None else alpha, residual.to(composite)


def _same_size(pictures: dict[str, torch.Tensor], node: str) -> None:
    sizes = {name: tuple(t.shape[1:3]) for name, t in pictures.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} {w} x {h}" for name, (h, w) in sizes.items())
        raise ValueError(f"{node} needs pictures of one size (width x height), got {told}. Scale or crop them first.")
    batches = {name: len(t) for name, t in pictures.items()}
    if len({*batches.values()} - {1}) > 1:
        told = ", ".join(f"{name} {n}" for name, n in batches.items())
        raise ValueError(f"{node} needs equal batches, or one picture for all, got {told}.")
    for name, t in pictures.items():
        if not torch.isfinite(t).all():
            raise ValueError(f"{node} got {name} with values that are not finite. Check what made it.")


def together(node: str, **pictures: torch.Tensor | None) -> list[torch.Tensor]:
    """Pictures [B, H, W, C] and masks [B, H, W] of one size, each repeated to the largest batch, in the order given;
    None are left out. ValueError, one sentence, where sizes or batches differ or a value is not finite."""
    found = {
        name: t if t.ndim > 2 else t[None] for name, t in pictures.items() if t is not None
    }  # a mask of one picture
    _same_size(found, node)
    rows = max(len(t) for t in found.values())
    return [t.expand(rows, *t.shape[1:]) for t in found.values()]


def layers(foreground: torch.Tensor, alpha: torch.Tensor | None, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    """foreground [B, H, W, 3 or 4] and a mask [B or 1, H, W] or None -> its colours [B, H, W, 3] and what it covers
    [B, H, W] times `strength`: the mask, else the fourth channel, else all."""
    if foreground.shape[-1] not in (3, 4):
        raise ValueError(f"Alpha Blend takes a foreground with 3 or 4 channels, got {foreground.shape[-1]}.")
    if alpha is None:
        alpha = foreground[..., 3] if foreground.shape[-1] == 4 else torch.ones_like(foreground[..., 0])
    return foreground[..., :3], (alpha.to(foreground).clamp(0, 1) * strength).expand(len(foreground), -1, -1)
