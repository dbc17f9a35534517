"""Imports go one way. Each folder lists what it may import from the pack and from outside."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOST = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "server", "execution", "folder_paths", "node_helpers"}
RULES = {  # folder: (pack folders it may import, outside packages besides the standard library)
    "kernels": ({"kernels"}, {"torch", "triton", "comfy_kitchen", "fla"}),
    "archs": ({"archs"}, {"torch"}),
    "networks": ({"networks", "kernels"}, {"torch"}),
    "methods": ({"methods", "kernels", "archs"}, {"torch", "numpy", "safetensors", "gguf"}),
    "patching": ({"patching", "methods", "networks", "kernels", "archs"}, {"torch", "comfy", "comfy_api", "comfy_extras",
                                                                          "comfy_execution", "comfy_kitchen", "server"}),
    "nodes": ({"patching", "methods", "networks", "kernels", "archs"}, {"torch", "comfy_api", "folder_paths"}),
}  # fmt: skip
EXTRA = {  # the bridge to another host; what ComfyUI's own server answers with
    "patching/diffusers.py": {"diffusers"},
    "patching/diffusers_arguments.py": {"diffusers"},
    "patching/diffusers_load.py": {"diffusers"},
    "patching/history.py": {"aiohttp"},
}
FILES = [p for folder in RULES for p in sorted((ROOT / folder).rglob("*.py"))]


def imports(source: str, package: tuple[str, ...]):
    """(pack folder, None) or (None, outside package) of every import, wherever in the file it stands. `package` is the
    folders from the pack's root to the file; importing the pack itself counts as folder "the pack"."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((None, name.name.split(".")[0]) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield None, (node.module or "").split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] + tuple(filter(None, (node.module or "").split(".")))
            yield from ((base[0], None) if base else (name.name, None) for name in node.names)


def breaches(source: str, path: Path) -> list[str]:
    """What a file of the pack imports against its folder's rule; `path` is relative to the pack."""
    inside, outside = RULES[path.parts[0]]
    allowed = outside | EXTRA.get(path.as_posix(), set()) | sys.stdlib_module_names
    return [
        folder or package
        for folder, package in imports(source, path.parts[:-1])
        if (folder is not None and folder not in inside) or (package is not None and package not in allowed)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    assert breaches(path.read_text(), path.relative_to(ROOT)) == []


@pytest.mark.parametrize("folder", [f for f in RULES if f != "networks"])
def test_every_rule_meets_files(folder):
    assert [p for p in FILES if p.relative_to(ROOT).parts[0] == folder]


@pytest.mark.parametrize(
    ("path", "line", "breach"),
    [
        ("kernels/attention/x.py", "import comfy.ops", "comfy"),
        ("kernels/attention/x.py", "from ...patching import run", "patching"),
        ("kernels/x.py", "from .. import methods", "methods"),
        ("archs/x.py", "from ..kernels import _triton", "kernels"),
        ("methods/cache/x.py", "def f():\n    from ...patching.run import attach", "patching"),
        ("networks/x.py", "from ..archs import find", "archs"),
        ("patching/x.py", "from ..nodes import discover", "nodes"),
        ("patching/x.py", "import diffusers", "diffusers"),
        ("nodes/cache/x.py", "import comfy.model_management", "comfy"),
    ],
)
def test_a_wrong_import_is_seen(path, line, breach):
    assert breaches(line, Path(path)) == [breach]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("kernels/attention/x.py", "from .._triton import tl"),
        ("methods/cache/x.py", "from ...kernels.cache import forecast"),
        ("patching/x.py", "import comfy.sample\nfrom . import blocks\nfrom .. import archs"),
        ("patching/diffusers.py", "import diffusers"),
        ("nodes/cache/x.py", "import folder_paths\nfrom ...patching.run import attach"),
    ],
)
def test_a_right_import_passes(path, line):
    assert breaches(line, Path(path)) == []


def test_the_pack_itself_imports_nothing_of_the_host():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    top = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert top == [], "pytest and scripts import the pack without a ComfyUI"


def test_host_packages_stay_in_patching_and_nodes():
    for folder, (_, outside) in RULES.items():
        assert folder in ("patching", "nodes") or not outside & HOST
