"""Which calls with extra keys the kernel serves: told without a GPU, by what stands for a call."""

from types import SimpleNamespace

import pytest
import torch

from tessera.patching import extra_keys
from tessera.patching.extra_keys import ExtraKeys, served


class Cuda(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    device = SimpleNamespace(type="cuda")


def call(queries, keys, mask=None):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, n, 8, generator=generator) for n in (queries, keys, keys))
    return SimpleNamespace(q=q.as_subclass(Cuda), k=k, v=v, mask=mask, scale=8**-0.5)


@pytest.mark.parametrize("theirs", [0, 4])
def test_the_biases_fall_on_the_last_keys(theirs, monkeypatch):
    told = {}
    monkeypatch.setattr(torch, "tensor", lambda data, device=None, kept=torch.tensor: kept(data))
    monkeypatch.setattr(
        extra_keys, "segment_bias", lambda q, k, v, ends, bias, scale: told.update(ends=ends, bias=bias)
    )
    forward = SimpleNamespace(extra_keys=[ExtraKeys(3, -0.5), ExtraKeys(2)])
    served(forward, call(6, 11 + theirs), lambda out: out, None)()
    assert told["ends"] == [6 + theirs, 9 + theirs, 11 + theirs] and told["bias"].tolist() == [[0.0, -0.5, 0.0]]


def test_masks_other_packs_and_crowds_are_left_to_torch():
    few, many = ([ExtraKeys(1, -0.5)] * count for count in (1, extra_keys.MOST))
    mask = torch.zeros(1, 1, 6, 7)
    for keys, made, earlier in ((few, call(6, 7, mask), None), (few, call(6, 7), print), (many, call(6, 15), None)):
        assert served(SimpleNamespace(extra_keys=keys), made, lambda out: out, earlier) is None
