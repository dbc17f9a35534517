"""Linear attention as a method: the formulas of the papers written down with all N x N weights, the weights of a graft,
and what is refused."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tessera.archs import Layout
from tessera.methods.attention import graft as files
from tessera.methods.attention import linear as m
from tessera.methods.attention.call import AttentionCall, Decline

MAPS = {
    "relu": torch.relu,
    "elu1": lambda x: F.elu(x) + 1,
    "softmax": lambda x: x.softmax(-1),
    "hedgehog": lambda x: torch.cat((x.softmax(-1), (-x).softmax(-1)), -1),
    "identity": lambda x: x,
}
GRID, BEFORE, AFTER = (2, 5, 7), 3, 4
IMAGE = slice(BEFORE, BEFORE + 70)


def call_of(kv=4, dim=8, mask=None, rotation=None, dtype=torch.float32, path="blocks", index=0):
    layout = Layout(GRID, IMAGE, IMAGE.stop + AFTER)
    q, k, v = (torch.randn(2, layout.total, n, dim).to(dtype).transpose(1, 2) for n in (4, kv, kv))
    block = SimpleNamespace(number=0, count=2, index=index, spec=SimpleNamespace(path=path))
    return AttentionCall(q, k, v, mask, 0.3, "joint", layout, block, SimpleNamespace(rotation=rotation))


def explicit(q, k, v, feature_map, normalizer, eps, q_rot=None, k_rot=None):
    """phi of q, k [B, H, N, D]; from the weights of all pairs."""
    phi = MAPS[feature_map]
    below = phi(q) @ phi(k).transpose(2, 3)
    weights = below if q_rot is None else q_rot @ k_rot.transpose(2, 3)
    if normalizer in ("sum", "mean"):
        reduce = below.sum if normalizer == "sum" else below.mean
        weights = weights if normalizer == "sum" else weights / k.shape[2]
        return weights @ v / (reduce(-1, keepdim=True) + eps)
    out = weights @ v
    if normalizer == "none":
        return out
    axes = (3,) if normalizer == "rms" else (1, 3)
    return out / (out.square().mean(axes, keepdim=True) + 1e-6).sqrt()


def run(call, **settings):
    method = m.LinearAttention(**{"text": "linear", "normalizer": "sum", **settings})
    return method.attend(method.begin(), call)


@pytest.mark.parametrize("normalizer", m.NORMALIZERS)
@pytest.mark.parametrize("feature_map", m.FEATURE_MAPS)
def test_equals_the_formula(feature_map, normalizer, error):
    if feature_map == "identity" and normalizer in ("sum", "mean"):
        return  # weights of both signs: the sum may be as near to 0 as it likes
    call, eps = call_of(kv=2), 1e-6 if normalizer != "mean" else 1e-4
    k, v = (x.repeat_interleave(2, 1) for x in (call.k, call.v))
    answer = run(call, feature_map=feature_map, normalizer=normalizer, eps=eps)
    assert error(answer.out, explicit(call.q, k, v, feature_map, normalizer, eps)) < 1e-4
    assert answer.pairs == 8 * 77 * 8 * (2 if feature_map == "hedgehog" else 1) and answer.dense_pairs == 8 * 77**2


def test_text_rows_keep_softmax(error):
    call = call_of()
    dense, linear = F.scaled_dot_product_attention(call.q, call.k, call.v, scale=0.3), run(call).out
    got = run(call, text="dense")
    assert torch.equal(got.out[:, :, IMAGE], linear[:, :, IMAGE]) and got.pairs == 8 * 77 * (8 + BEFORE + AFTER)
    for part in (slice(0, BEFORE), slice(IMAGE.stop, None)):
        assert error(got.out[:, :, part], dense[:, :, part]) < 1e-6


@pytest.mark.parametrize("feature_map", ["relu", "softmax", "hedgehog"])
def test_padding_is_not_there(feature_map, error):
    mask = torch.ones(2, 1, 1, 77, dtype=torch.bool)
    mask[..., 74:] = False
    call = call_of(mask=mask)
    for text in ("dense", "linear"):
        got = run(call, feature_map=feature_map, text=text).out[:, :, IMAGE]
        want = explicit(call.q[:, :, IMAGE], call.k[:, :, :74], call.v[:, :, :74], feature_map, "sum", 1e-6)
        assert error(got, want) < 1e-5
    weights = torch.rand(1, 1, 1, 77)
    call = call_of(mask=weights.log())
    want = F.normalize(call.q.relu() @ call.k.relu().transpose(2, 3) * weights, p=1, dim=-1) @ call.v
    assert error(run(call).out, want) < 1e-4
    with pytest.raises(Decline, match="differs between queries"):
        run(call_of(mask=torch.ones(1, 1, 77, 77).tril().bool()))


def table(dim, stretch=1.0):
    """A RoPE table in ComfyUI's form [1, 1, N, D / 2, 2, 2]."""
    angle = torch.rand(1, 1, 77, dim // 2) * 6
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2))
    return turn * stretch


