"""What the nodes of quantization share."""

import re
from pathlib import Path

from comfy_api.latest import io

QuantizationSocket = io.Custom("TESSERA_CALIBRATION")  # methods/quant/calibration.py: Statistics
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_. -]{0,99}")


def file_name(name: str, suffix: str = ".safetensors") -> str:
    """The file's name with its suffix. ValueError for what is no plain name."""
    plain = name.strip().removesuffix(suffix)
    if not NAME.fullmatch(plain) or ".." in plain or plain.endswith((".", " ")):
        raise ValueError(
            f"The filename {name!r} must be up to 100 letters, digits, spaces, dots, - or _, beginning with a letter or a digit, "
            "without a folder."
        )
    return plain + suffix


def saved(folder: Path, suffix: str = ".safetensors") -> list[str]:
    """Names of the files in this very folder, sorted."""
    found = folder.glob(f"*{suffix}") if folder.is_dir() else ()
    return sorted(
        p.name for p in found if p.is_file() and NAME.fullmatch(p.name) and p.resolve().parent == folder.resolve()
    )
