from comfy_api.latest import io

from ...methods.control.llm_prompt import INSTRUCTION, POSITIONS
from ...patching.llm_prompt import Prompting, prompted


class LlmPromptOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraLlmPromptOptions",
            display_name="LLM Prompt Options",
            category="Tessera/control",
            description="For models whose text encoder is an LLM: gives it an instruction with every prompt, cuts the instruction's tokens off again, and "
            "chooses the layer whose hidden states the picture is made from.",
            search_aliases=["LI-DiT", "LLM text encoder", "system prompt", "instruction", "clip skip", "hidden state layer", "Qwen", "Gemma",
                            "Llama", "prompt enhancement"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of Qwen-Image, Z-Image, Lumina 2, HiDream, HunyuanVideo, FLUX.2 or another one that is an LLM."),
                io.String.Input("instruction", default=INSTRUCTION, multiline=True,
                    tooltip="What the LLM is asked to do with the prompt. Empty gives the model's own encoding, bit for bit."),
                io.Combo.Input("position", options=list(POSITIONS),
                    tooltip="before: right in front of the prompt. system: at the end of the chat template's system part. Models without a template do the same for both."),
                io.Boolean.Input("drop_instruction_tokens", default=True,
                    tooltip="On: only the prompt's tokens go to the picture; the LLM has read the instruction. Off: the instruction's tokens go along."),
                io.Int.Input("layer", default=0, min=-8, max=0,
                    tooltip="Layer of the LLM, counted from the last, -1. -3 is what LI-DiT uses; 0 is the model's own, which it was trained with."),
            ],
            outputs=[io.Clip.Output(tooltip="The text encoder with these options, for any node that encodes prompts.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, clip, instruction, position, drop_instruction_tokens, layer):
        return io.NodeOutput(prompted(clip, Prompting(instruction, position, drop_instruction_tokens, layer)))
