"""Calling conventions of optimized_attention, checked against ComfyUI's own backend, and masks as key biases."""

import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch

from tessera.methods.attention.call import AttentionCall
from tessera.patching.convention import unpack

B, H, N, M, D = 2, 4, 6, 9, 8


def heads(count: int, tokens: int) -> torch.Tensor:
    return torch.randn(B, count, tokens, D)


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def through(args, kwargs) -> torch.Tensor:
    """What a method that is exact would hand back."""
    q, k, v, mask, pack = unpack(args, kwargs)
    assert q.shape == (B, H, N, D) and k.shape == v.shape == (B, k.shape[1], M, D)
    assert mask is None or mask.ndim == 4
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, scale=kwargs.get("scale"), enable_gqa=k.shape[1] != H
    )
    return pack(out)


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return heads(H, N), heads(H, M), heads(H, M)


def same(args, kwargs):
    got, want = through(args, kwargs), attention_pytorch(*args, **kwargs)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("skip_output", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_flat_and_split_heads(qkv, skip, skip_output):
    args = qkv if skip else tuple(flat(t) for t in qkv)
    same((*args, H), {"skip_reshape": skip, "skip_output_reshape": skip_output})


def test_positional_and_keyword(qkv):
    q, k, v = (flat(t) for t in qkv)
    mask = torch.randn(N, M)
    want = attention_pytorch(q, k, v, H, mask=mask)
    for args, kwargs in [
        ((q, k, v, H, mask), {}),
        ((q, k, v, H), {"mask": mask}),
        ((q, k, v), {"heads": H, "mask": mask}),
        ((), {"q": q, "k": k, "v": v, "heads": H, "mask": mask}),
        ((q, k, v, H, mask, None, False, False), {}),
    ]:
        torch.testing.assert_close(through(args, kwargs), want)


def test_positional_skips(qkv):
    same((*qkv, H, None, None, True, True), {})


@pytest.mark.parametrize(
    "shape", [(N, M), (B, N, M), (B, 1, M), (B, H, N, M), (B, 1, 1, M), (1, 1, N, M), (1, H, 1, M)]
)
@pytest.mark.parametrize("kind", [torch.float32, torch.bool])
def test_masks(qkv, shape, kind):
    mask = torch.randn(shape)
    mask = mask if kind is torch.float32 else (mask > -0.5)
    if kind is torch.bool:
        mask[..., 0] = True
    same((*(flat(t) for t in qkv), H), {"mask": mask})
    same((*qkv, H), {"mask": mask, "skip_reshape": True})


@pytest.mark.parametrize("skip", [False, True])
def test_grouped_heads(skip):
    q, k, v = heads(H, N), heads(2, M), heads(2, M)
    args = (q, k, v) if skip else (flat(q), flat(k), flat(v))
    same((*args, H), {"enable_gqa": True, "skip_reshape": skip})
    assert unpack((*args, H), {"enable_gqa": True, "skip_reshape": skip})[1].shape == (B, 2, M, D)


def test_sd3_passes_split_values_beside_flat_queries(qkv):
    q, k, v = qkv
    split = v.transpose(1, 2).contiguous()  # [B, M, H, D]
    torch.testing.assert_close(
        through((flat(q), flat(k), split, H), {}), attention_pytorch(flat(q), flat(k), flat(v), H)
    )


def test_other_scale_and_unknown_keywords(qkv):
    same((*qkv, H), {"skip_reshape": True, "scale": 0.5})
    through((*qkv, H), {"skip_reshape": True, "a_newer_core": object(), "_inside_attn_wrapper": True})


def call(mask) -> AttentionCall:
    q, k, v = heads(H, N), heads(H, M), heads(H, M)
    return AttentionCall(q, k, v, mask, D**-0.5, "self", None, None, None)


def test_no_mask_is_no_bias():
    assert call(None).key_bias() is None


@pytest.mark.parametrize("shape", [(B, 1, 1, M), (1, 1, 1, M), (B, H, N, M), (1, 1, N, M), (B, 1, N, M)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.bool])
def test_masks_that_are_the_same_for_every_query(shape, kind):
    keys = torch.randn(shape[0], 1, 1, M)
    keys = keys > -0.5 if kind is torch.bool else keys.to(kind)
    one = call(keys.expand(shape))
    bias = one.key_bias()
    assert bias.shape == (B, M) and bias.dtype == torch.float32
    attend = torch.nn.functional.scaled_dot_product_attention
    mask = one.mask if kind is torch.bool else one.mask.float()
    torch.testing.assert_close(
        attend(one.q, one.k, one.v, bias[:, None, None]), attend(one.q, one.k, one.v, mask), equal_nan=True
    )


@pytest.mark.parametrize("shape", [(B, 1, N, M), (B, H, 1, M)])
def test_masks_that_differ_between_queries_or_heads(shape):
    with pytest.raises(ValueError, match="differs between queries"):
        call(torch.randn(shape)).key_bias()
