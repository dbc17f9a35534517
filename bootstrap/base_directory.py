"""The folder that a ComfyUI works in (--base-directory): its models, inputs and outputs, and links to node packs."""

import os
import shutil
from pathlib import Path

FOLDERS = ("models", "custom_nodes", "input", "output", "user", "temp")


def make_base(base, packs):
    """Creates the folders of `base` and links each pack of {name: folder} in base/custom_nodes."""
    for folder in FOLDERS:
        (base / folder).mkdir(parents=True, exist_ok=True)
    for name, pack in packs.items():
        link(base / "custom_nodes" / name, Path(pack).resolve())


def is_linked(place, pack):
    """Whether `place` leads to the folder `pack`."""
    return place.is_symlink() and place.resolve() == pack


def link(place, pack):
    """Makes `place` a link to `pack`, replacing a link that leads elsewhere; a copy where links are not allowed."""
    if is_linked(place, pack):
        return
    if place.is_symlink():
        place.unlink()
    elif place.exists():
        shutil.rmtree(place)
    try:
        os.symlink(pack, place, target_is_directory=True)
    except FileExistsError:  # another server of the same base was quicker
        return
    except (OSError, NotImplementedError):
        print(f"No links on this system: {place} is a copy of {pack}, renewed at every start.")
        shutil.copytree(pack, place, ignore=shutil.ignore_patterns(".host", ".git", "__pycache__"))
