"""What a user can do where attention was left dense: a sentence for each reason to decline."""

AS_SET = "As the node is set."
NOTHING = "Nothing to do: it stays exact here."
REMEDIES = (  # (start of a reason, what to do)
    ("outside the chosen steps", AS_SET),
    ("outside the chosen blocks", AS_SET),
    ("outside the chosen scope", AS_SET),
    ("dense in the plan", AS_SET),
    ("interval 1 is dense attention", "Raise interval."),
    ("a global block", AS_SET),
    ("behind the diagonal part of the stack", AS_SET),
    ("fewer than", "Lower min_tokens, or sample a larger picture: sparse attention gains on long sequences."),
    ("token layout unknown", "Guides, keyframes or references hide where the image's tokens are; sample without them."),
    ("queries and keys are not the same tokens", NOTHING),
    ("the model asks for exact attention", NOTHING),
    ("rows cannot be told apart by prompt", "Use prompts of one batch size."),
    ("the pattern spans the picture", "Choose a smaller window or density, or sample a larger picture."),
    ("the window spans the picture", "Choose a smaller window, or sample a larger picture."),
    ("every patch is chosen", "Choose fewer patches (a lower top-k), or sample a larger picture."),
    ("every block is kept", "Lower the density, or sample a larger picture."),
    ("it would compute as many pairs as dense attention", "Choose fewer patches, or sample a larger picture."),
    ("attention mask differs between queries", "Masks between prompts need dense attention; remove the regional mask."),
    ("the mask hides or weighs image tokens", "A weighed reference or regional mask needs dense attention; remove it."),
    ("a single frame", "It acts on video: raise the number of frames."),
    ("this model does not tell its RoPE", "Choose another form than dual."),
    ("the graft has no weights for this block", "Choose blocks that the file has weights for."),
)


def remedy(reason: str) -> str:
    """ "" where none is known."""
    sizes = " heads cannot be joined into "
    if sizes in reason:
        return "Use weights that were trained for this model."
    return next((what for start, what in REMEDIES if reason.startswith(start)), "")


def told(declined: object) -> list[dict[str, object]]:
    """A feature's declined calls, most first, JSON-ready."""
    if not isinstance(declined, dict):
        return []
    most_first = sorted(declined.items(), key=lambda item: -item[1])
    return [{"why": why, "count": count, "remedy": remedy(why)} for why, count in most_first]
