"""Numbers that are none: scales are looked at whole and refused, weights by sample, with a warning."""

import re

import torch

from .place import Damaged, shown

SCALE = re.compile(r"(^|[._])(w|wc|wt|input_|weight_)?(scale|scales|zeros|scale_2|scale_weight|scale_input|smooth|smooth_orig|smooth_factor|"
                   r"smooth_factor_orig)$")  # fmt: skip
CHUNK = 1 << 22
SPOTS, RUN = 16, 256  # runs of neighbouring elements in a sample: few pages of the file are touched


def is_scale(name: str) -> bool:
    """Whether a key names scales, zero points or smoothing factors of a quantized layer."""
    return SCALE.search(name) is not None


def finite(tensor: torch.Tensor) -> bool:
    """Whether all elements are finite; in chunks, so that little is allocated, and for 8-bit floats too."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    for part in tensor.reshape(-1).split(CHUNK):
        wide = part.float() if part.is_floating_point() and part.dtype.itemsize == 1 else part
        if not wide.isfinite().all():
            return False
    return True


def check_scales(file: str, name: str, tensor: torch.Tensor) -> None:
    """Raises where scales are not finite: each of them spoils a whole group of weights."""
    if not finite(tensor):
        raise Damaged(file, f"the scales {shown(name)} {[*tensor.shape]} are not all finite; download it again")


def sample(tensor: torch.Tensor) -> bool:
    """Whether a sample of the elements, first and last ones among them, is finite."""
    flat = tensor.reshape(-1)
    if flat.numel() <= SPOTS * RUN:
        return finite(flat)
    last = flat.numel() - RUN
    return all(finite(flat[last * i // (SPOTS - 1) :][:RUN]) for i in range(SPOTS))


def warning(names: list[str]) -> str:
    """One sentence about weights that are not finite."""
    told = ", ".join(map(shown, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"Not all weights are finite: {told}. The image may be black; download the file again."
