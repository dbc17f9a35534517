"""A node is found from its display name: file, class, id, category, test and help page follow from it; and a user finds
out from the canvas alone what every input does."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NODE_FILES = [p for p in sorted((ROOT / "nodes").glob("*/*.py")) if p.stem != "__init__"]
FOLDERS = {"attention", "cache", "loaders", "control", "sampling", "video", "surgery", "measure", "digits"}
UNIT_FREE = 12  # a tooltip shorter than this says nothing


@pytest.fixture(scope="module")
def schemas(host):
    """{path of the node's file: (class, schema)}, of every node of the pack."""
    from tessera.nodes import discover

    found = {}
    for node in discover():
        area, stem = node.__module__.split(".")[-2:]
        found[ROOT / "nodes" / area / f"{stem}.py"] = (node, node.GET_SCHEMA())
    return found


@pytest.fixture
def entry(request, schemas):
    assert request.param in schemas, "this file holds no node"
    return schemas[request.param]


each_node = pytest.mark.parametrize(
    "entry", NODE_FILES, indirect=True, ids=lambda p: str(p.relative_to(ROOT / "nodes").with_suffix(""))
)


def snake(display_name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", display_name.lower()).strip("_")


def camel(stem: str) -> str:
    return "".join(part.capitalize() for part in stem.split("_"))


@pytest.mark.parametrize(
    ("name", "stem", "cls"),
    [
        ("RF Invert", "rf_invert", "RfInvert"),
        ("Taylor Cache", "taylor_cache", "TaylorCache"),
        ("Sparse-Linear Attention", "sparse_linear_attention", "SparseLinearAttention"),
        ("Load DiT-3D", "load_dit_3d", "LoadDit3d"),
    ],
)
def test_names_follow_from_the_display_name(name, stem, cls):
    assert (snake(name), camel(snake(name))) == (stem, cls)


def test_one_node_a_file(schemas):
    assert sorted(schemas) == NODE_FILES
    assert {p.parent.name for p in NODE_FILES} <= FOLDERS


@each_node
def test_names(entry):
    node, schema = entry
    area, stem = node.__module__.split(".")[-2:]
    assert stem == snake(schema.display_name)
    assert node.__name__ == camel(stem)
    assert schema.node_id == f"Tessera{node.__name__}"
    assert schema.category == f"Tessera/{area}"


@each_node
def test_help_page_and_test_exist(entry):
    node, schema = entry
    area, stem = node.__module__.split(".")[-2:]
    page = ROOT / f"web/docs/{schema.node_id}.md"
    assert page.is_file(), f"{page.relative_to(ROOT)} is missing"
    text = page.read_text()
    assert text.splitlines()[0] == f"# {schema.display_name}"
    unnamed = [i.id for i in schema.inputs if hasattr(i, "force_input") and f"`{i.id}`" not in text]  # its widgets
    assert not unnamed, f"{page.name} does not explain {', '.join(unnamed)}"
    assert (ROOT / f"tests/{area}/test_{stem}.py").is_file(), f"tests/{area}/test_{stem}.py is missing"


@each_node
def test_the_canvas_explains_it(entry):
    _, schema = entry
    assert len(schema.description) > 40 and schema.description.rstrip().endswith(".")
    assert schema.search_aliases and all(schema.search_aliases)
    assert len(set(schema.search_aliases)) == len(schema.search_aliases)
    mute = [i.id for i in schema.inputs if len(i.tooltip or "") < UNIT_FREE]
    assert not mute, f"no tooltip on {', '.join(mute)}"
    assert all(len(o.tooltip or "") >= UNIT_FREE for o in schema.outputs), "an output has no tooltip"


@each_node
def test_a_node_that_patches_a_model_is_itself_alone(entry):
    """Its id is in the MODEL for its live line, so two equal nodes must not share one cached result."""
    _, schema = entry
    if schema.category in ("Tessera/attention", "Tessera/cache") and any(i.id == "model" for i in schema.inputs):
        hidden = [h.name for h in schema.hidden or ()]
        assert schema.not_idempotent and "unique_id" in hidden, "set hidden=[io.Hidden.unique_id] and not_idempotent"


@each_node
def test_numbers_survive_the_canvas(entry):
    """The frontend rounds a Float without `step` and `round` to one decimal, and its widgets need a range."""
    _, schema = entry
    for widget in schema.inputs:
        kind = type(widget).__qualname__
        if kind in ("Int.Input", "Float.Input"):
            assert None not in (widget.default, widget.min, widget.max), f"{widget.id} has no default or range"
            assert widget.min <= widget.default <= widget.max, f"{widget.id}: default out of range"
        if kind == "Float.Input":
            assert widget.step and widget.round, f"{widget.id} has no step or round"


def test_help_pages_belong_to_nodes(schemas):
    ids = {schema.node_id for _, schema in schemas.values()}
    pages = {p.name.split(".")[0] for p in (ROOT / "web/docs").glob("*.md")}
    assert pages <= ids, f"help pages without a node: {sorted(pages - ids)}"


def test_catalogue_page_names_every_node(schemas):
    text = (ROOT / "docs/catalogue.md").read_text()
    for _, schema in schemas.values():
        row = f"| {schema.display_name} | `{schema.node_id}` | {schema.description} | {', '.join(schema.search_aliases)} |"
        assert row in text, f"{schema.node_id}: run `make node-assets`"
