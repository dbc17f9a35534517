"""Sets everything up in .host/, from nothing but Python and a network: a locked environment, a real ComfyUI and the
folder it works in. `python3 bootstrap/setup.py`; `--browser` also sees to Chromium for the canvas tests.

Standard library only, and instant when there is nothing to do. A set-up that was cut short heals on the next run: parts
are made beside their place and renamed, marks are written last."""

import argparse
import contextlib
import hashlib
import os
import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))

import fetch_comfyui
from base_directory import is_linked, make_base
from pack import ROOT, comfyui_path
from steps import SetupError, remedy, run, step

HOST = ROOT / ".host"
LOCKED = Path(__file__).with_name("constraints.txt")
SUPPORTED = ((3, 12), (3, 11), (3, 13))
TOOLS = ("setuptools==80.9.0", "wheel==0.45.1")
UV = "uv==0.13.8"
KEPT = ("torch", "torchvision", "torchaudio", "triton", "numpy")
UNFINISHED = "unfinished"


def interpreter(running=sys.version_info[:2]):
    """A Python that the locked packages have wheels for: the running one, else one on PATH."""
    if running in SUPPORTED:
        return sys.executable
    for major, minor in SUPPORTED:
        found = shutil.which(f"python{major}.{minor}")
        with contextlib.suppress(SetupError):
            if found and run([found, "-c", "print('works')"]).strip() == "works":
                return found
    raise SetupError(
        f"Python {running[0]}.{running[1]} is running, but 3.11, 3.12 or 3.13 is needed and none is on PATH. "
        "Install one, or say where it is: `make setup PYTHON=/path/to/python3.12`."
    )


def python_of(venv):
    """The interpreter of a virtual environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def working_uv():
    """uv from PATH, if it runs."""
    uv = shutil.which("uv")
    with contextlib.suppress(SetupError):
        if uv and run([uv, "--version"]):
            return uv
    return None


def make_tools(python):
    """(interpreter with pip, setuptools and wheel; uv or None), from PATH or in a small environment of their own."""
    tools, uv = HOST / "tools", working_uv()
    inside, ready = python_of(tools), tools / "ready"
    private = inside.with_name("uv.exe" if os.name == "nt" else "uv")
    if not ready.exists() or not inside.exists():
        with step("tools (pip, uv)"):
            shutil.rmtree(tools, ignore_errors=True)
            run([uv, "venv", "-q", "--seed", "--python", python, tools] if uv else [python, "-m", "venv", tools])
            pip = [inside, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--only-binary=:all:"]
            run([*pip, *TOOLS])
            if not uv:
                with contextlib.suppress(SetupError):  # pip serves where uv has no build
                    run([*pip, UV])
            ready.touch()
    return inside, uv or (private if private.exists() else None)


def install(tools, venv, arguments):
    """Installs into `venv` with uv, or with pip if uv is missing or fails; returns what the installer printed."""
    python, uv = tools
    if uv:
        try:
            return run([uv, "pip", "install", "--python", python_of(venv), *arguments])
        except SetupError as failure:
            if "disk is full" in str(failure):
                raise
            print(f"\n  uv failed, trying pip. {failure}", flush=True)
    return run([python, "-m", "pip", "--python", python_of(venv), "install", "--progress-bar=off", *arguments])


def venv_works(venv):
    """Whether an environment without our mark is worth keeping."""
    with contextlib.suppress(SetupError):
        run([python_of(venv), "-c", "import torch, aiohttp"])
        return True
    return False


def is_users_own():
    """Whether the ComfyUI is the user's, in which nothing may be written."""
    return bool(os.environ.get("COMFYUI_PATH"))


def lock_key(comfyui, locked=LOCKED):
    """Changes when the locked packages do, or the requirements of the ComfyUI that the user brought."""
    digest = hashlib.sha256(locked.read_bytes())
    if is_users_own() and (comfyui / "requirements.txt").is_file():
        digest.update((comfyui / "requirements.txt").read_bytes())
    return digest.hexdigest()


def venv_is_current(venv, key):
    mark = venv / ".locked"
    return python_of(venv).exists() and mark.is_file() and mark.read_text() == key


