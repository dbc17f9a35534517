"""The constant state of linear attention over chunks: equal to a masked sum over every pair of tokens."""

import diffusers_helper as tiny
import pytest
import torch
from nodes_helper import error
from sana_helper import network
from torch.nn import functional as F

from tessera.methods.video import blocks as plan
from tessera.networks.sana_layers import CHUNK, EPS, Attention, FrameConv, Sizes, positions, rotated
from tessera.patching.block_memory import CURRENT, Block
from tessera.patching.linear_memory import LinearMemory

ROWS = [(0, "a"), (1, "b")]  # role and uuid of each chunk of a batch of two


def memory(window: int = 0, dtype: str = "fp32", layers: int = 2) -> LinearMemory:
    return LinearMemory("Block Linear Video Sampler", layers, window, dtype, {})


def options_of(held: LinearMemory, number: int, bounds: list[int], commit: bool = True, rows=ROWS[:1]) -> dict:
    """transformer_options of a call of the network for one chunk."""
    slots = {row: (row[0], 0) for row in ROWS}
    block = Block(number, bounds[number], bounds[number + 1], bounds[-1], bounds, commit, slots)
    options = {CURRENT: block, "cond_or_uncond": [r for r, _ in rows], "uuids": [u for _, u in rows]}
    held.open(options, block)
    return options


