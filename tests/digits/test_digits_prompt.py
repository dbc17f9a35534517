import inspect

import pytest
import torch

from tessera.methods.digits import words
from tessera.nodes.digits.digits_prompt import DigitsPrompt


def run(text):
    return DigitsPrompt.PREPARE_CLASS_CLONE(None).execute(text=text).args[0][0]


def test_conditioning_is_four_tokens_and_their_pooled_sum():
    ((tokens, extra),) = run("seven moving left")
    want, pooled = words.encode(torch.tensor([[8, 11, 12, 0]]))
    assert tokens.shape == (1, 4, 64)
    assert torch.equal(tokens, want)
    assert list(extra) == ["pooled_output"]
    assert torch.equal(extra["pooled_output"], pooled)


def test_empty_prompt_is_what_training_dropped_to():
    ((tokens, _),) = run("")
    assert torch.equal(tokens[0], words.embedding_table()[[0, 0, 0, 0]])


@pytest.mark.parametrize(("text", "said"), [("seven moving sideways", "'sideways'"), ("1 2 3 4 5", "at most 4 words")])
def test_bad_words_are_refused_before_the_graph_runs_and_when_linked(text, said):
    assert said in DigitsPrompt.validate_inputs(text=text)
    with pytest.raises(ValueError, match=said):
        run(text)


def test_good_words_and_links_pass_validation():
    assert DigitsPrompt.validate_inputs(text="seven") is True
    assert DigitsPrompt.validate_inputs(text=None) is True  # what the host passes for a link


def test_validation_names_only_the_text():
    """Any further name, or **kwargs, would switch off the host's own checks of that input."""
    assert list(inspect.signature(DigitsPrompt.validate_inputs).parameters) == ["text"]


def test_several_prompts_are_a_list():
    made = DigitsPrompt.PREPARE_CLASS_CLONE(None).execute(text="seven moving left | two |").args[0]
    assert len(made) == 2
    for ((tokens, extra),), alone in zip(made, ("seven moving left", "two"), strict=True):
        ((want, pooled),) = run(alone)
        assert torch.equal(tokens, want) and torch.equal(extra["pooled_output"], pooled["pooled_output"])
    assert "twelf" in DigitsPrompt.validate_inputs(text="seven | twelf")