def rope(x, rotation):
    pairs = x.unflatten(-1, (-1, 2))
    return torch.einsum("xynpij,bhnpj->bhnpi", rotation, pairs).flatten(-2)


@pytest.mark.parametrize("stretch", [1.0, 1.2])
def test_dual_track(stretch, error):
    """SANA-Video: rotated features above, unrotated ones below. The call brings queries and keys after RoPE."""
    rotation, plain = table(8, stretch), call_of()
    q, k = (rope(x, rotation) for x in (plain.q, plain.k))
    given = AttentionCall(
        q, k, plain.v, None, 0.3, "joint", plain.layout, plain.block, SimpleNamespace(rotation=rotation)
    )
    above = [rope(x.relu(), rotation) for x in (plain.q, plain.k)]
    want = explicit(plain.q, plain.k, plain.v, "relu", "sum", 1e-15, *above)
    assert error(m.turned(q, rotation, back=True), plain.q) < 1e-5
    assert error(run(given, rope="dual", eps=1e-15).out, want) < 1e-4
    wrong = explicit(q, k, plain.v, "relu", "sum", 1e-15, *above)
    assert error(wrong, want) > 1e-2, "the divisor takes the features before RoPE"
    still = torch.eye(2).expand(1, 1, 77, 4, 2, 2)
    same = AttentionCall(
        plain.q, plain.k, plain.v, None, 0.3, "joint", plain.layout, None, SimpleNamespace(rotation=still)
    )
    assert error(run(same, rope="dual").out, run(same).out) < 1e-6
    for rotation in (None, table(16), still[:, :, 1:]):
        with pytest.raises(Decline, match="does not tell its RoPE"):
            run(call_of(rotation=rotation), rope="dual")


def test_heads_are_joined(error):
    call = call_of()
    wide = [x.transpose(1, 2).flatten(2)[:, None] for x in (call.q, call.k, call.v)]
    want = explicit(*wide, "softmax", "sum", 1e-6)[:, 0].unflatten(2, (4, 8)).transpose(1, 2)
    assert error(run(call, heads=1, feature_map="softmax").out, want) < 1e-5
    with pytest.raises(Decline, match="4 heads cannot be joined into 3"):
        run(call, heads=3)


def test_rows_without_weight_are_zero():
    call = call_of()
    call.q[:, :, 5] = -1
    for eps in (0.0, 1e-6):
        out = run(call, eps=eps).out
        assert bool((out[:, :, 5] == 0).all()) and bool(out.isfinite().all())


def grafted(blocks, arch="Flux", **hparams):
    return files.Graft(arch, "linear", hparams, blocks)


@pytest.mark.parametrize("shared", [False, True])
def test_the_convolution_of_a_graft(shared, error):
    call, width = call_of(), 8 if shared else 32
    weight, bias = torch.randn(width, 1, 5, 5), torch.randn(width)
    method = m.from_graft(
        m.LinearAttention(text="linear"), grafted({("blocks", 0): {"dwc.weight": weight, "dwc.bias": bias}})
    )
    plain = run(call).out
    got = method.attend(method.begin(), call).out
    assert torch.equal(got[:, :, :BEFORE], plain[:, :, :BEFORE])
    for frame in range(2):
        for head in range(4):
            own = slice(0, 8) if shared else slice(head * 8, head * 8 + 8)
            at = slice(BEFORE + 35 * frame, BEFORE + 35 * frame + 35)
            image = call.v[:, head, at].transpose(1, 2).unflatten(2, GRID[1:])
            want = F.conv2d(image, weight[own], bias[own], padding=2, groups=8).flatten(2).transpose(1, 2)
            assert error((got - plain)[:, head, at], want) < 1e-5