def rows_of(frames: int, tokens: int = 4, batch: int = 1) -> list[torch.Tensor]:
    """q, k, v, q_rot, k_rot [B, 2, frames * tokens, 16], as the network has them."""
    q, k, v = (torch.randn(batch, frames * tokens, 2, 16) for _ in range(3))
    q, k, pe = q.relu(), k.relu(), positions(16, (frames, 2, tokens // 2), {}, "cpu")
    return [x.transpose(1, 2) for x in (q, k, v, rotated(q, pe), rotated(k, pe))]


def seen(bounds: list[int], tokens: int, window: int) -> torch.Tensor:
    """[N, N]: token i of chunk c sees those of its own chunk and of the `window` before it, all where it is 0."""
    chunk = torch.cat([torch.full(((b - a) * tokens,), n) for n, (a, b) in enumerate(plan.pairs(bounds))])
    back = chunk[:, None] - chunk[None, :]
    return (back >= 0) & (back <= (window or len(bounds)))


def explicit(q, k, v, q_rot, k_rot, mask) -> torch.Tensor:
    """Every pair of tokens, in fp64."""
    q, k, v, q_rot, k_rot = (x.double() for x in (q, k, v, q_rot, k_rot))
    weights = (q_rot @ k_rot.transpose(2, 3)) * mask
    total = ((q @ k.transpose(2, 3)) * mask).sum(-1, keepdim=True)
    return (weights @ v / (total + EPS)).float()


def chunked(held: LinearMemory, given: list[torch.Tensor], bounds: list[int], tokens: int) -> torch.Tensor:
    """The outputs of the commit passes of one layer, one after the other."""
    made = []
    for number, (first, last) in enumerate(plan.pairs(bounds)):
        options = options_of(held, number, bounds) | {"block_index": 0}
        part = [x[:, :, first * tokens : last * tokens] for x in given]
        made.append(held.attend(options, *part))
        held.frame_before(options, torch.zeros(len(part[0]), (last - first) * tokens, 32), last - first)
        held.finished(options[CURRENT])
    return torch.cat(made, 2)


@pytest.mark.parametrize("window", [0, 1, 2, 9])
def test_chunks_are_the_masked_sum_over_all_pairs(window):
    bounds, tokens = plan.split(13, 3), 4
    given = rows_of(13, tokens, batch=2)
    want = explicit(*given, seen(bounds, tokens, window))
    got = chunked(memory(window, layers=1), given, bounds, tokens)
    assert bounds == [0, 4, 7, 10, 13] and error(got, want) < 1e-5
    other = explicit(*given, seen(bounds, tokens, {0: 1}.get(window, 0)))
    assert window == 9 or error(got, other) > 1e-2
    turned = explicit(given[3], given[4], given[2], given[3], given[4], seen(bounds, tokens, window))
    assert error(got, turned) > 1e-2  # the denominator's keys are not rotated


def test_a_chunk_that_is_sampled_reads_and_does_not_write():
    bounds, given, held = [0, 2, 4], rows_of(4), memory(layers=1)
    chunked(held, given, [0, 2], 4)
    before = held.held_bytes()
    options = options_of(held, 1, bounds, commit=False) | {"block_index": 0}
    part = [x[:, :, 8:] for x in given]
    got = held.attend(options, *part)
    assert torch.equal(held.attend(options, *part), got) and held.held_bytes() == before
    assert error(got, explicit(*given, seen(bounds, 4, 0))[:, :, 8:]) < 1e-5


def test_bf16_sums_are_half_the_bytes_and_close():
    bounds, given = plan.split(8, 2), rows_of(8)
    exact, half = memory(layers=1), memory(0, "bf16", layers=1)
    assert 0 < error(chunked(half, given, bounds, 4), chunked(exact, given, bounds, 4)) < 2e-2
    assert 2 * sum(s.nbytes for s in half.sums.values()) == sum(s.nbytes for s in exact.sums.values())


def test_a_ring_grows_with_a_clip_that_goes_on():
    """Four chunks are kept by a clip of four; the window of six goes on with them."""
    tokens, whole, given = 4, plan.split(9, 1), rows_of(9)
    first, second = memory(6, layers=1), memory(6, layers=1)
    chunked(first, [x[:, :, : 4 * tokens] for x in given], whole[:5], tokens)
    second.restore(*first.state(), torch.device("cpu"))
    out = []
    for number in range(4, 9):
        options = options_of(second, number, whole) | {"block_index": 0}
        part = [x[:, :, number * tokens : (number + 1) * tokens] for x in given]
        out.append(second.attend(options, *part))
        second.frame_before(options, torch.zeros(1, tokens, 32), 1)
        second.finished(options[CURRENT])
    want = explicit(*given, seen(whole, tokens, 6))[:, :, 4 * tokens :]
    assert error(torch.cat(out, 2), want) < 1e-5


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sums.0.0.1", lambda t: None),
        ("frame.0.0.0", lambda t: None),
        ("sums.0.0.0", lambda t: t.int()),
        ("sums.0.0.0", lambda t: t.double()),
        ("sums.0.0.1", lambda t: t[:1]),
        ("sums.0.0.0", lambda t: t[..., 1:]),
        ("frame.0.0.1", lambda t: t.repeat(2, 1, 1)),
        ("frame.0.0.1", lambda t: t.int()),
        ("frame.0.0.1", lambda t: t.flatten()),
        ("sums.0.0.9", lambda t: torch.zeros(2, 1, 2, 272)),
        ("junk", lambda t: torch.zeros(1)),
        ("junk.0.0.0", lambda t: torch.zeros(1)),
    ],
)
def test_sums_that_were_not_kept_so_get_a_sentence(name, change):
    sums = {f"sums.0.0.{layer}": torch.rand(2, 1, 2, 272) for layer in range(2)}
    whole = sums | {f"frame.0.0.{layer}": torch.rand(1, 6, 32) for layer in range(2)}
    facts = memory(2).state()[1]
    memory(2).restore(whole, facts, torch.device("cpu"))
    made = {key: value for key, value in whole.items() if key != name}
    changed = change(whole.get(name))
    with pytest.raises(ValueError, match="sums are not whole"):
        memory(2).restore(made if changed is None else {**made, name: changed}, facts, torch.device("cpu"))
    other = memory(2)
    other.sizes = Sizes(heads=4, head=8)
    with pytest.raises(ValueError, match="2 heads and a width of 32, and this one has 4 and 32"):
        other.restore(whole, facts, torch.device("cpu"))


