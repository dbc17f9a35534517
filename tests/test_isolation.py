"""One broken node costs that node: a file that does not import, or a schema that does not build, is logged with its
name, and every other node of the pack loads in ComfyUI. A folder that does not import costs the nodes in it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("__init__.py", "nodes", "patching", "methods", "networks", "archs", "kernels", "web")
LOAD = """
import asyncio, json, logging, sys
from pathlib import Path

comfyui, pack = sys.argv[1:]
sys.path.insert(0, comfyui)
from comfy.cli_args import args

args.cpu = True
import nodes

logged = []
logging.getLogger("tessera").setLevel(logging.INFO)
logging.getLogger("tessera").addFilter(lambda record: logged.append(record.getMessage()) or True)
loaded = asyncio.run(nodes.load_custom_node(pack))
ids = sorted(name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("Tessera"))
Path(pack, "result.json").write_text(json.dumps({"loaded": loaded, "ids": ids, "logged": logged}))
"""
NODE = """
from comfy_api.latest import io

class {name}(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        {body}

    @classmethod
    def execute(cls):
        return io.NodeOutput()
"""
GOOD = (
    'return io.Schema(node_id="Tessera{name}", display_name="{name}", category="Tessera/cache", inputs=[], outputs=[])'
)


def load_pack_with(host, folder: Path, files: dict[str, str]) -> dict:
    """What ComfyUI's own loader gets from a copy of the pack with these further node files."""
    pack = folder / "tessera"
    pack.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, pack / part, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / part).is_file():
            shutil.copy(ROOT / part, pack / part)
    for name, text in files.items():
        (pack / "nodes" / name).parent.mkdir(exist_ok=True)
        (pack / "nodes" / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(host), str(pack)], capture_output=True, text=True, cwd=folder
    )
    assert (pack / "result.json").is_file(), done.stderr[-2000:]
    return json.loads((pack / "result.json").read_text())


@pytest.fixture(scope="module")
def result(host, tmp_path_factory):
    broken = "raise RuntimeError('the schema is broken')"
    files = {
        "cache/a_typo.py": "def nothing(:\n    pass\n",
        "cache/a_missing.py": "import a_package_that_nobody_has\n",
        "cache/bad_schema.py": NODE.format(name="BadSchema", body=broken),
        "cache/two_sorts.py": NODE.format(name="Worse", body=broken) + NODE.format(name="Fine", body=GOOD.format(name="Fine")),
        "absent/__init__.py": "import another_package_that_nobody_has\n",
        "absent/lost.py": NODE.format(name="Lost", body=GOOD.format(name="Lost")),
        "failing/__init__.py": "1 / 0\n",
        "failing/gone.py": NODE.format(name="Gone", body=GOOD.format(name="Gone")),
        "cache/zebra.py": NODE.format(name="Zebra", body=GOOD.format(name="Zebra")),
    }  # fmt: skip
    return load_pack_with(host, tmp_path_factory.mktemp("isolation"), files)


def test_every_other_node_loads(result):
    ours = {f"Tessera{''.join(w.capitalize() for w in p.stem.split('_'))}"
            for p in (ROOT / "nodes").glob("*/*.py") if p.stem != "__init__"}  # fmt: skip
    assert result["loaded"] is True
    assert set(result["ids"]) == ours | {"TesseraFine", "TesseraZebra"}


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("cache.a_typo", "failed to import"),
        ("cache.a_missing", "failed to import"),
        ("BadSchema", "schema of BadSchema is broken"),
        ("Worse", "schema of Worse is broken"),
        ("folder absent", "failed to import, its nodes are missing"),
        ("folder failing", "failed to import, its nodes are missing"),
    ],
)
def test_the_broken_one_is_logged_with_its_name(result, name, what):
    lines = [line for line in result["logged"] if name in line]
    assert len(lines) == 1 and what in lines[0], result["logged"]


def test_the_log_counts_what_loaded(result):
    assert any(f"Tessera: {len(result['ids'])} nodes" in line for line in result["logged"])
