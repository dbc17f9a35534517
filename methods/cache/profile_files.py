"""Profiles as files: one small JSON each, in one folder, named by people."""

from pathlib import Path

from ..files.shelf import plain_name
from .profile import Profile

FOLDER = "tessera_profiles"  # in ComfyUI's output folder
SUFFIX = ".json"
MOST = 1 << 20  # bytes; a profile takes some kilobytes


def check_name(name: str) -> str:
    """The name without .json. ValueError for what is no plain file name."""
    return plain_name(name, SUFFIX, "profile name")


def save(folder: Path, name: str, profile: Profile) -> Path:
    """Writes the profile; an earlier one of that name is replaced."""
    path = folder / f"{check_name(name)}.json"
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".json.part")
    part.write_text(profile.to_json(), encoding="utf-8")
    part.replace(path)
    return path


def load(folder: Path, name: str) -> Profile:
    """ValueError where there is no such profile in this very folder, or the file is none."""
    path = folder / f"{check_name(name)}.json"
    if not path.is_file() or path.resolve().parent != folder.resolve():
        raise ValueError(f"There is no profile {name!r} in {folder.name}. Save one with Solve Threshold.")
    if path.stat().st_size > MOST:
        raise ValueError(f"{name} is too large to be a cache profile. Save one with Solve Threshold.")
    try:
        return Profile.from_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no cache profile (not text). Make one with Solve Threshold.") from error
