"""Save Video State: a clip goes on bit for bit, and what does not belong is refused in one sentence."""

import pytest
import torch
from block_helper import euler, node, sampled
from nodes_helper import model_of, run_node
from tiny_models import conds
from video_state_helper import FRAMES, own_folders, saved, stopped

from tessera.nodes.video.load_video_state import LoadVideoState, names
from tessera.patching import block_stop

KINDS = [
    {},
    {"window_blocks": 1, "sink_frames": 1, "key_dtype": "int8"},
    {"key_dtype": "fp8_e4m3", "keep_keys_on": "cpu"},
    {"memory": "frames", "sampler": euler()},
]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    return own_folders(tmp_path, monkeypatch)


@pytest.mark.parametrize("inputs", KINDS, ids=["keys", "int8 behind a window", "fp8 on the cpu", "frames"])
def test_a_loaded_clip_goes_on_bit_for_bit(folders, inputs):
    model, spec = model_of("wan_meta")
    patched, sampler, _ = node(model, **inputs)
    whole = sampled(patched, spec, sampler, frames=FRAMES, cfg=3.0)
    state, begun = stopped(model, spec, **inputs)
    assert torch.equal(begun, whole[:, :, : begun.shape[2]]) and begun.shape[2] == (7 if "memory" in inputs else 5)
    file = saved(state)
    assert file == "video_states/clip_00001_.video_state.safetensors" and names()[0] == f"{file} [output]"
    loaded, about = run_node(LoadVideoState, file=f"{file} [output]").args
    assert f"{begun.shape[2]} frames in 2 blocks" in about
    patched, sampler, _ = node(model, state=loaded, **inputs)
    assert torch.equal(sampled(patched, spec, sampler, frames=FRAMES, cfg=3.0), whole)


def test_a_clip_may_grow(folders):
    model, spec = model_of("wan_meta")
    state, begun = stopped(model, spec)
    patched, sampler, _ = node(model, state=state)
    grown = sampled(patched, spec, sampler, frames=12, cfg=3.0)
    assert grown.shape[2] == 12 and torch.equal(grown[:, :, :5], begun)


def test_what_does_not_belong_is_refused(folders):
    model, spec = model_of("wan_meta")
    state, _ = stopped(model, spec)
    with pytest.raises(ValueError, match="kept with window 0, and this one has 1"):
        patched, sampler, _ = node(model, state=state, window_blocks=1)
        sampled(patched, spec, sampler, frames=FRAMES)
    with pytest.raises(ValueError, match="kept by KeyMemory, and this sampler keeps FrameMemory"):
        patched, sampler, _ = node(model, state=state, memory="frames")
        sampled(patched, spec, sampler, frames=FRAMES)
    vace, vace_spec = model_of("wan_vace")
    with pytest.raises(ValueError, match="of WanModel, and this MODEL is VaceWanModel"):
        patched, sampler, _ = node(vace, state=state)
        sampled(patched, vace_spec, sampler, frames=FRAMES)
    other, other_spec = model_of("wan")
    with pytest.raises(ValueError, match="does not continue in one of"):
        patched, sampler, _ = node(other, state=state)
        sampled(patched, other_spec, sampler, frames=FRAMES)
    with pytest.raises(
        ValueError, match="3 transformer blocks with 4 heads 24 wide, and this model has 2 with 1 128 wide"
    ):
        patched, sampler, _ = node(other, state=state)
        wide = torch.zeros(1, 16, FRAMES, 8, 12)
        sampled(patched, other_spec, sampler, latent=wide)
    with pytest.raises(ValueError, match="no negative prompt"):
        state, _ = stopped(model, spec, cfg=1.0)
        patched, sampler, _ = node(model, state=state)
        sampled(patched, spec, sampler, frames=FRAMES, cfg=3.0)


def test_an_empty_state_is_refused(folders):
    with pytest.raises(ValueError, match="keep_state is off"):
        saved(node(model_of("wan_meta")[0])[2])


@pytest.mark.parametrize("inputs", [{}, {"window_blocks": 1, "sink_frames": 1}], ids=["all", "behind a window"])
def test_prompts_of_areas_go_on_bit_for_bit(inputs):
    """Their keys have fewer tokens in a frame than those of the whole picture."""
    model, spec = model_of("wan_meta")
    (text, more), (other, others) = conds(spec)[0][0], conds(spec, 9)[0][0]
    positive = [[text, {**more, "area": (4, 6, 0, 0)}], [other, {**others, "area": (4, 8, 2, 3)}], [other, others]]
    found = []
    for stop in (False, True):
        patched, sampler, state = node(model, keep_state=True, **inputs)
        end = (lambda step, x0, x, total: block_stop.stop() if step == 3 else None) if stop else None
        found.append(sampled(patched, spec, sampler, frames=FRAMES, callback=end, positive=positive))
    patched, sampler, _ = node(model, state=state, **inputs)
    assert found[1].shape[2] == 5
    assert torch.equal(sampled(patched, spec, sampler, frames=FRAMES, positive=positive), found[0])
