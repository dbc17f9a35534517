"""The vocabulary of the digit models. A prompt is at most four known words; each word is one text token.

Embeddings are rows of an orthogonal cosine basis, so they are exact on every platform and need no file."""

import math

import torch

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = ("left", "right", "up", "down")
WORDS = DIGITS + ("moving",) + DIRECTIONS
TOKENS, WIDTH = 4, 64  # text tokens of a prompt, features of a token


def embedding_table() -> torch.Tensor:
    """[1 + len(WORDS), WIDTH] fp32, rows orthogonal with mean square 1; row 0 is the empty word."""
    rows = torch.arange(1 + len(WORDS), dtype=torch.float64)[:, None] + 1
    columns = torch.arange(WIDTH, dtype=torch.float64)[None, :] + 0.5
    return (math.sqrt(2) * torch.cos(math.pi / WIDTH * columns * rows)).float()


def parse(prompt: str) -> list[int]:
    """Prompt -> table rows, padded with 0 to TOKENS. Digits may be figures ("3"). ValueError names an unknown word."""
    words = prompt.lower().replace(",", " ").split()
    words = [DIGITS[int(w)] if len(w) == 1 and w in "0123456789" else w for w in words]
    unknown = [w for w in words if w not in WORDS]
    if unknown:
        raise ValueError(f"Digits Prompt does not know {unknown[0]!r}. Known words: {', '.join(WORDS)}.")
    if len(words) > TOKENS:
        raise ValueError(f"Digits Prompt takes at most {TOKENS} words, got {len(words)}: {prompt!r}.")
    return [1 + WORDS.index(w) for w in words] + [0] * (TOKENS - len(words))


def encode(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Table rows [B, TOKENS] -> text tokens [B, TOKENS, WIDTH] and their pooled sum [B, WIDTH] / 2."""
    tokens = embedding_table().to(rows.device)[rows]
    return tokens, tokens.sum(dim=1) / 2
