"""One real ComfyUI with this pack for all tests of this folder."""

import importlib.util
from pathlib import Path

import pytest

BOOTSTRAP = Path(__file__).resolve().parents[2] / "bootstrap"


def _harness():
    """bootstrap/comfy_server.py under a name of its own: in this process `server` may be ComfyUI's."""
    spec = importlib.util.spec_from_file_location("tessera_bootstrap_server", BOOTSTRAP / "comfy_server.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def harness():
    return _harness()


@pytest.fixture(scope="session")
def server(harness, tmp_path_factory):
    packs = [Path(__file__).with_name("stand_in_text")]
    with harness.ComfyServer(base=tmp_path_factory.mktemp("base"), custom_nodes=packs) as running:
        yield running
