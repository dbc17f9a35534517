"""The committed matrix of attention nodes and models is what the nodes do."""

import json

import attention_matrix as m
import pytest

CELLS = json.loads(m.LOCK.read_text())
NODES = {node.GET_SCHEMA().display_name: node for node in m.attention_nodes()}


def test_it_holds_every_node_and_every_model():
    assert sorted({*CELLS} ^ {*NODES}) == [], "run `make matrix`"
    assert list(CELLS) == sorted(CELLS)
    assert all(list(cells) == list(m.MODELS) for cells in CELLS.values())


@pytest.mark.parametrize("name", ["flux", "wan_meta", "hunyuan3d2"])
@pytest.mark.parametrize("title", CELLS)
def test_a_cell_is_what_the_node_does(title, name):
    assert m.cell(NODES[title], name) == CELLS[title][name], "run `make matrix`"


def test_image_attention_is_served_where_a_node_is_meant_for_it():
    """At least 95 % of the image self-attention calls, but for patterns that cannot be there: tiles of one frame."""
    for title, cells in CELLS.items():
        served = [c for c in cells.values() if "served" in c and "a single frame" not in c["declined"]]
        calls = sum(c["served"] + sum(c["declined"].values()) for c in served)
        assert sum(c["served"] for c in served) >= 0.95 * calls, (
            title,
            [c["declined"] for c in served if c["declined"]],
            "a wide pattern? see SMALL",
        )


def test_the_pages_show_it():
    page, table = m.tables(CELLS, m.families())
    assert m.PAGE.read_text() == page, "run `make matrix`"
    assert m.BEGIN + table + m.END in m.README.read_text(), "run `make matrix`"
