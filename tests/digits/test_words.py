import pytest
import torch

from tessera.methods.digits import words


def test_rows_are_orthogonal_with_mean_square_one():
    table = words.embedding_table().double()
    assert table.shape == (1 + len(words.WORDS), words.WIDTH)
    torch.testing.assert_close(
        table @ table.T, words.WIDTH * torch.eye(len(table), dtype=torch.float64), atol=1e-4, rtol=0
    )


def test_table_keeps_the_values_the_models_were_trained_on():
    table = words.embedding_table()
    assert table[0, 0].item() == pytest.approx(2**0.5 * 0.9996988, abs=1e-5)  # cos(pi / 128)
    assert table[3, 5].item() == pytest.approx(2**0.5 * 0.4713967, abs=1e-5)  # cos(pi * 22 / 64)


@pytest.mark.parametrize(
    ("prompt", "rows"),
    [
        ("", [0, 0, 0, 0]),
        ("  ", [0, 0, 0, 0]),
        ("zero", [1, 0, 0, 0]),
        ("seven moving left", [8, 11, 12, 0]),
        ("7 moving left", [8, 11, 12, 0]),
        ("Nine, moving, DOWN", [10, 11, 15, 0]),
        ("one two three four", [2, 3, 4, 5]),
    ],
)
def test_parse(prompt, rows):
    assert words.parse(prompt) == rows


@pytest.mark.parametrize("prompt", ["cat", "seven moving nowhere", "12", "²"])
def test_unknown_word_is_named_with_the_known_ones(prompt):
    with pytest.raises(ValueError, match=prompt.split()[-1]) as refused:
        words.parse(prompt)
    assert all(word in str(refused.value) for word in words.WORDS)


def test_fifth_word_is_refused():
    with pytest.raises(ValueError, match="at most 4 words, got 5"):
        words.parse("one two three four five")


def test_encode_is_rows_of_the_table_and_half_their_sum():
    rows = torch.tensor([words.parse("three moving up"), words.parse("")])
    tokens, pooled = words.encode(rows)
    table = words.embedding_table()
    assert tokens.shape == (2, 4, 64)
    assert pooled.shape == (2, 64)
    assert torch.equal(tokens[0], table[[4, 11, 14, 0]])
    torch.testing.assert_close(pooled[0], (table[4] + table[11] + table[14] + table[0]) / 2)
    torch.testing.assert_close(pooled[1], 2 * table[0])
