"""What the nodes of quantization share."""

from comfy_api.latest import io

from ..methods.files.shelf import plain_name

QuantizationSocket = io.Custom("TESSERA_CALIBRATION")  # methods/quant/calibration.py: Statistics
SUFFIX = ".safetensors"


def file_name(name: str) -> str:
    """The file's name with its suffix. ValueError for what is no plain name."""
    return plain_name(name.strip(), SUFFIX, "filename") + SUFFIX
