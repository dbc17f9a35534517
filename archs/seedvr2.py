"""SeedVR2: one-step video upscaler with its own windowed attention over packed sequences."""

from ._layout import Arch, patched


def grid(model, x):
    return patched(x, model.vid_in.patch_size)


ARCHS = (
    Arch(
        "SeedVR2",
        "seedvr",
        ("NaDiT",),
        (),
        grid,
        override=False,
        wrapper=False,
        indexed=False,
        limits={
            "attention": "SeedVR2 already attends inside windows, with its own variable-length attention.",
            "blocks": "SeedVR2 runs one step, so nothing can be reused between steps.",
        },
    ),
)
