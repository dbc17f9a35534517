"""Instructions on token lists: where words begin, what is inserted, and which rows are cut."""

import pytest
import torch

from tessera.methods.control import llm_prompt as m

WORDS = {"<|im_start|>": 1, "system": 2, "user": 3, "\n": 4, "<|im_end|>": 5, "assistant": 6, "x": 7, "7": 8, "red": 9, "fox": 10,
         "say": 11, ":": 12, "own": 13}  # fmt: skip
PAD = 0


def ids(text):
    found, rest = [], text
    while rest:
        word = next((w for w in sorted(WORDS, key=len, reverse=True) if rest.startswith(w)), rest[0])
        found, rest = [*found, WORDS[word] if word in WORDS else ord(word)], rest[len(word) :]
    return found


def tokens(text):
    return [(i, 1.0) for i in ids(text)]


USER = "<|im_start|>user\n{}<|im_end|>\n"
BOTH = "<|im_start|>system\nown<|im_end|>\n" + USER


def start(text, template=USER, pads=(0, 0, 0)):
    made = [[(PAD, 1.0)] * n + tokens(template.format(t)) for n, t in zip(pads, (text, "x", "7"), strict=True)]
    return m.start_of_text(made[0], made[1:], PAD if any(pads) else None)


@pytest.mark.parametrize("text", ["redfox", "", "x", "7", "xfox"])
def test_words_begin_after_the_template(text):
    assert start(text) == 3 and start(text, BOTH) == 9
    assert start(text, "{}") == 0
    assert start(text, pads=(4, 9, 9)) == 7, "after what fills up on the left"


def test_a_prompt_without_words_may_have_a_template_of_its_own():
    other = tokens("<|im_start|>system\nownownown<|im_end|>\n" + USER.format(""))
    probes = [tokens(("<|im_start|>system\nsay" + "<|im_end|>\n" + USER).format(p)) for p in ("x", "7")]
    assert m.start_of_text(other, probes, None) == len(other) - 2


def put(template, position, text="redfox"):
    return m.inserted(tokens(template.format(text)), start(text, template), "say:", position, ids)


def plain(made):
    return [int(t[0]) for t in made]


def test_before_the_words():
    made = put(BOTH, "before")
    assert plain(made) == ids(BOTH.format("say:\nredfox"))
    assert [isinstance(t[0], m.Instruction) for t in made] == [False] * 9 + [True] * 3 + [False] * 4


def test_in_the_system_part():
    assert plain(put(BOTH, "system")) == ids(BOTH.replace("own", "own\nsay:").format("redfox"))
    assert plain(put(USER, "system")) == ids("<|im_start|>system\nsay:<|im_end|>\n" + USER.format("redfox"))
    assert put("{}", "system") == put("{}", "before"), "no template"
    made = put(USER, "system")
    assert [t for t in made if not isinstance(t[0], m.Instruction)] == tokens(USER.format("redfox"))


def test_words_that_look_like_a_template_of_others():
    """A tokenizer that does not know a chat's marks reads them as letters, which any prompt may hold."""
    template = "[own]" + "{}"
    assert put(template, "system") == put(template, "before")


def test_white_space_parts_it_from_the_words():
    assert (m.prefix("say"), m.prefix("say "), m.prefix("say\n")) == ("say\n", "say ", "say\n")


def test_padding_makes_room():
    right, left = [*tokens("redfox"), (PAD, 1.0), (PAD, 1.0)], [(PAD, 1.0), (PAD, 1.0), *tokens("redfox")]
    assert m.without_padding(right, 1, PAD, False) == right[:3] and m.without_padding(left, 1, PAD, True) == left[1:]
    assert m.without_padding(right, 9, PAD, False) == tokens("redfox") == m.without_padding(left, 9, PAD, True)
    assert m.without_padding(right, 0, PAD, False) == right


def test_what_core_looks_for_templates_in():
    made = put(BOTH, "before")
    dropped, kept = (m.hidden([made], drop) for drop in (True, False))
    assert dropped[0] == tokens(BOTH.format("redfox")) and dropped.full == [made]
    assert [t[0] for t in kept[0][9:12]] == [m.HIDDEN] * 3 and len(kept[0]) == len(made)
    assert m.has_instruction([made]) and not m.has_instruction(dropped) and not m.has_instruction(kept)


@pytest.mark.parametrize(("pictures", "first"), [([], 9), ([9, 9], 17), ([12], 9)])
def test_rows_of_the_instruction(pictures, first):
    """Pictures of 4 rows before it, or after it."""
    made = put(BOTH, "before")
    for at in pictures:
        made.insert(at, ({"type": "image"}, 1.0))
    rows = len(made) + 3 * len(pictures)
    kept = m.kept_rows(made, rows)
    assert torch.equal(kept, torch.tensor([i for i in range(rows) if not first <= i < first + 3]))


def test_between_pictures_it_cannot_be_cut():
    made = [({"type": "image"}, 1.0), *put(USER, "before"), ({"type": "image"}, 1.0)]
    with pytest.raises(ValueError, match="between pictures .2 in this prompt."):
        m.kept_rows(made, len(made) + 6)
