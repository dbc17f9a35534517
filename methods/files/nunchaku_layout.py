"""Nunchaku's packed layers, brought into row-major order (nunchaku-tech/nunchaku 3a3cc3d: lora/flux/packer.py,
src/kernels/awq/gemv_awq.cu; mit-han-lab/deepcompressor 69f3473: backend/nunchaku and backend/tinychat, which write them).

SVDQuant W4A4 of a weight [N, K], as the tensor cores of one warp load it. N is padded to 128, K to 128, ranks to 16.
  qweight  tiles of 128 rows and 64 columns; in a tile 8 groups of 16 rows; in a group 32 lanes (8 rows x 4); a lane holds
           2 x 2 words (rows 8 apart, columns 32 apart) of 8 neighbouring columns, four bits each, two's complement.
  wscales, bias, smooth: in tiles of 128, a lane holds elements 2i, 2i+1, 2i+8, 2i+9 of a run of 16.
  proj_down, proj_up: blocks of 16 x 16, a lane holds 2 x 2 pairs of neighbours (8 apart both ways).
AWQ W4A16: four rows interleave in chunks of 64 columns; of 32 columns, word j of 16 bits holds j, j+8, j+16, j+24.

y = Q((x + shift) / smooth) W^T + x down up^T + bias, where the shift is SHIFT for layers whose activations are unsigned."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ...kernels.quant.packed import Packed, pack_codes

GROUP = 64
SHIFT = 0.171875  # added after GELU, whose least value is -0.17: the activations then fit 0..15


@dataclass(frozen=True)
class SvdLinear:
    """One SVDQuant layer in comfy_kitchen's natural order (TensorCoreSVDQuantW4A4Layout)."""

    qweight: torch.Tensor  # int8 [N, K / 2], column 2j in the low four bits
    scale: torch.Tensor  # [K / 64, N]
    smooth: torch.Tensor  # [K], activations are divided by it
    down: torch.Tensor  # [K, R]
    up: torch.Tensor  # [N, R]
    bias: torch.Tensor | None  # [N]
    unsigned: bool = False

    def rows(self, start: int, stop: int) -> "SvdLinear":
        """Outputs start..stop alone; they share the activation's side with the other outputs."""
        bias = None if self.bias is None else self.bias[start:stop]
        cut = self.scale[:, start:stop].contiguous()
        return replace(self, qweight=self.qweight[start:stop], scale=cut, up=self.up[start:stop], bias=bias)

    def codes(self) -> torch.Tensor:
        """int8 [N, K] in -8..7."""
        return torch.stack((self.qweight << 4 >> 4, self.qweight >> 4), dim=-1).flatten(1)

    def packed(self) -> Packed:
        """The same codes and scales as a table of 16 equal steps (smooth, branch and bias stay apart)."""
        codes = (self.codes() + 8).view(torch.uint8)
        table = torch.arange(-8.0, 8.0, device=codes.device)
        return Packed(
            "table4", codes.shape[1], pack_codes(codes, "table4", GROUP), self.scale.t().contiguous(), table, GROUP
        )

    def unshifted(self) -> "SvdLinear":
        """The same function of unquantized activations without a shift: it is folded into the bias."""
        if not self.unsigned:
            return self
        folded = self._residual().sum(1) * SHIFT
        bias = folded if self.bias is None else self.bias.float() + folded
        return replace(self, bias=bias.to(self.scale.dtype), unsigned=False)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight [N, K], bias [N]) in fp32: the layer for unquantized activations."""
        residual = self._residual()
        bias = torch.zeros_like(residual[:, 0]) if self.bias is None else self.bias.float()
        if self.unsigned:
            bias = bias + residual.sum(1) * SHIFT
        return residual + self.up.float() @ self.down.float().t(), bias

    def _residual(self) -> torch.Tensor:
        """The quantized part with the smoothing undone, fp32 [N, K]."""
        scale = self.scale.t().float().repeat_interleave(GROUP, dim=1)
        return self.codes().float() * scale / self.smooth.float()


def join(parts: list[SvdLinear], axis: str) -> SvdLinear:
    """One layer of several, by "rows" (outputs side by side; smoothing must be the same) or "columns" (inputs side by
    side, outputs added). The branches go side by side, so ranks add unless the parts share their down. ValueError where
    the parts cannot be one layer."""
    first = parts[0]
    if any(part.unsigned != first.unsigned for part in parts):
        raise ValueError("Layers with and without shifted activations cannot be joined; call unshifted() first.")
    if axis == "columns":
        biases = [part.bias.float() for part in parts if part.bias is not None]
        return SvdLinear(
            torch.cat([part.qweight for part in parts], dim=1),
            torch.cat([part.scale for part in parts]),
            torch.cat([part.smooth for part in parts]),
            torch.block_diag(*[part.down for part in parts]),
            torch.cat([part.up for part in parts], dim=1),
            torch.stack(biases).sum(0).to(first.scale.dtype) if biases else None,
            first.unsigned,
        )
    if any(not torch.equal(part.smooth, first.smooth) for part in parts):
        raise ValueError("Layers with different smoothing factors cannot be joined by rows; keep them apart.")
    shared = all(part.down.shape == first.down.shape and torch.equal(part.down, first.down) for part in parts)
    if any(part.bias is None for part in parts) and any(part.bias is not None for part in parts):
        parts = [replace(p, bias=torch.zeros_like(p.scale[0])) if p.bias is None else p for p in parts]
    ups = [part.up for part in parts]
    return SvdLinear(
        torch.cat([part.qweight for part in parts]),
        torch.cat([part.scale for part in parts], dim=1),
        first.smooth,
        first.down if shared else torch.cat([part.down for part in parts], dim=1),
        torch.cat(ups) if shared else torch.block_diag(*ups),
        None if parts[0].bias is None else torch.cat([part.bias for part in parts if part.bias is not None]),
        first.unsigned,
    )


@dataclass(frozen=True)
class AwqLinear:
    """One W4A16 layer in comfy_kitchen's natural order (TensorCoreAWQW4A16Layout): w = (q - 8) scale + zeros."""

    qweight: torch.Tensor  # int8 [N, K / 2], column 2j in the low four bits, q in 0..15
    scale: torch.Tensor  # [K / 64, N]
    zeros: torch.Tensor  # [K / 64, N]
    bias: torch.Tensor | None  # [N]

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight [N, K], bias [N]) in fp32."""
        data = self.qweight.view(torch.uint8)
        codes = torch.stack((data & 15, data >> 4), dim=-1).flatten(1).float() - 8
        scale, zeros = (t.t().float().repeat_interleave(GROUP, dim=1) for t in (self.scale, self.zeros))
        bias = torch.zeros_like(scale[:, 0]) if self.bias is None else self.bias.float()
        return codes * scale + zeros, bias


def _tile_order(packed: torch.Tensor) -> torch.Tensor:
    """[.., G, N] stored in tiles of 128 -> row-major [G, N]; the shape in the file is only nominal."""
    n, groups = packed.shape[-1], packed.numel() // packed.shape[-1]
    lanes = packed.reshape(n // 128, groups, 8, 4, 2, 2)
    return lanes.permute(1, 0, 2, 4, 3, 5).reshape(groups, n)


def _branch(packed: torch.Tensor, down: bool) -> torch.Tensor:
    """[C, R] in blocks of 16 -> row-major [C, R] (down: K, R; up: N, R)."""
    c, r = packed.shape
    lanes = packed.reshape(c // 16, r // 16, 8, 4, 2, 2, 2)  # blocks, rows, columns, 8 down, 8 right, pair
    blocks = lanes.permute(0, 1, 4, 2, 5, 3, 6).reshape(c // 16, r // 16, 16, 16)
    if down:  # a block is [r, c]
        return blocks.permute(0, 3, 1, 2).reshape(c, r)
    return blocks.permute(0, 2, 1, 3).reshape(c, r)


def unpack_svd(name: str, tensors: Mapping[str, torch.Tensor], unsigned: bool = False) -> SvdLinear:
    """The layer of {qweight, wscales, smooth_factor, proj_down, proj_up, bias}; branch and bias may be missing, other
    tensors are not looked at. ValueError, with the layer's name and the sizes, where they do not fit each other."""
    q = tensors["qweight"]
    if q.dtype != torch.int8 or q.ndim != 2 or q.shape[0] % 128 or q.shape[1] % 64:
        raise ValueError(f"{name}.qweight must be int8 [N, K / 2] in tiles of 128 x 128, got {_told(q)}.")
    n, k = q.shape[0], 2 * q.shape[1]
    if tensors["wscales"].dtype.itemsize == 1:
        raise ValueError(f"{name} holds NVFP4 weights, which are not read; take the int4 release of the same model.")
    _expect(name, tensors, {"wscales": (k // GROUP, n), "smooth_factor": (k,), "bias": (n,)})
    if ("proj_down" in tensors) != ("proj_up" in tensors):
        raise ValueError(f"{name} has one of proj_down and proj_up and needs both.")
    scale = tensors["wscales"]
    down, up = (tensors.get(key, scale.new_zeros(size, 0)) for key, size in (("proj_down", k), ("proj_up", n)))
    rank = down.shape[-1]
    if rank % 16 or tuple(down.shape) != (k, rank) or tuple(up.shape) != (n, rank):
        raise ValueError(f"{name} needs proj_down [{k}, R] and proj_up [{n}, R], got {_told(down)} and {_told(up)}.")
    smooth = _tile_order(tensors["smooth_factor"])[0]
    if not (smooth.float().abs() > 0).all():
        raise ValueError(f"{name}.smooth_factor [{k}] holds zeros or NaN, and activations are divided by it.")
    tiles = q.contiguous().view(torch.uint8).view(n // 128, k // 64, 8, 8, 4, 2, 2, 4)
    rows = tiles.permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(n, k // 2)
    bias = _tile_order(tensors["bias"])[0] if "bias" in tensors else None
    return SvdLinear(
        rows.view(torch.int8), _tile_order(scale), smooth, _branch(down, True), _branch(up, False), bias, unsigned
    )


def unpack_awq(name: str, tensors: Mapping[str, torch.Tensor], splits: int = 1) -> AwqLinear:
    """The layer of {qweight, wscales, wzeros, bias}. Modulations are written with their `splits` chunks (shift, scale, gate,
    ...) interleaved and 1 added to the bias of the scales: chunks come back one after the other, and without the 1. The
    zeros are 8 scales more than nunchaku's, formed in fp32. ValueError, with the layer's name and the sizes."""
    q = tensors["qweight"]
    if q.dtype != torch.int32 or q.ndim != 2 or q.shape[1] % 32 or 4 * q.shape[0] % splits:
        raise ValueError(f"{name}.qweight must be int32 [N / 4, K / 2], K in chunks of 64, got {_told(q)}.")
    n, k = 4 * q.shape[0], 2 * q.shape[1]
    groups = k // GROUP
    for key in ("wscales", "wzeros"):  # deepcompressor pads the groups to a multiple of 16
        t = tensors[key]
        if (
            not t.is_floating_point()
            or t.ndim != 2
            or t.shape[0] not in (groups, -(-groups // 16) * 16)
            or t.shape[1] != n
        ):
            raise ValueError(f"{name}.{key} must be [{groups}, {n}], got {_told(t)}.")
    _expect(name, tensors, {"bias": (n,)})
    data = q.contiguous().view(torch.uint8).view(n // 4, k // 64, 4, 2, 8, 2).transpose(1, 2).reshape(n, k // 32, 8, 2)
    even, odd = data[:, :, 0::2], data[:, :, 1::2]  # [N, K / 32, 4, 2]: words of columns 2j and 2j + 1
    low, high = (even & 15) | odd << 4, (even >> 4) | (odd & 240)
    rows = torch.stack((low, high), dim=-1).permute(0, 1, 3, 4, 2).reshape(n, k // 2)  # columns 8i + 2j, i of two bytes
    scale, zeros = tensors["wscales"][:groups], tensors["wzeros"][:groups]
    zeros = (zeros.float() + 8 * scale.float()).to(scale.dtype)
    bias = tensors.get("bias")
    if splits > 1:
        rows = rows.view(-1, splits, k // 2).transpose(0, 1).reshape(n, k // 2)
        scale, zeros = (t.reshape(groups, -1, splits).transpose(1, 2).reshape(groups, n) for t in (scale, zeros))
        if bias is not None:
            chunks = bias.float().view(-1, splits).t().clone()
            chunks[[1, splits - 2] if splits > 3 else [1]] -= 1
            bias = chunks.reshape(n).to(bias.dtype)
    return AwqLinear(rows.view(torch.int8), scale.contiguous(), zeros.contiguous(), bias)


def _told(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype)[6:]} {[*tensor.shape]}"


def _expect(name: str, tensors: Mapping[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    for key, shape in shapes.items():
        if key == "bias" and key not in tensors:
            continue
        if not tensors[key].is_floating_point() or tuple(tensors[key].shape) != shape:
            raise ValueError(f"{name}.{key} must be floating point {[*shape]}, got {_told(tensors[key])}.")
