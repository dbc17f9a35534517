"""OmniGen 2 and Boogu: text, then reference images, then the image; a refiner for the image before the stack."""

from ._layout import Arch, Blocks, patched, square

REFINER = Blocks("noise_refiner", ("hidden_states",), positions=(0,), stack=False)


def grid(model, x):
    """Patches of 2."""
    return patched(x, square(model.patch_size))


def single(path):
    return Blocks(path, ("hidden_states",), calls=("joint",), positions=(0,), joined=True)


ARCHS = (
    Arch(
        "OmniGen 2",
        "omnigen",
        ("OmniGen2Transformer2DModel",),
        (REFINER, single("layers")),
        grid,
        "prefix",
        wrapper=False,
        indexed=False,
    ),
    Arch(
        "Boogu",
        "boogu",
        ("BooguTransformer2DModel",),
        (
            REFINER,
            Blocks(
                "double_stream_layers",
                ("img_hidden_states", "instruct_hidden_states"),
                calls=("joint", "self"),
                positions=(0, 1),
            ),
            single("single_stream_layers"),
        ),
        grid,
        "prefix",
        wrapper=False,
        indexed=False,
    ),
)
