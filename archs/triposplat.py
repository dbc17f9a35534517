"""TripoSplat: a set of splat tokens, then image features and the camera, in one sequence."""

from ._layout import Arch, Blocks, video


def grid(_, x):
    """Latent [B, N, C]: N tokens in no particular order."""
    return (1, 1, video(x).shape[1])


ARCHS = (
    Arch(
        "TripoSplat",
        "triposplat",
        ("LatentSeqMMFlowModel",),
        (
            Blocks("noise_refiner", ("x",), positions=(0,), stack=False),
            Blocks("blocks", ("x",), calls=("joint",), positions=(0,), joined=True),
        ),
        grid,
        "suffix",
        indexed=False,
    ),
)
