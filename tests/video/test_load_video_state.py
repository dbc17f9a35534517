"""Load Video State: damaged and foreign files get a sentence, and no other folder is read."""

import dataclasses
import json

import pytest
from block_helper import node, sampled
from nodes_helper import model_of, run_node
from video_state_helper import FRAMES, own_folders, saved, stopped

from tessera.methods.video import state_file
from tessera.nodes.video.load_video_state import LoadVideoState


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


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a.safetensors", "no\0byte"])
def test_only_the_folders_are_read(folders, name):
    (folders / f"secret{state_file.SUFFIX}").write_text(json.dumps({}))
    for words in (" [output]", " [input]", ""):
        for end in ("", state_file.SUFFIX):
            with pytest.raises(ValueError, match="no video state"):
                run_node(LoadVideoState, file=f"{name}{end}{words}")