def test_another_setting_s_state_gets_a_sentence():
    tensors, facts = memory(2).state()
    with pytest.raises(ValueError, match="num_cached_blocks 2, and here it is 3"):
        memory(3).restore(tensors, facts, torch.device("cpu"))
    with pytest.raises(ValueError, match="state_dtype float32, and here it is bfloat16"):
        memory(2, "bf16").restore(tensors, facts, torch.device("cpu"))


def test_what_was_not_computed_gets_a_sentence():
    bounds, given, held = [0, 2, 4], rows_of(4), memory(layers=2)
    with pytest.raises(ValueError, match="1 of 2 blocks of the network"):
        chunked(held, given, bounds, 4)
    held = memory(layers=1)
    chunked(held, given, [0, 2], 4)
    options = options_of(held, 1, bounds, rows=ROWS[1:]) | {"block_index": 0}
    with pytest.raises(ValueError, match="kept of the finished frames for negative 1"):
        held.attend(options, *given)


class Masked:
    """The whole clip at once, by the explicit formula."""

    def __init__(self, mask):
        self.mask = mask

    def attend(self, options, *given):
        return explicit(*given, self.mask)

    def frame_before(self, options, x, frames):
        return None


def test_the_network_in_chunks_is_the_network_under_a_mask(monkeypatch):
    """Both prompts of a batch; the convolution over time does not see past the end of a chunk."""
    net, bounds = network(), [0, 3, 5, 7]
    x, t, text = torch.randn(2, 16, 7, 4, 6), torch.tensor([0.0, 0.0]), torch.randn(2, tiny.TOKENS, tiny.TEXT)
    held, made = memory(), []
    for number, (first, last) in enumerate(plan.pairs(bounds)):
        options = options_of(held, number, bounds, rows=ROWS)
        made.append(net.denoise(x[:, :, first:last], t, text, None, options))
        held.finished(options[CURRENT])

    def chunk_causal(weight, bias, y, frames, before):
        w, y = weight[..., 0], y.unflatten(1, (frames, -1))
        out = F.pad(y, (0, 0, 0, 0, 1, 0))[:, :-1] @ w[:, :, 0].t() + y @ w[:, :, 1].t()
        after = F.pad(y, (0, 0, 0, 0, 0, 1))[:, 1:] @ w[:, :, 2].t()
        after[:, [last - 1 for last in bounds[1:]]] = 0
        return (out + after).flatten(1, 2)

    for module in net.modules():
        if isinstance(module, FrameConv):
            monkeypatch.setattr(module, "product", chunk_causal)
    want = net.denoise(x, t, text, None, {CHUNK: Masked(seen(bounds, 6, 0))})
    assert error(torch.cat(made, 2), want) < 1e-5
    assert error(torch.cat(made, 2), net.denoise(x, t, text)) > 1e-2


def test_held_bytes_know_nothing_of_the_length():
    """After 2 and after 50 chunks, also of a ring, and by the tensors themselves."""
    net, text, t = network(), torch.randn(1, 2, tiny.TEXT), torch.zeros(1)
    for window, size in ((0, 1), (2, 2)):
        held, bytes_of = memory(window), []
        bounds = list(range(51))
        for number in range(50):
            options = options_of(held, number, bounds)
            net.denoise(torch.randn(1, 16, 1, 2, 2), t, text, None, options)
            held.finished(options[CURRENT])
            bytes_of.append(held.held_bytes())
        own = 2 * (size * 2 * 16 * 17 + 32) * 4  # layers x (ring x heads x D (D + 1) + one token of the last frame)
        assert bytes_of[1] == bytes_of[49] == own
        assert sum(x.nbytes for x in held.state()[0].values()) == own


def test_only_self_attention_is_linear():
    """The test above means all layers: a new one would need a state too."""
    kinds = {type(m).__name__ for m in network().modules() if isinstance(m, Attention)}
    assert kinds == {"LinearAttention", "CrossAttention"}
