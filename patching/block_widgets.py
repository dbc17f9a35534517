"""The inputs that block samplers share, under the same names, and their meaning."""

from typing import Any

from comfy_api.latest import io

from .video_state import VideoStateSocket

MORE = 4  # further prompts


def state_inputs() -> list[Any]:
    """Going on with a clip, and keeping what that needs."""
    return [
        VideoStateSocket.Input("state", optional=True,
            tooltip="A clip to go on with, from Load Video State or another block sampler. Its finished frames are put in place; give the sampler "
                    "a latent of the whole new length and the same seed."),
        io.Boolean.Input("keep_state", default=False, optional=True,
            tooltip="On: the state output is filled when the run ends, in main memory, for Save Video State or another block sampler. It costs one "
                    "more evaluation and as much memory as the keys take."),
    ]  # fmt: skip


def prompt_inputs() -> list[Any]:
    """Prompts of later blocks. They come last on a node."""
    return [
        io.String.Input("prompt_blocks", default="1, 2, 3, 4", optional=True, advanced=True,
            tooltip="Blocks from which prompt_2, prompt_3 and so on take over, counted from 0, with commas. Only as many are read as prompts are "
                    "connected."),
        *(io.Conditioning.Input(f"prompt_{n}", optional=True,
            tooltip=f"Prompt {n} of the clip: it stands for the guider's positive one from its block in prompt_blocks on.") for n in range(2, MORE + 2)),
    ]  # fmt: skip


def prompts_of(prompt_blocks: str, given: list[Any]) -> list[tuple[int, Any]]:
    """(block, CONDITIONING) of those that are connected, in order. ValueError where their blocks are not told."""
    given = [prompt for prompt in given if prompt is not None]
    if not given:
        return []
    try:
        blocks = [int(part) for part in prompt_blocks.split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(f"prompt_blocks {prompt_blocks!r} are not numbers with commas, like 1, 3, 5.") from error
    if len(blocks) < len(given):
        raise ValueError(
            f"prompt_blocks names {len(blocks)} blocks for {len(given)} further prompts. Name one for each."
        )
    chosen = blocks[: len(given)]
    if chosen[0] < 1 or chosen != sorted(set(chosen)):
        raise ValueError(f"prompt_blocks {prompt_blocks!r} must rise from 1 on; block 0 has the guider's own prompt.")
    return list(zip(chosen, given, strict=True))
