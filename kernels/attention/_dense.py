"""Dense attention over the gathered keys of one chunk, in plain torch."""

import functools
import math

import torch

SCORES = 1 << 26  # scores held at once where no fused attention serves


class Scratch:
    """Memory that the chunks of one call share: on a CPU new pages cost more than what is written to them."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised; whatever was taken under this name before is overwritten."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size or held.dtype != dtype:
            held = self._held[name] = torch.empty(size, dtype=dtype, device=like.device)
        return held[:size].view(shape)


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T + bias) v and its log-sum-exp. q [R, H, M, D], k and v [R, H, K, D], bias broadcast to
    [R, H, M, K]. Softmax in fp32 (fp64 for fp64) whatever the inputs are."""
    if q.device.type == "cpu":
        bias = bias if bias is None or q.dtype != torch.float64 else bias.double()
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # it takes the last stride for 1
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return attention(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
    step = max(1, SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    q, k, v = (x if x.dtype == torch.float64 else x.float() for x in (q, k, v))
    pieces = []
    for start in range(0, q.shape[2], step):
        score = (q[:, :, start : start + step] @ k.transpose(-1, -2)).mul_(scale)
        if bias is not None:
            score += bias if bias.shape[2] == 1 else bias[:, :, start : start + step]
        level = score.logsumexp(-1)
        share = (score - torch.where(level.isinf(), 0.0, level)[..., None]).exp_()
        pieces.append((share @ v, level))
    out, levels = zip(*pieces, strict=True)
    return torch.cat(out, 2), torch.cat(levels, 2)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has matrix instructions for bf16 that PyTorch's oneDNN uses."""
    told = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.backends.mkldnn.is_available() and any(ask is not None and ask() for ask in told)


def chunk_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float, scratch: Scratch
) -> tuple[torch.Tensor, torch.Tensor]:
    """dense() for a chunk, whose scores fit in memory at once: bf16 by matrix instructions where the CPU has them."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and multiplies_bfloat16():
        return in_bfloat16(q, k, v, bias, scale, scratch)
    return dense(q, k, v, bias, scale)


def in_bfloat16(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float, scratch: Scratch
) -> tuple[torch.Tensor, torch.Tensor]:
    """dense() with batched bf16 products. PyTorch's fused attention on a CPU runs bf16 no faster than fp32; a bf16 product
    is four times as fast, but rounds the scores, which would cost five times the error. So the scores are formed
    twice: rounded, and what the rounding left (the product accumulates in fp32). Their sum has 16 bits."""
    (r, h, m, d), n = q.shape, k.shape[2]
    q, k, v = (x.transpose(0, 1).reshape(h * r, -1, d) for x in (q, k, v))
    rounded, rest = (scratch.take(x, (h * r, m, n), q, q.dtype) for x in ("rounded", "rest"))
    score = scratch.take("score", (h * r, m, n), q, torch.float32)
    torch.baddbmm(rounded, q, k.transpose(1, 2), beta=0, alpha=scale, out=rounded)
    torch.baddbmm(rounded, q, k.transpose(1, 2), beta=-1, alpha=scale, out=rest)
    score.copy_(rounded).add_(rest)
    if bias is not None:
        score.view(h, r, m, n).add_(bias.transpose(0, 1))
    top = score.amax(-1)
    torch.softmax(score, -1, out=score)
    level = top - score.amax(-1).log()
    out = torch.bmm(rounded.copy_(score), v)
    return out.view(h, r, m, d).transpose(0, 1), level.view(h, r, m).transpose(0, 1)
