"""Makes this checkout importable as `tessera`, whatever its folder is called, without putting it on sys.path."""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def comfyui_path() -> Path:
    """The ComfyUI in use: COMFYUI_PATH, or the one that `make setup` unpacks."""
    return Path(os.environ.get("COMFYUI_PATH") or ROOT / ".host" / "ComfyUI").resolve()


def use_comfyui() -> None:
    """Makes `comfy` importable on this machine's best device, before anything else imports it."""
    path = str(comfyui_path())
    if path not in sys.path:
        sys.path.insert(0, path)
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()


def load_pack():
    """The package object, registered once as `tessera`."""
    if "tessera" not in sys.modules:
        sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
        spec = importlib.util.spec_from_file_location(
            "tessera", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        assert spec and spec.loader
        sys.modules["tessera"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["tessera"])
    return sys.modules["tessera"]
