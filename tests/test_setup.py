"""The set-up's parts, without a network: what is refused, what heals, what is left alone."""

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

BOOTSTRAP = Path(__file__).resolve().parents[1] / "bootstrap"


def load(name):
    spec = importlib.util.spec_from_file_location(f"tessera_bootstrap_{name}", BOOTSTRAP / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load("setup")
SetupError = setup.SetupError


@pytest.fixture
def host(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "HOST", tmp_path / ".host")
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    (tmp_path / ".host").mkdir()
    return tmp_path / ".host"


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def venv(host):
    """A virtual environment that a finished set-up left."""
    made = host / "venv"
    python = setup.python_of(made)
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    (made / ".locked").write_text("key")
    return made


def test_finished_venv_is_current(venv):
    assert setup.venv_is_current(venv, "key") and not setup.venv_is_current(venv, "other key")
    setup.python_of(venv).unlink()
    assert not setup.venv_is_current(venv, "key")


def test_key_follows_the_lock_and_the_users_requirements(host, tmp_path, monkeypatch):
    locked, comfyui = tmp_path / "constraints.txt", tmp_path / "theirs"
    comfyui.mkdir()
    keys = set()
    for pin, asked in (("a==1", "b"), ("a==2", "b"), ("a==2", "c")):
        locked.write_text(pin)
        (comfyui / "requirements.txt").write_text(asked)
        keys.add(setup.lock_key(comfyui, locked))
    assert len(keys) == 2, "without COMFYUI_PATH only the lock counts"
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    assert setup.lock_key(comfyui, locked) not in keys


def broken_python(venv):
    setup.python_of(venv).write_text("#!/bin/sh\nexit 1\n")


@pytest.mark.parametrize(
    ("damage", "made_anew"),
    [
        (lambda venv: (venv / ".locked").write_text("older key"), False),
        (lambda venv: (venv / ".locked").unlink(), False),
        (lambda venv: (venv / ".locked").write_text(setup.UNFINISHED), True),
        (lambda venv: ((venv / ".locked").unlink(), broken_python(venv)), True),
        (lambda venv: setup.python_of(venv).unlink(), True),
    ],
    ids=["older lock", "no mark, works", "unfinished", "no mark, broken", "no python"],
)
def test_venv_is_kept_or_made_anew(venv, monkeypatch, damage, made_anew):
    damage(venv)
    (venv / "old").touch()
    installed = []
    monkeypatch.setattr(setup, "install", lambda *words: installed.append((venv / ".locked").read_text()))
    monkeypatch.setattr(setup, "run", lambda command: run_or_make(venv, command))
    setup.make_venv(venv, "key", "python", ("python", None), None)
    assert setup.venv_is_current(venv, "key") and (venv / "old").exists() != made_anew
    assert installed == [setup.UNFINISHED], "while packages are installed the environment is marked unfinished"


def run_or_make(venv, command):
    if "venv" in command:
        setup.python_of(venv).parent.mkdir(parents=True)
        setup.python_of(venv).write_text("#!/bin/sh\nexit 0\n")
        setup.python_of(venv).chmod(0o755)
        return ""
    return sys.modules["steps"].run(command)


def test_failed_install_leaves_no_finished_venv(venv, monkeypatch):
    (venv / ".locked").write_text("older key")

    def fail(*words):
        raise SetupError("no network")

    monkeypatch.setattr(setup, "install", fail)
    with pytest.raises(SetupError, match="Set-up stopped at 'locked packages.*no network"):
        setup.make_venv(venv, "key", "python", ("python", None), None)
    assert not setup.venv_is_current(venv, "older key") and not setup.venv_is_current(venv, "key")


@pytest.fixture
def comfyui(tmp_path):
    theirs = tmp_path / "theirs"
    (theirs / "comfy").mkdir(parents=True)
    for name in ("main.py", "comfy/__init__.py"):
        (theirs / name).write_text("import comfy\n")
    (theirs / "requirements.txt").write_text("einops==0.8.1\n")
    return theirs


def test_nothing_is_fetched_for_or_written_into_the_users_comfyui(host, comfyui, venv, monkeypatch, capsys):
    before = tree(comfyui)
    commands = []
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    monkeypatch.setattr(setup, "make_tools", lambda python: ("python", None))
    monkeypatch.setattr(
        setup, "run", lambda command, **env: commands.append([str(w) for w in command]) or " + einops==0.8.1"
    )
    setup.set_up()
    assert tree(comfyui) == before and not (host / "ComfyUI").exists()
    assert [str(comfyui / "requirements.txt") in command for command in commands] == [False, True, False]
    assert "einops==0.8.1" in capsys.readouterr().out
    assert "torch==" in (venv / "kept.txt").read_text() and "einops" not in (venv / "kept.txt").read_text()
    assert (host / "base" / "custom_nodes" / "tessera").resolve() == BOOTSTRAP.parent
    commands.clear()
    setup.set_up()
    assert commands == [], "a second set-up has nothing to do"


def test_path_that_is_no_comfyui_is_a_sentence(tmp_path):
    env = {**os.environ, "COMFYUI_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, BOOTSTRAP / "setup.py"], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"COMFYUI_PATH is {tmp_path}, which is no ComfyUI" in done.stderr and not list(tmp_path.iterdir())


def test_second_set_up_waits_for_the_first(host, capsys):
    entered = threading.Event()

    def second():
        with setup.only_one():
            entered.set()

    with setup.only_one():
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(10)
    thread.join()
    assert "waiting for it" in capsys.readouterr().out


def test_interpreter_from_path_or_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup.interpreter((3, 11)) == sys.executable
    with pytest.raises(SetupError, match=r"Python 3\.9 is running, but 3\.11, 3\.12 or 3\.13 is needed"):
        setup.interpreter((3, 9))
    for name, body in (("python3.12", "exit 1"), ("python3.13", "echo works")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    assert setup.interpreter((3, 9)) == str(tmp_path / "python3.13")


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        (
            "NewConnectionError: Temporary failure in name resolution\nNo matching distribution found",
            "check the network",
        ),
        ("error: Failed to fetch\n caused by: error sending request for url", "check the network"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "not the file that the project"),
        ("The virtual environment was not created successfully because ensurepip is not available.", "python3-venv"),
        ("ERROR: No matching distribution found for torch==2.11.0", "lacks a locked version"),
    ],
)
def test_failed_command_says_what_to_do(output, advice):
    code = f"import sys; print('first'); print({output!r}); sys.exit(2)"
    with pytest.raises(SetupError, match=advice) as failed:
        setup.run([sys.executable, "-c", code], lines=output.count("\n") + 1)
    assert output.splitlines()[-1] in str(failed.value) and "first" not in str(failed.value)


def test_pip_serves_when_uv_fails(tmp_path, capsys):
    for name, body in (("uv", "echo gone; exit 1"), ("python", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    printed = setup.install((tmp_path / "python", tmp_path / "uv"), tmp_path / "venv", ["-r", "lock.txt"])
    assert printed.split()[:2] == ["-m", "pip"] and printed.split()[-2:] == ["-r", "lock.txt"]
    assert "uv failed, trying pip" in capsys.readouterr().out


def test_link_follows_the_checkout(tmp_path, monkeypatch, capsys):
    base_directory = sys.modules["base_directory"]
    old, new = tmp_path / "old", tmp_path / "new"
    for pack in (old, new):
        (pack / ".host").mkdir(parents=True)
        (pack / "__init__.py").write_text(pack.name)
    place = tmp_path / "base" / "custom_nodes" / "tessera"
    for pack in (old, new):
        base_directory.make_base(tmp_path / "base", {"tessera": pack})
        assert place.is_symlink() and (place / "__init__.py").read_text() == pack.name
    place.unlink()
    monkeypatch.setattr(os, "symlink", lambda *a, **k: (_ for _ in ()).throw(OSError("privilege not held")))
    for _ in range(2):
        base_directory.make_base(tmp_path / "base", {"tessera": new})
        assert tree(place) == {"__init__.py": b"new"} and not place.is_symlink()
    assert "is a copy of" in capsys.readouterr().out
