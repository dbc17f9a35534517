import torch
from comfy_api.latest import io

from ...methods.digits import words


class DigitsPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraDigitsPrompt",
            display_name="Digits Prompt",
            category="Tessera/digits",
            description="Turns words into CONDITIONING for the two small digit models that come with Tessera: "
            "'seven' for the image model, 'seven moving left' for the video model. No text encoder is needed.",
            search_aliases=["digits", "prompt", "text encode", "CLIP Text Encode", "MNIST", "test model", "demo"],
            inputs=[
                io.String.Input("text", default="seven",
                    tooltip=f"Up to {words.TOKENS} of these words: {', '.join(words.WORDS)}; figures 0 to 9 work too. "
                            "Leave it empty for the negative prompt."),
            ],
            outputs=[io.Conditioning.Output(tooltip=f"{words.TOKENS} text tokens of {words.WIDTH} numbers each, and their pooled sum. "
                                                    "Serves both digit models and no other.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, text):
        if text is None:  # a link: its words are checked when it runs
            return True
        try:
            words.parse(text)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, text):
        tokens, pooled = words.encode(torch.tensor([words.parse(text)]))
        return io.NodeOutput([[tokens, {"pooled_output": pooled}]])
