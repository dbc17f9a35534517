"""What `make fidelity` draws and counts, from numbers of the test's own."""

import json
import re

import torch
from fidelity import share_of_bytes
from fidelity_page import chart
from pack import ROOT
from safetensors.torch import save_file

NAME = re.compile(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)" fill="#1c1c1e" stroke[^>]*>([^<]+)<')


def boxes(drawing):
    """Where the names of a chart lie, a letter 5.5 wide and 11 high."""
    for x, base, anchor, name in NAME.findall(drawing):
        wide = 5.5 * len(name)
        at = float(x) - {"start": 0, "middle": 0.5, "end": 1}[anchor] * wide
        yield at, float(base) - 9, at + wide, float(base) + 2


def test_no_name_of_a_chart_covers_another():
    report = json.loads((ROOT / "docs/fidelity.json").read_text())
    for node in {row["node"] for kind in report["kinds"] for row in kind["rows"] if row["node"]}:
        fields = [kind for kind in report["kinds"] if any(row["node"] == node for row in kind["rows"])]
        names = list(boxes(chart(report, node)))
        assert len(names) == sum(row["node"] == node for kind in fields for row in kind["rows"])
        for n, a in enumerate(names):
            assert a[0] > 0 and a[2] < 52 + len(fields) * 370
            for b in names[:n]:
                assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3], (node, a, b)


def test_kept_weights_count_as_the_plain_file_stores_them(tmp_path):
    plain = {"a.weight": torch.zeros(8, 8, dtype=torch.bfloat16), "b.weight": torch.zeros(8, 8, dtype=torch.bfloat16)}
    packed = {"a.weight": torch.zeros(8, 8, dtype=torch.int8), "b.weight": torch.zeros(8, 8)}
    save_file(plain, tmp_path / "plain.safetensors")
    save_file(packed, tmp_path / "packed.safetensors")
    assert share_of_bytes(tmp_path / "packed.safetensors", tmp_path / "plain.safetensors") == 0.75
