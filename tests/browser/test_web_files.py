"""Rules for the files of the extension that need no browser."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "web").glob("*.js"), *(ROOT / "web").glob("*.mjs")])


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_module(path):
    source = path.read_text("utf-8")
    assert len(source.splitlines()) < 200
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", source)
    addresses = set(re.findall(r"https?://[^\"'`\s]+", source))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # a namespace, not a place


def test_imports_carry_the_version():
    """The server sends .mjs files without cache headers: a new release must not meet old modules in a browser's cache."""
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    version = re.search(r'^version = "([^"]+)"', project, re.M).group(1)
    imports = [i for path in FILES for i in re.findall(r'from "(\./[^"]+)"', path.read_text("utf-8"))]
    assert imports and {i.partition("?v=")[2] for i in imports} == {version}
