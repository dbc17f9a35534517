"""Clips that are stopped and put by, for the tests of Save and Load Video State."""

import torch
from block_helper import node, sampled
from nodes_helper import run_node

import folder_paths  # isort: skip

from tessera.nodes.video.save_video_state import SaveVideoState
from tessera.patching import block_stop

FRAMES = 9  # by 2: blocks of 3, 2, 2 and 2; of 5, 2 and 2 from frames


def own_folders(tmp_path, monkeypatch):
    """ComfyUI's output and input folders in this test."""
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
    assert out[1].snapshot is state.snapshot
    return out[2].splitlines()[0]
