"""What RF-Edit shares between an inversion and an edit (arXiv 2411.04746): features of self-attention by block and sigma."""

from dataclasses import dataclass, field

import torch

WHAT = ("v", "k", "kv", "attn_out")
DTYPES = ("model", "float8")
MOST = 448.0  # of float8_e4m3fn
Kept = tuple[torch.Tensor, torch.Tensor | None]  # on the CPU, and its scale where it is held as float8


@dataclass(eq=False)
class Bank:
    """sigmas: the schedule from noise to picture. steps: how many of its steps, from the noise on, are held. what: v and k
    are [B, Hkv, M, D] of one attention call, attn_out [B, N, ...]."""

    sigmas: tuple[float, ...]
    steps: int
    what: str = "v"
    dtype: str = "model"
    images: dict[int, slice | None] = field(default_factory=dict)  # image tokens among all, by block
    grid: tuple[int, ...] | None = None  # of the source's tokens, where it is known
    seen: set[float] = field(default_factory=set)  # sigmas that the recorded run asked for
    kept: dict[tuple[int, int], dict[float, tuple[Kept, ...]]] = field(default_factory=dict)

    def wants(self, sigma: float) -> bool:
        """Whether an edit could ask for this evaluation."""
        return self.steps > 0 and sigma > self.sigmas[self.steps] + 1e-6

    def see(self, sigma: float) -> None:
        """The recorded run asks for an evaluation, computed or not."""
        if self.wants(sigma):
            self.seen.add(round(sigma, 6))

    def keep(self, at: tuple[int, int], sigma: float, tensors: tuple[torch.Tensor, ...]) -> None:
        """at: block and number of its call. The tensors are copied."""
        self.kept.setdefault(at, {})[round(sigma, 6)] = tuple(self._stored(t) for t in tensors)

    def _stored(self, tensor: torch.Tensor) -> Kept:
        if self.dtype == "model":
            return tensor.detach().to("cpu", copy=True).contiguous(), None
        scale = tensor.detach().float().abs().amax().clamp_min(1e-12) / MOST
        return (tensor.detach() / scale).to(torch.float8_e4m3fn).cpu(), scale.cpu()

    def find(self, at: tuple[int, int], sigma: float, like: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """The features of the sigma nearest to this one, as `like` is held; None where this call was not recorded."""
        series = self.kept.get(at)
        if not series:
            return None
        nearest = min(series, key=lambda s: abs(s - sigma))
        return tuple(_loaded(t, scale, like) for t, scale in series[nearest])

    @property
    def complete(self) -> bool:
        """Whether every recorded call holds all that was asked for, in one size."""
        each = [(set(s), {tuple(t.shape for t, _ in entry) for entry in s.values()}) for s in self.kept.values()]
        return bool(each) and all(sigmas == self.seen and len(shapes) == 1 for sigmas, shapes in each)

    @property
    def bytes_held(self) -> int:
        return sum(t.nbytes for s in self.kept.values() for entry in s.values() for t, _ in entry)


def _loaded(tensor: torch.Tensor, scale: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    if scale is not None:
        return (tensor.to(like.device).float() * scale.to(like.device)).to(like.dtype)
    return tensor.to(like)


def mixed(own: torch.Tensor, other: torch.Tensor, strength: float, dim: int, tokens: slice | None) -> torch.Tensor:
    """own [B, ...] with `strength` of other [B or 1, ...]. tokens: only these along dim. Returns a new tensor."""
    other = other if other.shape[0] == own.shape[0] else other.expand(own.shape[0], *other.shape[1:])
    out = own.clone()
    place = [slice(None)] * own.ndim
    if tokens is not None:
        place[dim] = tokens
    at = tuple(place)
    out[at] = other[at] if strength == 1 else torch.lerp(own[at], other[at].to(own), strength)
    return out
