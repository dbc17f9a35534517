import hashlib
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ...methods.files.shelf import Shelf, plain_name
from ...methods.measure.stack_files import FOLDER, SUFFIX, load
from ...methods.measure.stack_search import Goal
from ...patching.accelerate import Accelerate as AccelerateFeature
from ...patching.decoding import decoder
from ...patching.run import Feature, attach

MEASURE = "measure"
GOALS = ("fastest within a loss", "a wanted speed-up")


def own_folder() -> Path:
    return Path(folder_paths.get_output_directory()) / FOLDER


def shelf() -> Shelf:
    return Shelf(own_folder(), Path(__file__).resolve().parents[2] / "presets" / "stacks", SUFFIX)


class Accelerate(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraAccelerate",
            display_name="Accelerate",
            category="Tessera/measure",
            description="Put it between the model loader and the sampler. The first run tries caches and sparse attention on your own "
            "prompt, size and sampler, keeps what is fastest within the loss that you allow, and writes it down; every later run "
            "uses it at once. It never keeps a stack that is slower than the plain model.",
            search_aliases=["auto", "speed up", "faster", "optimize", "one click", "TeaCache", "EasyCache", "cache-dit", "nunchaku",
                            "autotune", "benchmark"],
            inputs=[
                io.Model.Input("model", tooltip="From the model loader, LoRA included. What other nodes put on it stays."),
                io.Combo.Input("goal", options=list(GOALS),
                    tooltip="What is wanted: the fastest stack that keeps min_ssim, or the stack nearest to the plain picture that reaches speedup."),
                io.Float.Input("min_ssim", default=0.9, min=0.0, max=1.0, step=0.01, round=0.001,
                    tooltip="With goal fastest within a loss: least structural similarity to the plain result, 0 to 1. Higher is nearer to it and slower."),
                io.Float.Input("speedup", default=2.0, min=1.05, max=20.0, step=0.1, round=0.01,
                    tooltip="With goal a wanted speed-up: times faster than the plain run. Higher loses more."),
                io.Int.Input("trials", default=12, min=0, max=64,
                    tooltip="Whole runs that the first run may take, the plain one included. More find more and take longer; 4 is the least, 0 only uses "
                            "what was found before."),
                io.Combo.Input("decode", options=["latent", "vae", "digits"],
                    tooltip="What similarity is measured on: the latent (nothing else is needed), pictures of the connected VAE (nearest to the eye), or the digit "
                            "models' own pictures."),
                io.Combo.Input("profile", options=[MEASURE, *shelf().names()],
                    tooltip="measure: find out, or use what this node found before for the same model, sampler, steps and goal. A file: apply exactly that, without a trial. "
                            "Files lie in output/tessera_stacks, yours and those that others shared."),
                io.String.Input("name", default="", advanced=True,
                    tooltip="File name of the profile that is written. Empty: made of the model, the sampler and the steps."),
                io.Boolean.Input("again", default=False, advanced=True,
                    tooltip="On measures in every run, also where a profile of it lies ready."),
                io.Vae.Input("vae", optional=True, tooltip="Needed for decode = vae."),
                io.Model.Input("packed_model", optional=True,
                    tooltip="The same model with packed weights, from Load Quantized Model or Quantize Model. It is tried too, and used where it serves the goal."),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL that chooses when it is sampled. Connect it to the sampler.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, profile, **inputs):
        path = shelf().folder(profile) / profile
        return hashlib.sha256(path.read_bytes()).hexdigest() if profile in shelf().names() else profile

    @classmethod
    def execute(cls, model, goal, min_ssim, speedup, trials, decode, profile, name, again, vae=None, packed_model=None):
        if name:
            plain_name(name, SUFFIX, "profile name")
        found = None if profile == MEASURE else (profile, load(shelf().folder(profile), profile))
        wanted = Goal(loss=1 - min_ssim) if goal == GOALS[0] else Goal(ratio=speedup)
        packed = None if packed_model is None else attach(packed_model, Feature(None, "Meter"))
        feature = AccelerateFeature(
            cls.hidden.unique_id, goal=wanted, trials=trials, packed=packed, profile=found, folder=own_folder(), file=name,
            again=again, decode=decoder("Accelerate", {"latent": "none"}.get(decode, decode), vae),
        )  # fmt: skip
        return io.NodeOutput(attach(model, feature))
