"""Keys and values as a run holds them: as they are, or in 8 bits with scales."""

from dataclasses import dataclass

import torch

FP8 = torch.float8_e4m3fn
LARGEST = 448.0


@dataclass(frozen=True, eq=False)
class Held:
    """data [B, H, N, D]; scale fp32 [B, H, 1, 1] where data are fp8, [B, H, N, 1] where they are int8."""

    data: torch.Tensor
    scale: torch.Tensor | None
    dtype: torch.dtype

    def tensor(self) -> torch.Tensor:
        """[B, H, N, D] in the dtype that was given."""
        return self.data if self.scale is None else (self.data.float() * self.scale).to(self.dtype)

    def made_by(self, dtype: str) -> bool:
        """Whether it is what `hold` makes for that dtype: a file may hold anything."""
        if self.data.ndim != 4:
            return False
        b, h, n, _ = self.data.shape
        kinds = {"auto": (self.dtype, None), "fp8_e4m3": (FP8, (b, h, 1, 1)), "int8": (torch.int8, (b, h, n, 1))}
        if self.scale is None:
            return (self.data.dtype, None) == kinds[dtype]
        return (self.data.dtype, tuple(self.scale.shape)) == kinds[dtype] and self.scale.dtype == torch.float32

    @property
    def bytes(self) -> int:
        scales = 0 if self.scale is None else self.scale.numel() * 4
        return self.data.numel() * self.data.element_size() + scales

    def tokens(self, count: int) -> "Held":
        """The first so many, in memory of their own."""
        scale = self.scale
        if scale is not None and scale.shape[2] > 1:
            scale = scale[:, :, :count].clone()
        return Held(self.data[:, :, :count].clone(), scale, self.dtype)

    def to(self, device: torch.device | str) -> "Held":
        return Held(self.data.to(device), None if self.scale is None else self.scale.to(device), self.dtype)


def hold(x: torch.Tensor, dtype: str = "auto") -> Held:
    """x [B, H, N, D]; dtype "auto", "fp8_e4m3" with a scale for each head, or "int8" with one for each token of a head."""
    if dtype == "auto":
        return Held(x, None, x.dtype)
    if dtype == "int8":
        scale = x.float().abs().amax(3, keepdim=True).clamp_min(1e-12) / 127
        return Held((x.float() / scale).round().to(torch.int8), scale, x.dtype)
    scale = x.float().abs().amax((2, 3), keepdim=True).clamp_min(1e-12) / LARGEST
    return Held((x.float() / scale).clamp(-LARGEST, LARGEST).to(FP8), scale, x.dtype)
