"""Wan 2.x and its variants: video tokens alone in self-attention, text (and CLIP image) in cross-attention.

Reference, pose or motion tokens lengthen the sequence: such a call fits no layout."""

from collections.abc import Mapping
from typing import Any

import torch

from ._layout import Arch, Blocks, Modules, patched
from ._modulate import sinusoid


def grid(model, x):
    """Patches (1, 2, 2)."""
    return patched(x, model.patch_size)


def repeated(gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A gate [B, T, D] of frames for the tokens of x [B, N, D]; one of all tokens, [B, 1, D], as it is."""
    if gate.shape[1] == 1 or gate.shape[1] == x.shape[1]:
        return gate
    times = -(-x.shape[1] // gate.shape[1])
    return torch.repeat_interleave(gate, times, dim=1)[:, : x.shape[1]]


def gated(block, given, outputs):
    """WanAttentionBlock.forward from its three outputs: x [B, N, D] -> the same."""
    x, e, options = given["x"], given["e"], given["transformer_options"]
    own = block.modulation.to(device=x.device, dtype=x.dtype)
    e = (own + e).chunk(6, dim=1) if e.ndim < 4 else (own.unsqueeze(0) + e).unbind(2)
    x = torch.addcmul(x, outputs["self_attn"], repeated(e[2], x))
    x = x + outputs["cross_attn"]
    for patch in options.get("patches", {}).get("attn2_patch", ()):
        x = patch({"x": x, "transformer_options": options})
    return torch.addcmul(x, outputs["ffn"], repeated(e[5], x))


MODULES = Modules("WanAttentionBlock", ("self_attn", "cross_attn", "ffn"), gated, sizes=3)


PER_TOKEN = {"pe": (1, 6), "vec": (1, 4)}  # rotations, and time steps where frames or tokens have their own


def stack(*calls, per_token: Mapping[str, tuple[int, int]] | None = PER_TOKEN):
    return Blocks("blocks", ("img",), "double_block", ("self", *calls), modules=MODULES, per_token=per_token)


def modulated(model, arguments):
    """The embedding e of the timestep [B, 1 or T, D], before it is projected for the blocks."""
    t = arguments["model_timestep"]
    e = model.time_embedding(sinusoid(model.freq_dim, t.flatten()).to(arguments["img"].dtype))
    return e.reshape(t.shape[0], -1, e.shape[-1])


T2V_SMALL = "Wan 2.1 T2V 1.3B", (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774)
T2V_LARGE = "Wan 2.1 T2V 14B", (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404)
I2V_480 = "Wan 2.1 I2V 480p 14B", (-302.331670, 223.948934, -52.5463970, 5.87348440, -0.201973289)
I2V_720 = "Wan 2.1 I2V 720p 14B", (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683)


def rescaled(model, grid):
    """The nearest of the four models with a polynomial: by width, by whether an image comes in, by the size of a frame.

    The two image models have one shape; 2,340 tokens lie between their frames of 1,560 and 3,600."""
    if model.model_type == "i2v":
        return I2V_720 if grid is not None and grid[1] * grid[2] > 2340 else I2V_480
    return T2V_SMALL if model.dim < 2816 else T2V_LARGE


TEA: dict[str, Any] = {"modulated": modulated, "rescaled": rescaled}
BLOCKWISE: dict[str, Any] = {"shifts_time": lambda model, shape: (1.0, 1.0, 1.0)}
BLOCKWISE["frame_times"] = ("WanModel", "CausalWanModel")  # core's VACE and camera classes take one for all frames
ROPE: dict[str, Any] = {"rope": "rope_embedder", "rope_options": True, "mlps": {"blocks": ("ffn",)}}
IMAGE = "cross"  # models with an image encoder attend to its tokens before those of the text
VACE = Blocks("vace_blocks", ("c",), calls=("self", "cross"), positions=(0,), stack=False)

ARCHS = (
    Arch("Wan", "wan", ("WanModel", "CameraWanModel"), (stack(IMAGE, "cross"),), grid, **ROPE, **TEA, **BLOCKWISE),
    Arch(
        "Wan, autoregressive",
        "wan",
        ("CausalWanModel",),
        (stack(IMAGE, "cross"),),
        grid,
        **ROPE,
        **BLOCKWISE,
        notes="Inside ComfyUI's ar_video sampler neither blocks nor attention can be reached.",
    ),
    Arch(
        "Wan VACE",
        "wan",
        ("VaceWanModel",),
        (stack("cross"), VACE),
        grid,
        **ROPE,
        **TEA,
        **BLOCKWISE,
        notes="A VACE block follows some blocks, once per control video, and returns (what it adds, its own stream).",
    ),
    Arch(
        "Wan S2V",
        "wan",
        ("WanModel_S2V",),
        (stack("cross", per_token=None),),
        grid,
        **ROPE,
        notes="Audio attention runs between blocks; reference and motion follow the video.",
    ),
    Arch(
        "Wan HuMo",
        "wan",
        ("HumoWanModel",),
        (stack("cross", "other", per_token=None),),
        grid,
        **ROPE,
        notes="Third call: audio, by frame.",
    ),
    Arch(
        "Wan, animated",
        "wan",
        ("AnimateWanModel", "SCAILWanModel", "SCAIL2WanModel", "WanDancerModel"),
        (stack(IMAGE, "cross", per_token=None),),
        grid,
        **ROPE,
        notes="Face, audio and music attention run between blocks.",
    ),
)
