import torch

from tessera.methods.measure import heat_map as m


def test_letters_differ_and_fill_their_box():
    seen = {letter: m.text(letter) for letter in m.GLYPHS}
    assert all(dots.shape == (m.HEIGHT, m.WIDTH) and not dots[:, -m.DOT :].any() for dots in seen.values())
    packed = {tuple(dots.flatten().tolist()) for dots in seen.values()}
    assert len(packed) == len(m.GLYPHS) and m.text("").shape == (m.HEIGHT, 0)
    assert torch.equal(m.text("aB"), torch.cat([m.text("A"), m.text("B")], 1))
    one = m.text("1")[:: m.DOT, :: m.DOT].int()
    assert one.sum(0).tolist() == [0, 2, 7, 1, 0, 0], "a stem with a flag and a foot"


def test_cells_have_the_colour_of_their_share_and_nothing_is_cut():
    rows = [(str(i), [0.1 * i, None, 1.0], "0.25") for i in range(5)]
    picture = m.heat_map(
        ["a title that is longer than the table below it is wide, by far, and further"], "b", ["0"] * 3, rows, "x"
    )
    assert picture.shape[0] == 1 and picture.shape[3] == 3 and picture.min() >= 0 and picture.max() <= 1
    pixels = {tuple((255 * p).round().int().tolist()) for p in picture.view(-1, 3)}
    assert {m.colour(0.1 * i) for i in range(5)} | {m.PALE, m.colour(1.0), m.PAPER, m.INK} <= pixels
    border = (255 * torch.cat([picture[0, :, -m.DOT :].reshape(-1, 3), picture[0, -m.DOT :].reshape(-1, 3)])).round()
    assert {tuple(p) for p in border.int().tolist()} == {m.PAPER}


def test_colours_follow_the_share():
    assert m.colour(None) == m.PALE and m.colour(-1) == m.COLOURS[0] and m.colour(2) == m.COLOURS[-1]
    assert [m.colour(stop) for stop in m.STOPS] == list(m.COLOURS)
