"""The committed matrix of caches and models is what the nodes do."""

import json

import attention_matrix
import model_matrix as m
import pytest

CELLS = json.loads(m.LOCK.read_text())
NODES = m.nodes()


def test_it_holds_every_cache_and_every_model():
    assert list(CELLS) == list(NODES), "run `make matrix`"
    assert {"Taylor Cache", "Step Cache", "Region-Adaptive Sampling"} <= {*CELLS}
    assert all(list(cells) == list(attention_matrix.MODELS) for cells in CELLS.values())


@pytest.mark.parametrize("name", ["flux", "wan_meta", "ltxv_meta"])
@pytest.mark.parametrize("title", CELLS)
def test_a_cell_is_what_the_node_does(title, name):
    assert m.cell(NODES[title], name) == CELLS[title][name], "run `make matrix`"


def test_no_node_does_nothing_in_silence():
    idle = [(title, name) for title, cells in CELLS.items() for name, c in cells.items() if c.get("acts") is False]
    assert idle == []


def test_the_pages_show_it():
    page, table = m.tables(CELLS, attention_matrix.families())
    assert m.PAGE.read_text() == page, "run `make matrix`"
    assert m.BEGIN + table + m.END in attention_matrix.README.read_text(), "run `make matrix`"
