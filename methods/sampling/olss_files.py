"""Tables of Solve OLSS as files: sigmas [K + 1], a [K], b [K, K] in float64, and as text what they were made for."""

from pathlib import Path

from ..files.safetensors_write import SafetensorsWriter
from ..files.shelf import plain_name
from ..weight_files import read_weights
from .olss import Table

FOLDER = "tessera_olss"  # in ComfyUI's output folder
SUFFIX = ".safetensors"
REMEDY = "make it again with Solve OLSS"
MOST = 1000  # steps
NAMES = ("sigmas", "a", "b")


def check_name(name: str) -> str:
    """The name without .safetensors. ValueError for what is no plain file name."""
    return plain_name(name, SUFFIX, "name")


def save(folder: Path, name: str, table: Table) -> Path:
    """Writes the table; an earlier one of that name is replaced."""
    path = folder / f"{check_name(name)}{SUFFIX}"
    with SafetensorsWriter(path, {"tessera_olss": "1", **table.about}, len(NAMES)) as out:
        for key in NAMES:
            out.add(key, getattr(table, key))
    return path


def load(path: Path) -> Table:
    """ValueError, one sentence with the file's name, for what Solve OLSS did not write."""
    tensors, about = read_weights(path, REMEDY)
    if about.pop("tessera_olss", None) != "1" or set(tensors) != set(NAMES):
        raise ValueError(
            f"{path.name} is no table of Solve OLSS (it holds {', '.join(sorted(tensors)[:4])}); {REMEDY}."
        )
    sigmas, a, b = (tensors[key].double() for key in NAMES)
    steps = a.numel()
    if not 1 <= steps <= MOST or sigmas.shape != (steps + 1,) or a.shape != (steps,) or b.shape != (steps, steps):
        raise ValueError(
            f"{path.name}: sigmas {[*sigmas.shape]}, a {[*a.shape]} and b {[*b.shape]} are not of one number of steps; {REMEDY}."
        )
    if (sigmas[1:] >= sigmas[:-1]).any() or sigmas[-1] < 0 or b.triu(1).any():
        raise ValueError(f"{path.name}: its sigmas must fall and b must be 0 above the diagonal; {REMEDY}.")
    return Table(sigmas, a, b, about)


def told(table: Table) -> str:
    """What a table is for, as a line."""
    facts = ", ".join(f"{name} {value}" for name, value in table.about.items())
    return (
        f"OLSS of {table.steps} steps from sigma {float(table.sigmas[0]):.4g} to {float(table.sigmas[-1]):.4g}; {facts}"
    )