def make_venv(venv, key, python, tools, comfyui):
    """The environment with every locked package. Without a mark, or marked unfinished, it is probed or made anew."""
    mark = venv / ".locked"
    state = mark.read_text() if mark.is_file() else None
    if state == UNFINISHED or not python_of(venv).exists() or (state is None and not venv_works(venv)):
        with step("virtual environment"):
            shutil.rmtree(venv, ignore_errors=True)
            run([python, "-m", "venv", "--without-pip", venv])
    with step("locked packages (first time: 3 GB to load)"):
        mark.write_text(UNFINISHED)
        install(tools, venv, ["-q", "--no-deps", "--only-binary=:all:", "-r", LOCKED])
    if is_users_own():
        add_requirements(venv, tools, comfyui)
    with step("the packages load"):
        run([python_of(venv), "-c", "import torch, aiohttp, numpy, safetensors"])
    mark.write_text(key)


def add_requirements(venv, tools, comfyui, locked=LOCKED):
    """Adds what another version of ComfyUI asks for; only torch and numpy, which the kernels build on, stay locked."""
    kept = venv / "kept.txt"
    kept.write_text("".join(line for line in locked.open() if line.split("==")[0] in KEPT))
    with step("requirements of your ComfyUI"):
        printed = install(tools, venv, ["-r", comfyui / "requirements.txt", "-c", kept])
    changed = [line.strip() for line in printed.splitlines() if line.startswith((" + ", "Successfully installed"))]
    if changed:
        print(f"  your ComfyUI wanted other versions than the locked ones: {', '.join(changed)}")


def check_comfyui(comfyui):
    """Refuses a COMFYUI_PATH that holds no ComfyUI."""
    if not fetch_comfyui.is_comfyui(comfyui):
        raise SetupError(
            f"COMFYUI_PATH is {comfyui}, which is no ComfyUI (main.py and comfy/ expected). "
            "Point it at a ComfyUI folder, or unset it to get one."
        )


@contextlib.contextmanager
def only_one():
    """Lets a second set-up of the same checkout wait for the first."""
    HOST.mkdir(parents=True, exist_ok=True)
    with open(HOST / "lock", "w") as lock:
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("Another set-up of this checkout is running; waiting for it.", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def set_up():
    """Brings .host/ up to date; touches nothing that already is."""
    comfyui, venv = comfyui_path(), HOST / "venv"
    if is_users_own():
        check_comfyui(comfyui)

    def missing():
        no_venv = not venv_is_current(venv, lock_key(comfyui))
        no_comfyui = not is_users_own() and not fetch_comfyui.is_fetched(comfyui)
        return no_venv, no_comfyui, not is_linked(HOST / "base" / "custom_nodes" / "tessera", ROOT)

    if not any(missing()):
        return
    with only_one():
        no_venv, no_comfyui, _ = missing()
        if no_venv or no_comfyui:
            python = interpreter()
            tools = make_tools(python)
        if no_comfyui:
            with step("ComfyUI"):
                fetch_comfyui.fetch(tools[0], HOST)
        if no_venv:
            make_venv(venv, lock_key(comfyui), python, tools, comfyui)
        make_base(HOST / "base", {"tessera": ROOT})


def get_browser():
    """Debian's Chromium when we may install it; else a line that says what is missing."""
    if any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        return
    if not (hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get")):
        print("The browser tests need Chromium: install it (Debian: apt install chromium). Without it they skip.")
        return
    with step("Chromium"):
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        run(["apt-get", "update", "-q"], env=quiet)
        run(["apt-get", "install", "-y", "-q", "--no-install-recommends", "chromium"], env=quiet)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browser", action="store_true", help="also see to Chromium for the canvas tests")
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(HOST / "pycache")
    try:
        set_up()
        if options.browser:
            get_browser()
    except SetupError as failure:
        sys.exit(f"{failure}\nThen run the same command again.")
    except OSError as error:
        sys.exit(f"The set-up cannot go on. {remedy(str(error))}\n    {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped. The next run goes on from here.")


if __name__ == "__main__":
    main()
