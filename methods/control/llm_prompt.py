"""An instruction in front of a prompt for an LLM that encodes it (after LI-DiT, arXiv 2406.11831): the LLM reads both, and
the diffusion model may be given the hidden states of the prompt alone. All on tokens, which hold no text any more:
(id, weight) or (id, weight, word) each, the id a number or, for pictures and embeddings, an object."""

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch

Token = tuple[Any, ...]
INSTRUCTION = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text and spatial relationships of the "
    "objects and the background:"
)
POSITIONS = ("before", "system")
CHATS = (  # how chat templates open and close the system's part
    ("<|im_start|>system\n", "<|im_end|>\n"),
    ("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    ("<start_of_turn>system\n", "<end_of_turn>\n"),
)
RAW = tuple(opening.removesuffix("system\n").removesuffix("system<|end_header_id|>\n\n") for opening, _ in CHATS)
MERGED = 2  # tokens of a template that may change with the words after it
HIDDEN = -1  # the id that stands for a kept instruction token where templates are looked for


class Instruction(int):
    """A token id that knows it belongs to the instruction, wherever the list that holds it goes."""


class Hidden(list):
    """Token lists as they are without the instruction; `full` are the ones with it."""

    full: list[list[Token]]


def marked(ids: Sequence[int], like: Token) -> list[Token]:
    """Tokens of weight 1 and no word."""
    return [(Instruction(i), 1.0, *(0 for _ in like[2:])) for i in ids]


def start_of_text(tokens: list[Token], probes: list[list[Token]], pad: int | None) -> int:
    """Where the user's words begin: after what the tokens share with those of other words in the same template. probes: of
    two words of one token each. pad: the id that fills up on the left, if that is where this tokenizer does."""
    skipped = leading(tokens, pad)
    own, one, other = (_ids(held[leading(held, pad) :]) for held in (tokens, *probes))
    start, template = min(_shared(own, one), _shared(own, other)), _shared(one, other)
    end = one[template + 1 :]
    if (
        template - start > MERGED and end and own[-len(end) :] == end
    ):  # a prompt without words, which has its own template
        start = len(own) - len(end)
    return skipped + start


def leading(tokens: list[Token], pad: int | None) -> int:
    """How many tokens from the first are padding."""
    return next((i for i, t in enumerate(tokens) if not _is(t, pad)), len(tokens)) if pad is not None else 0


def _is(token: Token, number: int | None) -> bool:
    return isinstance(token[0], numbers.Integral) and token[0] == number


def _ids(tokens: list[Token]) -> list[int | None]:
    return [int(t[0]) if isinstance(t[0], numbers.Integral) else None for t in tokens]


def _shared(a: list[int | None], b: list[int | None]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def inserted(
    tokens: list[Token], start: int, instruction: str, position: str, ids: Callable[[str], list[int]]
) -> list[Token]:
    """tokens with the instruction: before the words that begin at `start`, or in the system's part of their chat template,
    which is added where there is none. Without a template both are the same. ids: the LLM's own tokenizer."""
    if position == "system":
        for mark, (opening, closing) in zip(RAW, CHATS, strict=True):
            if len(ids(mark)) != 1:
                continue  # this LLM does not know it
            begin = ids(opening)
            at = _find(tokens, begin)
            if at is not None:
                end = next(i for i in range(at, len(tokens) + 1) if i == len(tokens) or _is(tokens[i], ids(closing)[0]))
                return _put(tokens, end, ids("\n" + instruction))
            first = next((i for i, t in enumerate(tokens) if _is(t, begin[0])), None)
            if first is not None and first < start:
                return _put(tokens, first, [*begin, *ids(instruction), *ids(closing)])
    return _put(tokens, start, ids(prefix(instruction)))


def prefix(instruction: str) -> str:
    """As it stands before a prompt: apart from it by white space."""
    return instruction if instruction[-1:].isspace() else instruction + "\n"


def _find(tokens: list[Token], ids: list[int]) -> int | None:
    """The place after the first occurrence."""
    held = _ids(tokens)
    return next((i + len(ids) for i in range(len(held) - len(ids) + 1) if held[i : i + len(ids)] == ids), None)


def _put(tokens: list[Token], at: int, ids: list[int]) -> list[Token]:
    return [*tokens[:at], *marked(ids, tokens[0] if tokens else (0, 1.0)), *tokens[at:]]


def without_padding(tokens: list[Token], count: int, pad: int, left: bool) -> list[Token]:
    """tokens with up to so many pads fewer, at the side where they are."""
    if left:
        return tokens[min(count, leading(tokens, pad)) :]
    cut = min(count, leading(tokens[::-1], pad))
    return tokens[: len(tokens) - cut]


def hidden(lists: list[list[Token]], drop: bool) -> Hidden:
    """What core may look for its templates in: instruction tokens away, or under an id that is in no template."""
    made = Hidden(
        [
            [
                (HIDDEN, *t[1:]) if isinstance(t[0], Instruction) else t
                for t in held
                if not (drop and isinstance(t[0], Instruction))
            ]
            for held in lists
        ]
    )
    made.full = lists
    return made


def has_instruction(lists: list[list[Token]]) -> bool:
    return any(isinstance(t[0], Instruction) for held in lists for t in held)


def kept_rows(tokens: list[Token], rows: int) -> torch.Tensor:
    """Indices of the rows that are not of the instruction. A picture's token became several rows; the instruction stands
    before all pictures or after all of them."""
    places = [i for i, t in enumerate(tokens) if isinstance(t[0], Instruction)]
    pictures = [i for i, t in enumerate(tokens) if not isinstance(t[0], numbers.Integral)]
    more = rows - len(tokens)
    if more and any(i < places[0] for i in pictures) and any(i > places[0] for i in pictures):
        raise ValueError(
            f"The instruction stands between pictures ({len(pictures)} in this prompt), where it cannot be cut out. Set "
            "drop_instruction_tokens off."
        )
    shift = more if any(i < places[0] for i in pictures) else 0
    keep = torch.ones(rows, dtype=torch.bool)
    keep[[i + shift for i in places]] = False
    return keep.nonzero()[:, 0]
