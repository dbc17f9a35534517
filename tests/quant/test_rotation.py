"""Rotations of input channels: orthogonal, and nothing of the product is lost."""

import pytest
import torch

from tessera.methods.quant.rotation import KINDS, Rotation, block_of, family_of, hadamard, rotation, zigzag

TURNS = [kind for kind in KINDS if kind != "none"]


def some(kind, columns):
    return rotation(kind, columns, torch.rand(columns, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("columns", [16, 48, 192, 768])
@pytest.mark.parametrize("kind", TURNS)
def test_is_orthogonal_and_undone(kind, columns):
    turn = some(kind, columns)
    r = turn.apply(torch.eye(columns))
    assert (r @ r.T - torch.eye(columns)).abs().max() <= 1e-6
    x = torch.randn(3, 5, columns)
    assert torch.allclose(turn.undo(turn.apply(x)), x, atol=1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("kind", TURNS)
def test_keeps_the_product(kind, dtype, bound, error):
    x, w = torch.randn(33, 384).to(dtype), torch.randn(40, 384).to(dtype)
    turn = some(kind, 384)
    got = turn.apply(x).float() @ turn.apply(w).float().T
    assert turn.apply(x).dtype == dtype and error(got, x.float() @ w.float().T) < bound


@pytest.mark.parametrize("kind", TURNS)
@pytest.mark.parametrize("columns", [64, 256, 512])
def test_two_small_products_are_the_dense_matrix(kind, columns):
    turn, x = some(kind, columns), torch.randn(7, columns)
    y = x if turn.permutation is None else x[:, turn.permutation]
    y = y if turn.signs is None else y * turn.signs
    dense = torch.block_diag(*[hadamard(family_of(kind), turn.block)] * (columns // turn.block))
    assert torch.allclose(turn.apply(x), y @ dense, atol=1e-5)


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_regular_matrices_keep_a_constant_row_and_sylvesters_do_not(size):
    regular, sylvester = hadamard("regular", size), hadamard("sylvester", size)
    for matrix in (regular, sylvester):
        assert torch.equal(matrix, matrix.T) and torch.equal(matrix.abs(), torch.full((size, size), size**-0.5))
    ones = torch.ones(size)
    assert torch.allclose((ones @ regular).abs(), ones) and (ones @ sylvester).max() == size**0.5


def test_regular_is_the_one_of_comfy_kitchen():
    utils = pytest.importorskip("comfy_kitchen.tensor.int8_utils")
    for size in (16, 64, 256):
        assert torch.equal(hadamard("regular", size), utils._build_hadamard(size))


@pytest.mark.parametrize(
    ("kind", "columns", "block"),
    [("hadamard_regular", 3072, 256), ("hadamard_regular", 1152, 64), ("hadamard_regular", 48, 16),
     ("hadamard_regular", 40, None), ("hadamard_random", 1152, 128), ("hadamard_random", 96, 32),
     ("zigzag_hadamard", 4608, 256), ("hadamard_sylvester", 24, None)],
)  # fmt: skip
def test_takes_the_largest_block_that_divides(kind, columns, block):
    assert block_of(kind, columns) == block
    if block:
        assert some(kind, columns).block == block
    else:
        with pytest.raises(ValueError, match=f"the layer has {columns}"):
            some(kind, columns)


def test_zigzag_deals_outliers_there_and_back():
    amax = torch.arange(48.0).flip(0)  # channel 0 is the largest
    order = zigzag(amax, 16)
    assert order.reshape(3, 16)[:, :4].tolist() == [[0, 5, 6, 11], [1, 4, 7, 10], [2, 3, 8, 9]]
    assert order.sort().values.tolist() == list(range(48))
    turn = rotation("zigzag_hadamard", 192, torch.ones(192).index_fill(0, torch.tensor([3, 5, 60]), 90.0))
    at = torch.isin(turn.permutation, torch.tensor([3, 5, 60])).reshape(3, 64).sum(1)
    assert at.tolist() == [1, 1, 1]


def test_random_signs_follow_the_seed():
    one, two = rotation("hadamard_random", 256, seed=3), rotation("hadamard_random", 256, seed=3)
    assert torch.equal(one.signs, two.signs) and one.signs.abs().eq(1).all() and 64 < (one.signs > 0).sum() < 192
    assert not torch.equal(one.signs, rotation("hadamard_random", 256, seed=4).signs)


def test_spread_is_the_mean_square_after_the_rotation():
    sizes = torch.rand(256) * torch.ones(256).index_fill(0, torch.tensor([9]), 30)
    x = torch.randn(20000, 256) * sizes
    for kind in KINDS:
        turn = some(kind, 256) if kind != "none" else Rotation("none")
        want = turn.apply(x).square().mean(0)
        assert torch.allclose(turn.spread(sizes.square()), want, rtol=0.1)


def test_an_outlier_is_spread():
    x = torch.randn(50, 256)
    x[:, 7] *= 60
    plain = x.abs().amax(1) / x.square().mean(1).sqrt()
    for kind in TURNS:
        y = some(kind, 256).apply(x)
        assert (y.abs().amax(1) / y.square().mean(1).sqrt()).mean() < 0.35 * plain.mean()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("hadamard", 64), "Unknown rotation 'hadamard'"),
        (("hadamard_regular", 32), "has 4^n rows, not 32"),
        (("hadamard_random", 64), "Signs belong to hadamard_random"),
        (("hadamard_regular", 64, torch.ones(64)), "Signs belong to hadamard_random"),
        (("zigzag_hadamard", 64), "A permutation belongs to zigzag_hadamard"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, words):
    with pytest.raises(ValueError) as error:
        Rotation(*arguments)
    assert words in str(error.value)


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="blocks of 64 does not fit 96 channels"):
        Rotation("hadamard_regular", 64).apply(torch.ones(2, 96))
    with pytest.raises(ValueError, match=r"magnitude of each of 64 channels, got \[16\]"):
        rotation("zigzag_hadamard", 64, torch.ones(16))


def test_none_returns_the_very_tensor():
    x = torch.randn(2, 10)
    assert Rotation("none").apply(x) is x and Rotation("none").undo(x) is x and rotation("none", 10).kind == "none"
