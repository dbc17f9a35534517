"""The one way in: a model file by its ending, opened with all checks."""

from collections.abc import Iterable
from pathlib import Path

from .gguf_file import GgufFile
from .place import CONVERTER, Damaged
from .safetensors_file import SafetensorsFile

SAFETENSORS, GGUF, PICKLED = (".safetensors", ".sft"), (".gguf",), (".pt", ".pth", ".ckpt", ".bin", ".pkl")


def open_model(path: str | Path, roots: Iterable[str | Path] = ()) -> SafetensorsFile | GgufFile:
    """The file's tensors by name. ValueError, one sentence with the file's name, for other kinds of files, damaged ones,
    and those outside of the roots where some are given."""
    path = Path(path)
    ending = path.suffix.lower()
    if ending in SAFETENSORS:
        return SafetensorsFile(path, roots)
    if ending in GGUF:
        return GgufFile(path, roots)
    if ending in PICKLED:
        raise Damaged(path.name, f"checkpoints of torch.save may hold code; {CONVERTER}")
    raise Damaged(path.name, f"models are read from {', '.join(SAFETENSORS + GGUF)} files")
