"""Keys and values as a run holds them: as they are, or in 8 bits with a scale for each head."""

from dataclasses import dataclass

import torch

FP8 = torch.float8_e4m3fn
LARGEST = 448.0


@dataclass(frozen=True, eq=False)
class Held:
    """data [B, H, N, D]; scale [B, H, 1, 1] fp32 where data are fp8."""

    data: torch.Tensor
    scale: torch.Tensor | None
    dtype: torch.dtype

    def tensor(self) -> torch.Tensor:
        """[B, H, N, D] in the dtype that was given."""
        return self.data if self.scale is None else (self.data.float() * self.scale).to(self.dtype)

    @property
    def bytes(self) -> int:
        scales = 0 if self.scale is None else self.scale.numel() * 4
        return self.data.numel() * self.data.element_size() + scales


def hold(x: torch.Tensor, dtype: str = "auto") -> Held:
    """x [B, H, N, D]; dtype "auto" or "fp8_e4m3"."""
    if dtype == "auto":
        return Held(x, None, x.dtype)
    scale = x.float().abs().amax((2, 3), keepdim=True).clamp_min(1e-12) / LARGEST
    return Held((x.float() / scale).clamp(-LARGEST, LARGEST).to(FP8), scale, x.dtype)
