"""AuraFlow: registers and text before the image, double then single layers."""

from ._layout import Arch, Blocks, patched, square


def grid(model, x):
    """Patches of 2."""
    return patched(x, square(model.patch_size))


ARCHS = (
    Arch(
        "AuraFlow",
        "aura",
        ("MMDiT",),
        (
            Blocks("double_layers", ("img", "txt"), "double_block", ("joint",), per_token={}),
            Blocks("single_layers", ("img",), "single_block", ("joint",), joined=True, per_token={}),
        ),
        grid,
        "prefix",
        indexed=False,
        mlps={"double_layers": ("mlpX", "mlpC"), "single_layers": ("mlp",)},
    ),
)
