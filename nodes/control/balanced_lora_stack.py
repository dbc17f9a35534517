import folder_paths
from comfy_api.latest import io

from ...methods.control.lora_gram import TARGETS
from ...patching.lora import read
from ...patching.lora_stack import WHERE, Choice, lines, put, told, weighed
from ...patching.quant_widgets import QuantizationSocket

NONE = "none"
COUNT = 4


class BalancedLoraStack(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraBalancedLoraStack",
            display_name="Balanced LoRA Stack",
            category="Tessera/control",
            description="Loads up to four LoRA at once so that none drowns the others: in every layer their norms are made equal, and what they do "
            "can be made orthogonal, so that they disturb each other less.",
            search_aliases=["LiON-LoRA", "LoRA stack", "multi LoRA", "combine LoRA", "LoRA merge", "norm balance", "orthogonal LoRA",
                            "Löwdin"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that the LoRA are made for; quantized ones work too."),
                *(one for i in range(COUNT) for one in _pair(i)),
                io.Combo.Input("norm_target", options=list(TARGETS),
                    tooltip="The norm that the LoRA are brought to in each layer that they share: the geometric mean of them, the first LoRA's, or none: as they are."),
                io.Float.Input("beta", default=1.0, min=0.0, max=1.0, step=0.05, round=0.001,
                    tooltip="How far norms are brought to the target, 0 to 1. 1 makes them equal; 0 leaves each as it was trained."),
                io.Combo.Input("orthogonalize", options=list(WHERE),
                    tooltip="Where the LoRA are turned until they are orthogonal: nowhere, in the shallow blocks, which lay out scene and motion, or in all layers."),
                io.Float.Input("shallow_fraction", default=0.3, min=0.0, max=1.0, step=0.05, round=0.001,
                    tooltip="With orthogonalize shallow: which part of the blocks counts as shallow, 0 to 1, from the first. Higher turns more layers."),
                io.Clip.Input("clip", optional=True,
                    tooltip="The text encoder, for LoRA that have keys for it. They are loaded at their plain strength: only the diffusion model is balanced."),
                QuantizationSocket.Input("calibration", optional=True,
                    tooltip="From Calibrate Quantization on this model: then deltas count by what they do to the inputs that were recorded there, not by their weights."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The MODEL with all LoRA on it, as weight patches of ComfyUI's own."),
                io.Clip.Output(display_name="clip", tooltip="The text encoder with what the files hold for it; none without one at the input."),
                io.Custom("TESSERA_REPORT").Output(display_name="report", tooltip="Norms, cosines and strengths of every layer, as JSON."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, norm_target, beta, orthogonalize, shallow_fraction, clip=None, calibration=None, **given):
        asked = [(given[f"lora_{i + 1}"], given[f"strength_{i + 1}"]) for i in range(COUNT)]
        used = [(name, strength) for name, strength in asked if name != NONE and strength != 0]
        loras = [read(folder_paths.get_full_path_or_raise("loras", name), model, clip) for name, _ in used]
        strengths = [strength for _, strength in used]
        choice = Choice(norm_target, beta, orthogonalize, shallow_fraction)
        rows = weighed(model, loras, strengths, choice, calibration)
        patched, worded = put(model, clip, loras, strengths, rows)
        panel = {"kind": "lines", "lines": lines(loras, strengths, rows, choice, clip)}
        return io.NodeOutput(patched, worded, told(loras, strengths, rows, choice), ui={"tessera_report": [panel]})


def _pair(i):
    names = [NONE, *folder_paths.get_filename_list("loras")]
    return (
        io.Combo.Input(f"lora_{i + 1}", options=names,
            tooltip=f"LoRA {i + 1}, a file in models/loras, in any layout that ComfyUI loads; none leaves it out."),
        io.Float.Input(f"strength_{i + 1}", default=1.0, min=-100.0, max=100.0, step=0.05, round=0.001,
            tooltip=f"Strength of LoRA {i + 1} after balancing, so that equal strengths act equally strongly. Negative turns it round; 0 leaves it out."),
    )  # fmt: skip
