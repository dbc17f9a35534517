"""The inputs that every attention node shares, under the same names, and their meaning."""

import re
from typing import Any

from comfy_api.latest import io


def where_inputs(min_tokens: int = 4096, dense_first_steps: int = 0) -> list[Any]:
    """Blocks, steps, smallest sequence, and what to do where the model cannot be served."""
    return [
        io.String.Input("blocks", default="all", advanced=True,
            tooltip='Transformer blocks that it acts on, counted from 0 over the whole stack: "all", or like "2-18,25". '
                    "Fewer blocks are slower and closer to the plain picture."),
        io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01, round=0.001, advanced=True,
            tooltip="Part of the noise schedule from which it acts, 0 to 1. Higher keeps the composition exact."),
        io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, round=0.001, advanced=True,
            tooltip="Part of the noise schedule up to which it acts, 0 to 1. Lower keeps fine detail exact."),
        io.Int.Input("min_tokens", default=min_tokens, min=0, max=1 << 20, advanced=True,
            tooltip="Image tokens below which attention stays dense, because the sparse form would not be faster. 0 always acts."),
        io.Combo.Input("unsupported", options=["error", "warn"], advanced=True,
            tooltip="On a model that cannot be served: stop with a sentence, or log it and leave the model as it is."),
        *(_dense(name, tooltip, dense_first_steps * (name == "dense_first_steps")) for name, tooltip in DENSE.items()),
        io.Combo.Input("scope", options=["all", "self", "joint"], optional=True, advanced=True,
            tooltip='Attention calls that it serves: "self", where image tokens are alone (Wan, LTX); "joint", where text stands in the '
                    'same sequence (FLUX, SD3); "all" is both. Cross-attention onto the text is never touched.'),
    ]  # fmt: skip


DENSE = {
    "dense_first_steps": "Steps at the start that stay dense, counted in this run. They lay out the picture: a few keep the composition.",
    "dense_last_steps": "Steps at the end that stay dense, counted in this run. More keep fine detail, and are slower.",
    "dense_first_blocks": "Transformer blocks at the start of the stack that stay dense. More are slower and closer to the plain picture.",
    "dense_last_blocks": "Transformer blocks at the end of the stack that stay dense. More are slower and closer to the plain picture.",
}  # fmt: skip


def _dense(name: str, tooltip: str, default: int) -> Any:
    return io.Int.Input(name, default=default, min=0, max=1000, optional=True, advanced=True, tooltip=tooltip)


def where(
    blocks: str,
    start_percent: float,
    end_percent: float,
    min_tokens: int,
    unsupported: str,
    dense_first_steps: int = 0,
    dense_last_steps: int = 0,
    dense_first_blocks: int = 0,
    dense_last_blocks: int = 0,
    scope: str = "all",
) -> dict[str, Any]:
    """The shared inputs as AttentionFeature fields. ValueError on a list of blocks that cannot be read."""
    return {
        "blocks": parse_blocks(blocks),
        "sigma_percent": percents(start_percent, end_percent),
        "min_tokens": min_tokens,
        "unsupported": unsupported,
        "dense_steps": (dense_first_steps, dense_last_steps),
        "dense_blocks": (dense_first_blocks, dense_last_blocks),
        "scope": scope,
    }


def percents(start: float, end: float) -> tuple[float, float]:
    """The pair. ValueError unless 0 <= start <= end <= 1, which NaN is not either."""
    if not 0 <= start <= end <= 1:
        raise ValueError(f"start_percent {start} must not lie after end_percent {end}, both from 0 to 1.")
    return start, end


def parse_blocks(text: str) -> frozenset[int] | None:
    """ "2-18,25" -> block numbers; "all" or "" -> None, meaning every block."""
    if text.strip().lower() in ("", "all"):
        return None
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(
                f"blocks: cannot read {part.strip() or 'a comma with nothing beside it'!r}. Write block numbers from 0 to 9999 and "
                'ranges like "2-18,25", or "all".'
            )
        numbers |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(numbers)
