"""What Accelerate found, as files: one small JSON each, which others can apply without a trial."""

import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files.shelf import plain_name

FOLDER = "tessera_stacks"  # in ComfyUI's output folder
SUFFIX = ".json"
FORMAT = "tessera-stack/1"
MOST = 1 << 20  # bytes; a profile takes some kilobytes
KINDS = ("cache", "attention", "weights")
LONGEST = 200  # letters of a name


@dataclass(frozen=True)
class StackProfile:
    """stack: settings by kind. model: fingerprint of the weights; sampler: its function; steps, tokens: of the run.
    goal: what was asked for. points: all that was tried, the plain run first. device: where it was measured. packed: whether
    packed weights were tried; declined: why other kinds were not; beside: what else stood on the MODEL."""

    stack: dict[str, dict[str, Any]]
    model: str
    architecture: str
    sampler: str
    steps: int
    size: list[int]
    goal: dict[str, float]
    points: list[dict[str, Any]] = field(default_factory=list)
    device: str = ""
    judged: str = ""
    packed: bool = False
    declined: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return " + ".join(part["name"] for part in self.stack.values()) or "plain"

    def misfit(self, model: str, sampler: str, steps: int) -> str:
        """What a run has that the profile was not made for; empty where it fits."""
        made = (
            (self.model, model, "model"),
            (self.sampler, sampler, "sampler"),
            (self.steps, steps, "number of steps"),
        )
        return ", ".join(f"{name} {mine} and not {its}" for mine, its, name in made if mine != its)

    def apart(self, size: list[int], beside: list[str]) -> list[str]:
        """How a run differs to which the profile applies all the same, but not its numbers."""
        measured = []
        if size != self.size:
            measured.append(f"on a latent {self.size} and not {size}")
        if beside != self.beside:
            measured.append(f"beside {_list(self.beside)} and not {_list(beside)}")
        return [f"measured {' and '.join(measured)}"] if measured else []

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, name: str) -> "StackProfile":
        """ValueError where the text is no profile."""
        try:
            found = json.loads(text)
            if found.pop("format") != FORMAT:
                raise ValueError("another format")
            json.dumps(found, allow_nan=False)  # the canvas could not read it
            made = cls(**found)
            _check(made)
            return made
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"{name} is no profile of Accelerate ({error}). Make one with Accelerate.") from error


def _list(names: list[str]) -> str:
    return ", ".join(names) or "nothing else"


def _check(made: StackProfile) -> None:
    texts = [made.model, made.architecture, made.sampler, made.device, made.judged]
    lists = (made.points, made.size, made.declined, made.beside)
    if type(made.steps) is not int or type(made.packed) is not bool or not all(isinstance(x, list) for x in lists):
        raise ValueError("a field of the wrong type")
    if not all(isinstance(t, str) for t in texts + made.declined + made.beside) or not isinstance(made.goal, dict):
        raise ValueError("a field of the wrong type")
    if not isinstance(made.stack, dict) or not {*made.stack} <= {*KINDS}:
        raise ValueError(f"a stack has {', '.join(KINDS)}")
    for part in [*made.stack.values(), *made.points]:
        if not isinstance(part, dict) or not isinstance(part.get("name"), str) or len(part["name"]) > LONGEST:
            raise ValueError("a setting without a name")
    for point in made.points:
        for key in ("ratio", "loss"):
            value: Any = point.get(key)
            if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"a point without {key}")
    if [point.get("chosen") for point in made.points].count(True) != 1:
        raise ValueError("not one chosen point")


def file_name(*parts: Any) -> str:
    """Of what a profile is for; names of models and samplers may hold what a file name cannot."""
    words = (re.sub(r"[^A-Za-z0-9.-]+", "-", str(part)).strip("-.") for part in parts)
    return "_".join(word for word in words if word)[:100].replace("..", ".").rstrip(".")


def save(folder: Path, name: str, profile: StackProfile) -> Path:
    """Writes the profile; an earlier one of that name is replaced."""
    path = folder / f"{plain_name(name, SUFFIX, 'profile name')}{SUFFIX}"
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f"{SUFFIX}.part")
    part.write_text(profile.to_json(), encoding="utf-8")
    part.replace(path)
    return path


def load(folder: Path, name: str) -> StackProfile:
    """ValueError where there is no such profile in this very folder, or the file is none."""
    path = folder / f"{plain_name(name, SUFFIX, 'profile name')}{SUFFIX}"
    if not path.is_file() or path.resolve().parent != folder.resolve():
        raise ValueError(f"There is no profile {name!r} in {folder.name}. Run Accelerate with profile = measure first.")
    if path.stat().st_size > MOST:
        raise ValueError(f"{name} is too large to be a profile of Accelerate, which takes some kilobytes.")
    try:
        return StackProfile.from_json(path.read_text(encoding="utf-8"), name)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no profile of Accelerate (not text). Make one with Accelerate.") from error