def test_projections_and_gamma_of_a_graft(error):
    call = call_of(dtype=torch.bfloat16)
    wq, wk, gamma = torch.randn(4, 8, 6), torch.randn(4, 8, 6), torch.rand(4)
    weights = {"proj_q.weight": wq, "proj_k.weight": wk, "gamma": gamma}
    method = m.from_graft(m.LinearAttention(), grafted({("blocks", 0): weights}, feature_map="hedgehog", text="linear"))
    q, k, v = (x.float() for x in (call.q, call.k, call.v))
    want = explicit(q @ wq, k @ wk, v, "hedgehog", "sum", 1e-6) * gamma[:, None, None]
    got = method.attend(method.begin(), call).out
    assert got.dtype == torch.bfloat16 and error(got, want) < 2e-2
    with pytest.raises(Decline, match="no weights for this block"):
        method.attend(method.begin(), call_of(index=1))


def test_a_graft_file_comes_back(tmp_path):
    path, weights = str(tmp_path / "g.safetensors"), {"graft.double_blocks.1.dwc.weight": torch.randn(8, 1, 3, 3)}
    told = {"format": "graft_v1", "op": "linear", "arch": "Flux", "hparams": json.dumps({"eps": 1e-4})}
    save_file(weights, path, told)
    graft = files.load(path)
    assert (graft.arch, graft.hparams) == ("Flux", {"eps": 1e-4}) and set(graft.blocks) == {("double_blocks", 1)}
    assert torch.equal(graft.blocks["double_blocks", 1]["dwc.weight"], weights["graft.double_blocks.1.dwc.weight"])
    assert m.from_graft(m.LinearAttention(), graft).eps == 1e-4
    for bad, metadata, words in (
        (weights, {}, "is no graft for this node"),
        (weights, {**told, "op": "sla"}, "op 'sla'"),
        ({"graft.blocks.0.dwc": torch.ones(3)}, told, "no parameter of a linear graft"),
        ({"graft.blocks.0.dwc.bias": torch.ones(3, 3)}, told, "no parameter of a linear graft"),
        (weights, {**told, "hparams": '{"blocks": 3}'}, "unknown setting 'blocks'"),
    ):
        save_file(bad, path, metadata)
        with pytest.raises(ValueError, match=words):
            files.load(path)


def test_what_is_refused():
    arch = SimpleNamespace(name="Flux")
    stack = [SimpleNamespace(spec=SimpleNamespace(path="blocks"), index=i) for i in range(3)]
    with pytest.raises(ValueError, match="all 3 blocks of a stock Flux gives noise"):
        m.LinearAttention().check(arch, stack, {0, 1, 2})
    m.LinearAttention(allow_untrained=True).check(arch, stack, {0, 1, 2})
    m.LinearAttention().check(arch, stack, {0, 2})
    weights = {"gamma": torch.ones(4)}
    m.LinearAttention(trained=grafted({("blocks", 2): weights})).check(arch, stack, {0, 1, 2})
    with pytest.raises(ValueError, match="trained for Wan, not for Flux"):
        m.LinearAttention(trained=grafted({("blocks", 2): weights}, "Wan")).check(arch, stack, {0})
    with pytest.raises(ValueError, match="weights for blocks.3, which this Flux lacks"):
        m.LinearAttention(trained=grafted({("blocks", 3): weights})).check(arch, stack, {0})
    for wrong in ({"feature_map": "exp"}, {"normalizer": "max"}, {"rope": "none"}, {"text": "off"},
                  {"rope": "dual", "feature_map": "hedgehog"}):  # fmt: skip
        with pytest.raises(ValueError, match="Unknown|cannot be rotated"):
            m.LinearAttention(**wrong)
    assert math.isclose(m.LinearAttention().eps, 1e-6)
