from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ...methods.control.lora_curve import from_json
from ...patching.lora import read
from ...patching.lora_response import CurveSocket, with_lora
from ...patching.lora_stack import text_lines


class ApplyCalibratedLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraApplyCalibratedLora",
            display_name="Apply Calibrated LoRA",
            category="Tessera/control",
            description="Loads a LoRA at the strength that has the effect you ask for, by a curve of Calibrate LoRA Strength: the amount is linear in what "
            "is seen.",
            search_aliases=["LiON-LoRA", "linear LoRA strength", "LoRA slider", "load LoRA", "motion amplitude"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that the curve was measured on, without this LoRA."),
                io.Combo.Input("lora", options=folder_paths.get_filename_list("loras"), tooltip="The file in models/loras that the curve was measured with."),
                io.Float.Input("amount", default=1.0, min=0.0, max=4.0, step=0.05, round=0.001,
                    tooltip="The effect, as a part of the one at strength 1: 0 is none, 0.5 half of it. Above what was measured it stays at the last strength."),
                CurveSocket.Input("curve", optional=True, tooltip="From Calibrate LoRA Strength."),
                io.String.Input("json", default="", multiline=True, optional=True, advanced=True,
                    tooltip="Instead of the socket: the text of Calibrate LoRA Strength's json output, so that nothing is measured again."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder, for LoRA that have keys for it. It is patched at the same strength."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The MODEL with the LoRA on it, as core's Load LoRA puts it there."),
                io.Clip.Output(display_name="clip", tooltip="The text encoder with what the file holds for it; none without one at the input."),
                io.Float.Output(display_name="strength", tooltip="The strength that the amount comes to, for any other LoRA loader."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, lora, amount, curve=None, json="", clip=None):
        if curve is None and not json.strip():
            raise ValueError("Apply Calibrated LoRA needs a curve: connect Calibrate LoRA Strength, or paste its json.")
        curve = from_json(json) if curve is None else curve
        path = folder_paths.get_full_path_or_raise("loras", lora)
        if Path(path).name != curve.lora:
            raise ValueError(
                f"This curve was measured with {curve.lora}, not with {lora}. Choose that file, or calibrate this one."
            )
        strength = curve.strength(amount)
        loaded = read(path, model, clip)
        lines = [f"amount {amount:g} -> strength {strength:.4g}"]
        if amount > curve.most:
            lines.append(f"The curve ends at amount {curve.most:.3g}: measure higher strengths to go beyond.")
        panel = {"kind": "lines", "lines": [*lines, *text_lines([loaded], clip)]}
        patched, worded = with_lora(model, loaded, strength, clip)
        return io.NodeOutput(patched, worded, strength, ui={"tessera_report": [panel]})
