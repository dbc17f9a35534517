"""RelaCtrl's maths alone: permutations are undone, drawn in the official order, and one rule names them."""

import pytest
import torch
from relactrl_helper import GOLDEN, shapes

from tessera.methods.control import relactrl as m
from tessera.methods.control.relactrl_keys import read


def block_of(width, count, groups=None):
    d = width // count
    pairs = groups or [((torch.randn(3 * d, d), torch.randn(3 * d)), (torch.randn(d, d), torch.randn(d)))] * count
    linear = torch.randn(width, width), torch.randn(width)
    return m.ControlBlock(linear, linear, torch.randn(6, width), tuple(pairs))


def passing(d):
    """A group that attends to one token and gives its value back."""
    qkv = torch.zeros(3 * d, d)
    qkv[2 * d :] = torch.eye(d)
    return (qkv, torch.zeros(3 * d)), (torch.eye(d), torch.zeros(d))


@pytest.mark.parametrize("count", [1, 2, 6])
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_a_mixer_that_changes_nothing_gives_back_its_input(count, seed):
    """Segments of one token attend to themselves alone: whatever the permutations, each scalar is where it was."""
    block = block_of(48, count, [passing(48 // count)] * count)
    c = torch.randn(3, m.SEGMENTS, 48)
    draw = m.Draws(seed, [block.widths], m.SEGMENTS, torch.device("cpu"))[0]
    assert torch.equal(m.mix(block, c, draw), c)


def test_every_channel_is_mixed_by_its_own_group(monkeypatch):
    """The groups are told apart by what they multiply with."""
    block = block_of(24, 2)
    monkeypatch.setattr(
        m, "shuffle_window", lambda part, *rest, **_: part * (2 if rest[1] is block.groups[0][0][0] else 3)
    )
    both = m.ControlBlock(block.before, block.after, block.table, (block.groups[0], block_of(24, 2).groups[0]))
    c = torch.randn(1, 8, 24)
    draw = m.Draws(3, [both.widths], 8, torch.device("cpu"))[0]
    times = (m.mix(both, c, draw) / c)[0, 0].round()
    assert sorted(times[draw.order].tolist()) == times[draw.order].tolist() == [2.0] * 12 + [3.0] * 12


@pytest.mark.parametrize("seed", [0, 7, (1 << 64) - 1])
def test_draws_are_those_of_a_seeded_official_call(seed):
    widths, tokens = [(8, 8, 8), (12, 12)], 16
    torch.manual_seed(seed)
    want = [(torch.randperm(24), [torch.randperm(tokens * d) for d in each]) for each in widths]
    for order in ((0, 1), (1, 0)):
        draws = m.Draws(seed, widths, tokens, torch.device("cpu"))
        for n in order:
            assert torch.equal(draws[n].order, want[n][0])
            assert all(
                torch.equal(a, b) and a.dtype == torch.int32 for a, b in zip(draws[n].scalars, want[n][1], strict=True)
            )
    assert draws[1] is draws[1], "an evaluation draws once"
    assert not torch.equal(m.Draws(seed + 1, widths, tokens, torch.device("cpu"))[0].order, want[0][0])


def test_the_release_has_the_table_s_parameters():
    """45.7 million, which the release's page calls 45M."""
    table = {key: torch.zeros(1).expand(shape) for key, shape in shapes().items()}
    control = read(table, "relactrl_pixart_canny_1024.safetensors")
    assert control.parameters == GOLDEN["parameters"] == 45_715_968
    assert [len(block.groups) for block in control.blocks] == GOLDEN["groups"]
    assert list(control.places) == GOLDEN["places"] and control.width == GOLDEN["width"]
    held = sum(d.order.nbytes + sum(s.nbytes for s in d.scalars) for d in map(m.Draws(0, [b.widths for b in control.blocks], 4,
               torch.device("cpu")).__getitem__, range(11)))  # fmt: skip
    assert m.draw_bytes(control.blocks, 4) == held


@pytest.mark.parametrize(
    ("rows", "columns", "good"), [(3, 5, False), (2, 3, False), (2, 2, True), (4, 3, True), (6, 6, True)]
)
def test_tokens_that_four_does_not_divide_are_refused_with_sizes(rows, columns, good):
    if good:
        return m.check_tokens(rows, columns)
    with pytest.raises(
        ValueError, match=rf"{columns * 16} x {rows * 16} pixels are {columns} x {rows} = {rows * columns} tokens"
    ):
        m.check_tokens(rows, columns)
