"""The pack without diffusers, and tessera.patching.diffusers without ComfyUI."""

import subprocess
import sys
from pathlib import Path

import diffusers_helper as tiny

SCRIPT = """
import sys
sys.path.insert(0, {bootstrap!r})
from pack import load_pack
load_pack()
import torch, diffusers
from tessera.methods.attention.window_3d import Window3D
from tessera.patching.diffusers import Cache, apply, remove
model = diffusers.DiTTransformer2DModel(**{config!r}).eval()
applied = apply(model, attention=Window3D(1, 2, 2, global_every=0), cache=Cache(interval=2, warmup=1), min_tokens=0)
steps = diffusers.DDIMScheduler()
steps.set_timesteps(6)
x = torch.randn(1, 4, 8, 8)
with torch.no_grad(), applied.running(steps):
    for t in steps.timesteps:
        x = steps.step(model(x, t[None], torch.tensor([3])).sample[:, :4], t, x).prev_sample
remove(model)
assert applied.facts[0]["served"] > 0 and applied.facts[0]["forecast"] == 2, applied.facts
assert not [name for name in sys.modules if name.split(".")[0].startswith("comfy")]
print("done")
"""


def test_without_comfyui():
    root = Path(__file__).resolve().parents[2]
    script = SCRIPT.format(bootstrap=str(root / "bootstrap"), config=tiny.TINY["DiTTransformer2DModel"].config)
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert made.stdout.strip() == "done", made.stderr[-2000:]


NODES = """
import sys
sys.path.insert(0, {bootstrap!r})
from pack import load_pack, use_comfyui
use_comfyui()
load_pack()
sys.modules["diffusers"] = sys.modules["transformers.modeling_utils"] = None
from tessera.nodes.loaders import class_label, load_diffusers_model
schema = load_diffusers_model.LoadDiffusersModel.GET_SCHEMA()
from tessera.patching.diffusers_load import class_named
try:
    class_named("FluxTransformer2DModel")
except ValueError as sentence:
    assert str(sentence).startswith("Load Diffusers Model needs the Python packages diffusers and transformers"), sentence
    print(schema.node_id)
"""


def test_nodes_import_without_diffusers():
    root = Path(__file__).resolve().parents[2]
    script = NODES.format(bootstrap=str(root / "bootstrap"))
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert made.stdout.strip() == "TesseraLoadDiffusersModel", made.stderr[-2000:]
