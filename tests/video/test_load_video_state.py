"""Load Video State: damaged and foreign files get a sentence, and no other folder is read."""

import dataclasses
import json

import pytest
import torch
from block_helper import node, sampled
from nodes_helper import model_of, run_node
from video_state_helper import FRAMES, own_folders, saved, stopped

from tessera.methods.video import state_file
from tessera.nodes.video.load_video_state import LoadVideoState
from tessera.patching.video_state import VideoState


@pytest.fixture
def folders(tmp_path, monkeypatch):
    return own_folders(tmp_path, monkeypatch)


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


def _changed(snapshot, part, change):
    """The snapshot with the first tensor whose name ends so changed, or left out."""
    name = next(name for name in sorted(snapshot.tensors) if name.endswith(part))
    tensors = {key: value for key, value in snapshot.tensors.items() if key != name}
    made = change(snapshot.tensors[name])
    return dataclasses.replace(snapshot, tensors=tensors if made is None else {**tensors, name: made})


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("k.scale", lambda t: None),
        ("v.scale", lambda t: t[:, :, 1:]),
        ("v.scale", lambda t: t.double()),
        (".k", lambda t: t[..., 1:]),
        (".v", lambda t: t.repeat(2, 1, 1, 1)),
        (".k", lambda t: t.float()),
    ],
    ids=["no scale", "short scale", "double scale", "narrow", "batch", "plain"],
)
def test_keys_that_were_not_kept_so_get_a_sentence(part, change):
    model, spec = model_of("wan_meta")
    state, _ = stopped(model, spec, key_dtype="int8")
    for damaged in (
        _changed(state.snapshot, part, change),
        dataclasses.replace(state.snapshot, tensors={**state.snapshot.tensors, "junk": torch.zeros(1)}),
        dataclasses.replace(state.snapshot, facts={**state.snapshot.facts, "dtype": "load"}),
        dataclasses.replace(state.snapshot, facts={**state.snapshot.facts, "frames": {"0": 3, "1": 1}}),
        dataclasses.replace(state.snapshot, facts={}),
        dataclasses.replace(state.snapshot, tensors={}),
    ):
        patched, sampler, _ = node(model, state=VideoState(damaged), key_dtype="int8")
        with pytest.raises(ValueError, match="keys are not whole"):
            sampled(patched, spec, sampler, frames=FRAMES, cfg=3.0)


def test_a_state_of_another_precision_goes_on():
    model, spec = model_of("wan_meta", "bf16")
    try:
        state, begun = stopped(model, spec)
    finally:
        model.model.manual_cast_dtype = None
    assert state.snapshot.facts["dtype"] == "bfloat16"
    patched, sampler, _ = node(model, state=state)
    got = sampled(patched, spec, sampler, frames=FRAMES, cfg=3.0)
    assert torch.equal(got[:, :, : begun.shape[2]], begun) and torch.isfinite(got).all()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a.safetensors", "no\0byte"])
def test_only_the_folders_are_read(folders, name):
    (folders / f"secret{state_file.SUFFIX}").write_text(json.dumps({}))
    for words in (" [output]", " [input]", ""):
        for end in ("", state_file.SUFFIX):
            with pytest.raises(ValueError, match="no video state"):
                run_node(LoadVideoState, file=f"{name}{end}{words}")
