"""The baseline and the page of `make attention-quality`."""

import json
from types import SimpleNamespace

import attention_quality as m
import plain_topk
import pytest
import torch
from plain_topk import PlainTopK, keep_for, pairs, seen
from quality_page import page
from quality_settings import SETTINGS
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tessera.archs import Layout
from tessera.methods.attention import _static
from tessera.methods.attention.call import AttentionCall, Decline
from tessera.methods.attention.local_window import LocalWindow
from tessera.methods.attention.rettention import Rettention
from tessera.nodes import discover

LAYOUT = Layout((1, 4, 16), slice(3, 67), 70)  # four blocks of image tokens between three and three others


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return tuple(torch.randn(2, 3, LAYOUT.total, 8) for _ in range(3))


def call(q, k, v, mask=None):
    return AttentionCall(q, k, v, mask, 8**-0.5, "joint", LAYOUT, None, None)


def test_all_blocks_are_dense_attention(qkv, error):
    answer = PlainTopK(4).attend(None, call(*qkv))
    assert error(answer.out, sdpa(*qkv)) < 1e-6 and answer.pairs == answer.dense_pairs == 6 * 70**2


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_pairs_are_those_that_reach_the_softmax(qkv, keep):
    left = seen(*qkv[:2], LAYOUT.image, keep)
    assert bool((left.sum((2, 3)) == pairs(64, 6, keep)).all())
    assert PlainTopK(keep).attend(None, call(*qkv)).pairs == left.sum()


def test_it_chooses_the_blocks_of_the_largest_mean_product():
    q, k = torch.zeros(1, 1, 70, 8), torch.zeros(1, 1, 70, 8)
    q[..., 0] = 1
    k[:, :, 3 + 16 : 3 + 32, 0], k[:, :, 3 + 48 : 67, 0] = 1, 2
    left = seen(q, k, LAYOUT.image, 2)[0, 0, 3]
    assert left.tolist() == [True] * 3 + ([False] * 16 + [True] * 16) * 2 + [True] * 3


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.8, 0.99, 1.0])
def test_as_many_pairs_or_the_next_more(share):
    keep = keep_for(share, 256, 4)
    assert pairs(256, 4, keep) >= share * 260**2
    assert keep == 1 or pairs(256, 4, keep - 1) < share * 260**2
    assert keep_for(pairs(256, 4, 7) / 260**2, 256, 4) == 7


def test_it_declines_what_it_cannot_count(qkv):
    with pytest.raises(Decline):
        PlainTopK(2).attend(None, call(*qkv, torch.zeros(70, 70)[None, None]))
    with pytest.raises(ValueError, match="multiple of 16, got 65"):
        plain_topk.blocks_of(65)


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("method", [LocalWindow(2), LocalWindow(3, "square", 1), Rettention(0.1), Rettention(0.3, "circle"),
                                    Rettention(0.4, "frame_tile")], ids=str)  # fmt: skip
def test_pairs_let_through_are_the_weights_that_are_not_zero(kind, method):
    layout = m.layout_of(kind)
    q, k = (torch.randn(1, 1, layout.total, 4) for _ in range(2))
    facts = {"refreshed": 0, "served": 1}
    share, found = m.seen_share(method, kind, facts), 0
    for values in torch.eye(layout.total).split(4, 1):
        if isinstance(method, LocalWindow):
            forward = SimpleNamespace(run=SimpleNamespace(features=()))
            asked = AttentionCall(
                q, k, values[None, None], None, 0.5, "self", layout, SimpleNamespace(number=0), forward
            )
            out = method.attend(method.begin(), asked).out
        else:
            plan = _static.build(layout, method.pattern, method.density)
            out = _static.listed(plan, q, k, values[None, None], 0.5, None)
        found += int((out != 0).sum())
    assert share == pytest.approx(found / layout.total**2)
    if isinstance(method, Rettention):  # a refresh computes all pairs beside them
        assert m.seen_share(method, kind, {"refreshed": 1, "served": 4}) == pytest.approx(share + 0.25)


def test_settings_are_inputs_of_their_nodes():
    nodes = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in discover(strict=True)}
    for setting in (s for settings in SETTINGS.values() for s in settings):
        schema = nodes[setting.node]
        assert schema.display_name == setting.title and set(setting.inputs) <= {i.id for i in schema.inputs}


def test_the_page_tells_both_sides_and_who_is_closer():
    side = {"right": 0.5, "turned": 0.75, "ssim": 0.9, "pairs": 0.25}
    row = {"kind": "video", "title": "Node", "inputs": {"radius": 4}, "main": True, "note": "default", "samples": 4, **side,
           "computed": 0.5, "topk": {"keep": 2, **side, "ssim": 0.8}, "ssim_over_topk": 0.1, "interval": 0.02}  # fmt: skip
    report = {"samples": 4, "curve": 2, "steps": 5, "plain": {"video": side}, "rows": [row]}
    lines = page(report).splitlines()
    assert (
        "| Node | radius 4 (default) | 25.0 | 50.0 | 50 % / 75 % | 0.900 | 25.0 | 50 % / 75 % | 0.800 | +0.100 ± 0.020 |"
        in lines
    )
    denser = {**row, "pairs": 0.5, "main": False, "inputs": {"radius": 8}}
    rows = [x for x in page({**report, "rows": [denser, row]}).splitlines() if x.startswith("| Node")]
    assert len(rows) == 2 and "radius 4" in rows[0] and "*radius 8*" in rows[1]


def test_the_difference_is_of_the_same_samples():
    assert m.difference([0.5, 0.7, 0.9], [0.4, 0.6, 0.8]) == (pytest.approx(0.1), pytest.approx(0, abs=1e-5))
    middle, half = m.difference([1.0, 0.0], [0.0, 0.0])
    assert middle == 0.5 and half == pytest.approx(1.96 * 0.5, abs=1e-4)


def test_the_committed_page_is_of_the_committed_record():
    report = json.loads(m.RECORD.read_text())
    assert m.PAGE.read_text() == page(report), "run `make attention-quality`"
    told = [(row["kind"], row["node"], row["inputs"]) for row in report["rows"]]
    assert told == [(kind, s.node, s.inputs) for kind, settings in SETTINGS.items() for s in settings]
