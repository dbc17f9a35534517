"""How ComfyUI's models call optimized_attention."""

NAMES = ("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")


def unpack(args, kwargs):
    """Every calling convention of optimized_attention -> q, k, v as [B, H, N, D], the mask as 4-D or None, and the
    function that packs an output [B, H, N, D] as this caller expects it."""
    given = dict(zip(NAMES, args, strict=False))
    given.update({n: kwargs[n] for n in NAMES if n in kwargs})
    q, k, v, heads = given["q"], given["k"], given["v"], given["heads"]
    if not given.get("skip_reshape"):
        batch, dim = q.shape[0], q.shape[-1] // heads
        q = q.reshape(batch, -1, heads, dim).transpose(1, 2)
        grouped = k.shape[-1] // dim if kwargs.get("enable_gqa") else heads
        k, v = (t.reshape(batch, -1, grouped, dim).transpose(1, 2) for t in (k, v))
    mask = given.get("mask")
    if mask is not None:
        mask = mask[None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
    keep = bool(given.get("skip_output_reshape"))

    def pack(out):
        return out if keep else out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1)

    return q, k, v, mask, pack
