"""Block-sparse attention on views whose channels do not lie side by side, on empty tensors, and on wrong inputs."""

import pytest
import torch
from block_sparse_helper import exact, expand, lists

from tessera.kernels.attention import block_sparse as m

SERVES = [m.launch, m.reference]
NAMES = ["kernel", "reference"]


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize("share", [1.0, 0.5], ids=["full", "listed"])
@pytest.mark.parametrize("view", ["every other channel", "channels before tokens", "broadcast"])
def test_channels_that_do_not_lie_side_by_side(view, share, serve, device, error):
    if view == "every other channel":
        q, k, v = torch.randn(3, 1, 2, 200, 64, device=device)[..., ::2]
    elif view == "channels before tokens":
        q, k, v = torch.randn(3, 1, 2, 32, 200, device=device).mT
    else:
        q, k, v = (torch.randn(1, 1, 200, 32, device=device).expand(1, 2, 200, 32) for _ in range(3))
    idx, cnt = m.full_lists(4, 4, device) if share == 1 else (x.to(device) for x in lists(1, 2, 4, 4, share))
    got = serve(q, k, v, idx, cnt)
    assert error(got[0], exact(q, k, v, expand(idx, cnt, (64, 64), (200, 200)))[0]) < 2e-6


@pytest.mark.parametrize("serve", SERVES, ids=NAMES)
@pytest.mark.parametrize(("queries", "keys"), [(70, 0), (0, 70), (0, 0)])
def test_no_queries_or_no_keys(queries, keys, serve, device):
    q, k = torch.randn(1, 2, queries, 32, device=device), torch.randn(1, 2, keys, 32, device=device)
    idx = torch.zeros(1, 1, -(-queries // 64), 1, dtype=torch.int32, device=device)
    out, lse = serve(q, k, k, idx, torch.zeros_like(idx[..., 0]))
    assert out.shape == q.shape and (out == 0).all() and lse.isneginf().all() and lse.shape == q.shape[:3]


def test_wrong_inputs_are_told_in_a_sentence():
    q = torch.randn(1, 1, 64, 16)
    idx, cnt = m.full_lists(1, 1)
    with pytest.raises(ValueError, match=r"\[B, H, N, D\] each, 4 dimensions"):
        m.reference(q[0], q[0], q[0], idx, cnt)
    with pytest.raises(ValueError, match="at least 1 token, got block_m 0"):
        m.reference(q, q, q, idx, cnt, block_m=0)
    with pytest.raises(ValueError, match="idx must hold integers, got torch.float32"):
        m.reference(q, q, q, idx.float(), cnt)
    with pytest.raises(ValueError, match="one of the 2 segments"):
        m.reference(q, q, q, idx, cnt, segments=torch.full((64,), 2), segment_bias=torch.zeros(2))
