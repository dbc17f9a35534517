"""The two trained models, sampled through ComfyUI's own loader: they draw what they are asked for, and a node's default
settings keep them doing so. Few samples, wide bounds: bootstrap/digits_score.py measures the shares themselves."""

import pytest
import safetensors
from digits_score import FILES, load_model, patched, score
from nodes_helper import facts
from pack import ROOT

SAMPLES = {"image": 20, "video": 40}
RIGHT = {"image": 0.85, "video": 0.85}  # least share read as the asked digit; chance is 0.1
TURNED = 0.95  # least share of clips that move as asked; chance is 0.25


@pytest.mark.parametrize("kind", FILES)
def test_files_are_small_and_fit_every_quantization(kind):
    with safetensors.safe_open(ROOT / "models" / FILES[kind], "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    blocks = [s for n, s in shapes.items() if "blocks" in n and len(s) == 2 and n.endswith("weight")]
    assert blocks and all(s[1] % 256 == 0 for s in blocks)
    assert (ROOT / "models" / FILES[kind]).stat().st_size < 13e6


@pytest.mark.parametrize("kind", FILES)
def test_draws_what_it_is_asked_for_plain_and_forecast(kind, reader):
    model = load_model(ROOT / "models" / FILES[kind])
    plain = score(model, kind, reader, samples=SAMPLES[kind])
    cached = patched(model, "taylor")
    fast = score(cached, kind, reader, samples=SAMPLES[kind])
    assert plain.right.float().mean() >= RIGHT[kind]
    assert plain.turned is None or plain.turned.float().mean() >= TURNED
    assert fast.right.float().mean() >= plain.right.float().mean() - 0.1
    counted = facts(cached)
    assert counted["blocks_computed"] <= counted["blocks_skipped"], "at most half of the blocks"
