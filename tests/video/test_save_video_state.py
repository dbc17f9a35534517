"""Save and Load Video State: a clip goes on bit for bit, and what does not belong is refused in one sentence."""

import dataclasses
import json

import pytest
import torch
from block_helper import euler, node, sampled
from nodes_helper import model_of, run_node

import folder_paths  # isort: skip

from tessera.methods.video import state_file
from tessera.nodes.video.load_video_state import LoadVideoState, names
from tessera.nodes.video.save_video_state import SaveVideoState
from tessera.patching import block_stop

FRAMES = 7  # by 2: blocks of 3, 2 and 2


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for kind in ("output", "input"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"get_{kind}_directory", lambda kind=kind: str(tmp_path / kind))
    return tmp_path


def stopped(model, spec, cfg=3.0, **inputs):
    """(state, latent) of a clip that was stopped in its second block."""
    patched, sampler, state = node(model, keep_state=True, **inputs)
    stop = lambda step, x0, x, total: block_stop.stop() if step == 3 else None  # noqa: E731
    return state, sampled(patched, spec, sampler, frames=FRAMES, cfg=cfg, callback=stop)


def saved(state, prefix="video_states/clip"):
    out = run_node(SaveVideoState, samples={"samples": torch.zeros(1)}, state=state, filename_prefix=prefix).args
    return out[1].splitlines()[0]


KINDS = [
    {},
    {"window_blocks": 1, "sink_frames": 1, "key_dtype": "int8"},
    {"key_dtype": "fp8_e4m3", "keep_keys_on": "cpu"},
    {"memory": "frames", "sampler": euler()},
]


@pytest.mark.parametrize("inputs", KINDS, ids=["keys", "int8 behind a window", "fp8 on the cpu", "frames"])
def test_a_loaded_clip_goes_on_bit_for_bit(folders, inputs):
    model, spec = model_of("wan_meta")
    patched, sampler, _ = node(model, **inputs)
    whole = sampled(patched, spec, sampler, frames=FRAMES, cfg=3.0)
    state, begun = stopped(model, spec, **inputs)
    assert torch.equal(begun, whole[:, :, :5])
    file = saved(state)
    assert file == "video_states/clip_00001_.video_state.safetensors" and names()[0] == f"{file} [output]"
    loaded, about = run_node(LoadVideoState, file=f"{file} [output]").args
    assert "5 frames in 2 blocks" in about
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
    with pytest.raises(ValueError, match=r"3 transformer blocks with \[4\] heads, and this model has 2 with 1"):
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


def test_damaged_and_foreign_files_get_a_sentence(folders):
    state, _ = stopped(*model_of("wan_meta"))
    path = folders / "output" / saved(state)
    whole = path.read_bytes()
    bad = {
        "damaged": whole[: len(whole) // 2],
        "is damaged": b"\x80\x02" + whole[2:],
        "is no video state": whole.replace(b'"tessera_video_state":"1"', b'"tessera_video_state":"2"'),
        "tells of 9 frames and holds 5": whole.replace(rb"\"boundaries\": [0, 3, 5]", rb"\"boundaries\": [0, 3, 9]"),
    }
    for sentence, data in bad.items():
        assert data != whole
        path.write_bytes(data)
        with pytest.raises(ValueError, match=sentence):
            state_file.load(path)
    lost = dataclasses.replace(state.snapshot, tensors=dict(list(state.snapshot.tensors.items())[:-1]))
    state_file.save(path, lost)
    loaded = run_node(LoadVideoState, file=f"{path.relative_to(folders / 'output').as_posix()} [output]").args[0]
    patched, sampler, _ = node(model_of("wan_meta")[0], state=loaded)
    with pytest.raises(ValueError, match="keys are not whole"):
        sampled(patched, model_of("wan_meta")[1], sampler, frames=FRAMES, cfg=3.0)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a.safetensors", "no\0byte"])
def test_only_the_folders_are_read(folders, name):
    (folders / f"secret{state_file.SUFFIX}").write_text(json.dumps({}))
    for words in (" [output]", " [input]", ""):
        for end in ("", state_file.SUFFIX):
            with pytest.raises(ValueError, match="no video state"):
                run_node(LoadVideoState, file=f"{name}{end}{words}")
