"""Cosmos 1, Cosmos Predict 2 and Anima: video tokens alone in self-attention, the stream keeps its (t, h, w) axes."""

from ._layout import Arch, Blocks, patched


def grid(model, x):
    """Patches of 2 in space."""
    return patched(x, (model.patch_temporal, model.patch_spatial, model.patch_spatial))


ARCHS = (
    Arch(
        "Cosmos Predict 2",
        "cosmos",
        ("MiniTrainDIT",),
        (Blocks("blocks", ("x_B_T_H_W_D",), calls=("self", "cross"), positions=(0,), axes="BTHWD"),),
        grid,
        indexed=False,
        mlps={"blocks": ("mlp",)},
    ),
    Arch(
        "Anima",
        "anima",
        ("Anima",),
        (Blocks("blocks", ("x_B_T_H_W_D",), calls=("self", "cross"), positions=(0,), axes="BTHWD"),),
        grid,
        indexed=False,
        mlps={"blocks": ("mlp",)},
    ),
    Arch(
        "Cosmos 1",
        "cosmos",
        ("GeneralDIT",),
        (Blocks("blocks", ("x",), calls=("self", "cross"), positions=(0,), axes="THWBD"),),
        grid,
        indexed=False,
    ),
)
