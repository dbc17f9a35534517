"""What the network is given for one block: the frames of it, and the frames' part of every condition, by ComfyUI's own
rules for context windows."""

from typing import Any

import comfy.patcher_extension
import torch
from comfy.context_windows import IndexListCallbacks, IndexListContextHandler, IndexListContextWindow

from .block_memory import CURRENT, Block

FRAMES = 2  # dimension of [B, C, T, H, W]
WHOLE = (
    "c_crossattn",
    "crossattn_controlnet",
    "y",
    "guidance",
    "clip_fea",
    "reference_latent",
    "time_dim_concat",
)  # never cut, however many numbers they have


class BlockWindow(IndexListContextHandler):
    """Stands in core's slot for context windows while blocks are sampled: one window, the block, with its clean prefix."""

    def __init__(self, shape: tuple[int, ...]):
        """shape [B, C, T, H, W] of the whole clip."""
        super().__init__(None, None, context_length=shape[FRAMES], dim=FRAMES)
        self.whole = torch.empty(shape, device="meta")
        comfy.patcher_extension.add_callback(IndexListCallbacks.RESIZE_COND_ITEM, _uncut, self.callbacks)
        self.block: Block | None = None
        self.clean: torch.Tensor | None = None  # [B, C, P, H, W]
        self.prompts: tuple[list[dict], list[dict]] | None = None  # the guider's positive, and what stands for it
        self._cut: dict[int, tuple[list[dict], list[dict]]] = {}

    def show(self, block: Block, clean: torch.Tensor | None, prompts: tuple[list[dict], list[dict]] | None) -> None:
        """The block that the next evaluations are of. clean: its prefix."""
        self.block, self.clean, self.prompts = block, clean, prompts
        self._cut.clear()

    def should_use_context(self, model, conds, x_in, timestep, model_options) -> bool:
        return self.block is not None

    def execute(self, calc_cond_batch, model, conds, x_in, timestep, model_options):
        """x_in [B, C, frames of the block, H, W] -> one prediction of that shape for each list of conditions."""
        self._model = model
        block = self.block
        assert block is not None
        frames = [*block.prefix, *range(block.first, block.last)]
        window = IndexListContextWindow(frames, dim=FRAMES, total_frames=block.frames)
        model_options["transformer_options"]["context_window"] = window
        chosen = [self._chosen(given) for given in conds]
        for role, given in enumerate(chosen):
            for number, cond in enumerate(given or ()):
                block.slots[role, cond.get("uuid")] = (role, number)
        x = x_in if self.clean is None else torch.cat([self.clean.to(x_in), x_in], FRAMES)
        cut = [None if given is None else self._cut_once(given, window, x.device) for given in chosen]
        out = calc_cond_batch(model, cut, x, timestep, model_options)
        return [part[:, :, len(block.prefix) :] for part in out]

    def _chosen(self, given: list[dict] | None) -> list[dict] | None:
        return self.prompts[1] if self.prompts is not None and given is self.prompts[0] else given

    def _cut_once(self, given: list[dict], window: IndexListContextWindow, device) -> list[dict]:
        """Conditions are the same lists all through a block."""
        if id(given) not in self._cut:
            cut = self.get_resized_cond(given, self.whole, window)
            placed = [self._placed(part, whole, window, device) for part, whole in zip(cut, given, strict=True)]
            self._cut[id(given)] = given, [part for part in placed if part is not None]
        return self._cut[id(given)][1]

    def _placed(self, cut: dict, whole: dict, window: IndexListContextWindow, device) -> dict | None:
        """Cuts what core's rules leave or cut along another side: a mask of the frames, Kandinsky 5's start frames, an area
        in time. None where the area has no frame of the block."""
        frames, total = window.index_list, window.total_frames
        mask, start = whole.get("mask"), whole.get("model_conds", {}).get("time_dim_replace")
        if mask is not None:  # [B, T or 1, H, W]
            cut["mask"] = window.get_tensor(mask, dim=1) if mask.ndim == 4 and mask.shape[1] == total else mask
        if start is not None:
            own = [frame for frame in frames if frame < start.cond.shape[FRAMES]]
            if own:
                cut["model_conds"]["time_dim_replace"] = start._copy_with(start.cond[:, :, own])
            else:
                del cut["model_conds"]["time_dim_replace"]
        area = whole.get("area", ())
        if len(area) != 6 or len(frames) == total:  # (t, y, x) of its size, then of its corner
            return cut
        inside = [area[3] <= frame < area[3] + area[0] for frame in frames]
        if not any(inside):
            return None
        cut["area"] = (len(frames), *area[1:3], 0, *area[4:])
        if not all(inside):  # the network is given whole blocks
            shown = torch.tensor(inside, device=device).float()[None, :, None, None]
            cut["mask"] = shown.expand(1, -1, *self.whole.shape[3:]) * cut.get("mask", 1.0)
        return cut


def _uncut(name: str, value: Any, window, x_in, device, given):
    return value if name in WHOLE else None


def current(options: dict[str, Any]) -> Block | None:
    """The block that a call of the network is of, outside of block samplers None."""
    return options.get(CURRENT)
