"""What every architecture file answers: where the image tokens sit in attention, and which blocks form the stack."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Grid = tuple[int, int, int]  # (T, H, W) in tokens
Kind = Literal["self", "joint", "cross", "other"]  # image only; image and text in one sequence; image onto text; rest
Place = Literal["prefix", "suffix", "none"]  # where text and other tokens sit beside the image tokens
Latent = torch.Tensor | Sequence[torch.Tensor]  # what diffusion_model.forward receives; a list for video and audio
Rescaling = tuple[str, tuple[float, ...]]  # whose it is, coefficients with the highest power first


@dataclass(frozen=True)
class Layout:
    """Tokens of one attention call. image covers exactly prod(grid) tokens; the others are text, registers,
    reference images or padding. Row-major (t, h, w)."""

    grid: Grid
    image: slice  # the image tokens in the sequence
    total: int  # tokens in the sequence

    @property
    def others(self) -> int:
        return self.total - (self.image.stop - self.image.start)


@dataclass(frozen=True)
class Modules:
    """What a block adds to its streams, module by module, before its gates; and the block without them."""

    owner: str  # class of the block; any other may run them differently
    paths: tuple[str, ...]  # modules below the block, in running order, each called once: attention and MLP outputs
    gated: Callable[
        [Any, Mapping[str, Any], Mapping[str, Any]], Any
    ]  # (block, arguments of its forward by name, output
    #   of each path) -> what forward returns, with modulation and gates of these arguments. May write into either
    sizes: int  # these outputs together, in token sequences of the block


@dataclass(frozen=True)
class Blocks:
    """One list of transformer blocks, in the order in which they run. The model may add control residuals in place to
    what a block returns, so a kept output must be a clone whatever `mutates` says."""

    path: str  # attribute of the diffusion model, e.g. "double_blocks": a ModuleList or ModuleDict
    streams: tuple[str, ...]  # residual tensors a block takes and returns, by argument name, e.g. ("img", "txt");
    #                           the image's first. A stream may itself be a tuple (video, audio)
    replace: str | None = None  # key in patches_replace["dit"], e.g. "double_block"; None: the forward is wrapped
    calls: tuple[Kind, ...] = ("self",)  # attention calls of one block, in order; a block may make only the first ones
    positions: tuple[int, ...] = ()  # forward-wrapped blocks: positional index of each stream when not a keyword
    mutates: bool = False  # the block writes into its input tensors: clone before keeping one
    joined: bool = False  # text and image are one sequence in the first stream, ordered as Arch.place says
    axes: str = "BND"  # of the first stream: Batch, Tokens N (or T, H, W apart), Dim
    attention: str = ""  # its self-attention module, where ComfyUI's override does not come: its forward is wrapped
    modules: Modules | None = None  # None: what its modules add cannot be kept
    stack: bool = True  # False: refiners and other lists outside the residual stack
    per_token: Mapping[str, tuple[int, int]] | None = (
        None  # arguments beside the streams that may hold something for each
    )
    #   token: (axis, dimensions of the tensor where it does). The axis has the tokens of the attention call, those of
    #   the image stream, or an entry for several in a row. None: not known


PE = {"pe": (2, 6)}  # rotations [B, 1, N, D / 2, 2, 2] of all tokens of the attention call


def unpadded(_: Any) -> int:
    return 1


@dataclass(frozen=True)
class Arch:
    """One DiT family. Every function takes the diffusion model and reads sizes from it; nothing is guessed. Attention
    calls outside the listed blocks (text refiners, audio) are of kind "other"."""

    name: str  # words for messages, e.g. "Flux"
    home: str  # package below comfy.ldm that defines the classes, e.g. "flux"; else "diffusers", or "networks" for ours
    classes: tuple[str, ...]  # class names of the diffusion model
    blocks: tuple[Blocks, ...]
    grid: Callable[[Any, Latent], Grid]  # (diffusion model, its x) -> token grid
    place: Place = "none"
    override: bool = True  # optimized_attention_override reaches its attention
    wrapper: bool = True  # has the DIFFUSION_MODEL wrapper
    indexed: bool = True  # publishes block_index and block_type to the override
    pad: Callable[[Any], int] = unpadded  # text and image are each padded at their end to a multiple of this
    opaque: tuple[str, ...] = ()  # arguments of forward that, when given, make the token layout unknown
    unordered: bool = False  # image tokens without places: nothing is near anything else
    rope: str = ""  # attribute with the EmbedND that turns positions (t, h, w, ...) or (h, w) into rotations; "": none
    rope_options: bool = False  # positions heed core's ScaleROPE node
    shifts_time: Callable[[Any, Sequence[int]], tuple[float, float, float]] | None = (
        None  # where a video's frames lie is
    )
    #   moved by rope_options' shift_t: (diffusion model, shape of its x) -> scales t, y, x that it has without rope_options
    frame_times: tuple[str, ...] = ()  # classes that take time steps [B, T], one a frame
    post_input: bool = False  # hands its positions (index, h, w, ...) to post_input patches as img_ids [B, N, A], the
    #   image's first
    text_after: bool = False  # text has positions on all axes, from half the picture's longer side on
    rotates: bool = False  # hands its RoPE table to attn1_patch as pe [B, 1, N, D / 2, 2, 2], before attention
    modulated: Callable[[Any, dict[str, Any]], torch.Tensor | None] | None = None  # (diffusion model, arguments of the
    #   first block and "model_timestep") -> what TeaCache measures: that block's image input under its modulation
    #   [B, N, D], or its timestep part
    rescaled: Callable[[Any, Grid | None], Rescaling | None] | None = None  # TeaCache's published polynomial for this
    #   diffusion model at this token grid; None where there is none
    mlps: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # path of a list of blocks -> for each stream the
    #   module [B, ..., D] -> [B, ..., D] inside a block that acts on every token alone, "" where there is none apart
    notes: str = ""
    limits: dict[str, str] = field(default_factory=dict)  # "attention" or "blocks": why it cannot be served, for users

    @property
    def reached(self) -> bool:
        """Whether attention modules are wrapped because the override does not reach them."""
        return any(spec.attention for spec in self.blocks)


def video(x: Latent) -> torch.Tensor:
    """The image or video part of a model's input."""
    return x if isinstance(x, torch.Tensor) else x[0]


def patched(x: Latent, patch: Sequence[int]) -> Grid:
    """Latent [B, C, (T,) H, W] cut into patches (t, h, w), ragged edges padded -> token grid."""
    x = video(x)
    t = x.shape[2] if x.ndim == 5 else 1
    h, w = x.shape[-2:]
    return (-(-t // patch[0]), -(-h // patch[1]), -(-w // patch[2]))


def square(patch: int) -> tuple[int, int, int]:
    """Patches of one frame, patch x patch."""
    return (1, patch, patch)
