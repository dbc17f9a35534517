"""Files of at most 300 lines, functions of at most 60. What is longer is listed here with its reason."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("nodes", "patching", "methods", "networks", "archs", "kernels", "bootstrap", "bench", "scripts", "tests")
FILE, FUNCTION = 300, 60
LONG_FILES: dict[str, str] = {}  # path: reason
LONG_FUNCTIONS: dict[str, str] = {}  # "path::function": reason
FILES = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))]


def functions(source: str):
    """(name, lines of its body and signature, without decorators and docstring) of every function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0]
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                lines -= (first.end_lineno or first.lineno) - first.lineno + 1
            yield node.name, lines


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path):
    name, source = path.relative_to(ROOT).as_posix(), path.read_text()
    lines = len(source.splitlines())
    assert lines <= FILE or name in LONG_FILES, f"{name} has {lines} lines, at most {FILE}; split it"
    long = [f"{f} ({n})" for f, n in functions(source) if n > FUNCTION and f"{name}::{f}" not in LONG_FUNCTIONS]
    assert not long, f"{name}: longer than {FUNCTION} lines: {', '.join(long)}"


def test_exceptions_are_needed_and_say_why():
    for name, reason in LONG_FILES.items():
        assert len(reason) > 20 and len((ROOT / name).read_text().splitlines()) > FILE, name
    for key, reason in LONG_FUNCTIONS.items():
        name, function = key.split("::")
        assert len(reason) > 20 and dict(functions((ROOT / name).read_text()))[function] > FUNCTION, key


def test_a_long_function_is_counted_without_its_docstring():
    source = 'def f():\n    """One.\n\n    Two."""\n' + "    x = 1\n" * 61
    assert list(functions(source)) == [("f", 62)]


def test_no_folder_of_leftovers():
    names = {part for p in FILES for part in (*p.relative_to(ROOT).parts[:-1], p.stem)}
    assert not names & {"utils", "util", "common", "core", "misc", "helpers"}
