"""Wan 2.x and its variants: video tokens alone in self-attention, text (and CLIP image) in cross-attention.

Reference, pose or motion tokens lengthen the sequence: such a call fits no layout."""

from typing import Any

from ._layout import Arch, Blocks, patched


def grid(model, x):
    """Patches (1, 2, 2)."""
    return patched(x, model.patch_size)


def stack(*calls):
    return Blocks("blocks", ("img",), "double_block", ("self", *calls))


ROPE: dict[str, Any] = {"rope": "rope_embedder", "rope_options": True}
IMAGE = "cross"  # models with an image encoder attend to its tokens before those of the text
VACE = Blocks("vace_blocks", ("c",), calls=("self", "cross"), positions=(0,), stack=False)

ARCHS = (
    Arch("Wan", "wan", ("WanModel", "CameraWanModel"), (stack(IMAGE, "cross"),), grid, **ROPE),
    Arch(
        "Wan, autoregressive",
        "wan",
        ("CausalWanModel",),
        (stack(IMAGE, "cross"),),
        grid,
        **ROPE,
        notes="Inside ComfyUI's ar_video sampler neither blocks nor attention can be reached.",
    ),
    Arch(
        "Wan VACE",
        "wan",
        ("VaceWanModel",),
        (stack("cross"), VACE),
        grid,
        **ROPE,
        notes="A VACE block follows some blocks, once per control video, and returns (what it adds, its own stream).",
    ),
    Arch(
        "Wan S2V",
        "wan",
        ("WanModel_S2V",),
        (stack("cross"),),
        grid,
        **ROPE,
        notes="Audio attention runs between blocks; reference and motion follow the video.",
    ),
    Arch(
        "Wan HuMo",
        "wan",
        ("HumoWanModel",),
        (stack("cross", "other"),),
        grid,
        **ROPE,
        notes="Third call: audio, by frame.",
    ),
    Arch(
        "Wan, animated",
        "wan",
        ("AnimateWanModel", "SCAILWanModel", "SCAIL2WanModel", "WanDancerModel"),
        (stack(IMAGE, "cross"),),
        grid,
        **ROPE,
        notes="Face, audio and music attention run between blocks.",
    ),
)
