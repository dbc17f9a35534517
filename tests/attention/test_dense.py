import pytest
import torch

from tessera.kernels.attention import _dense as m

needs_bfloat16 = pytest.mark.skipif(not m.multiplies_bfloat16(), reason="this CPU has no matrix instructions for bf16")


def exact(q, k, v, bias, scale):
    score = q.double() @ k.double().transpose(2, 3) * scale
    score = score if bias is None else score + bias
    return score.softmax(-1) @ v.double(), score.logsumexp(-1)


@needs_bfloat16
@pytest.mark.parametrize("loudness", [1, 6])
@pytest.mark.parametrize("bias", ["none", "keys", "pairs"])
@pytest.mark.parametrize(
    "shape", [(3, 1, 128, 384, 64), (2, 2, 33, 50, 72), (1, 3, 16, 16, 32), (2, 1, 7, 5, 40)], ids=str
)
def test_bfloat16_products_keep_the_scores(shape, bias, loudness, error):
    """Rounded scores cost most where logits are large: the log-sum-exp shows it, and the error stays that of rounded
    shares."""
    r, h, queries, keys, d = shape
    q, k, v = (torch.randn(h, r, n, d).bfloat16().transpose(0, 1) for n in (queries, keys, keys))
    q = q * loudness
    added = {"none": None, "keys": torch.randn(r, 1, 1, keys), "pairs": torch.randn(r, 1, queries, keys)}[bias]
    if added is not None:
        added[torch.rand_like(added) < 0.2] = -torch.inf
        added[..., 0] = 0
    out, level = m.in_bfloat16(q, k, v, added, 0.17, m.Scratch())
    want, want_level = exact(q, k, v, added, 0.17)
    assert error(out, want) < 4e-3 and out.dtype == torch.bfloat16
    assert (level - want_level).abs().max() < 1e-4 * loudness


@needs_bfloat16
def test_scratch_memory_does_not_leak_between_chunks():
    scratch = m.Scratch()
    for r, keys in ((4, 96), (1, 32), (3, 64)):
        q, k, v = (torch.randn(r, 1, n, 32).bfloat16() for n in (48, keys, keys))
        got, fresh = (m.in_bfloat16(q, k, v, None, 0.2, s) for s in (scratch, m.Scratch()))
        assert all(torch.equal(a, b) for a, b in zip(got, fresh, strict=True))


def test_chunks_of_other_types_are_dense():
    q, k, v = torch.randn(3, 2, 1, 20, 32)
    for a, b in zip(m.chunk_attention(q, k, v, None, 0.2, m.Scratch()), m.dense(q, k, v, None, 0.2), strict=True):
        assert torch.equal(a, b)
