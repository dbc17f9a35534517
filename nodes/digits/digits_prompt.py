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
            "'seven' for the image model, 'seven moving left' for the video model. No text encoder is needed. 'seven | two' "
            "is a list of prompts: the nodes that follow run once for each.",
            search_aliases=["digits", "prompt", "text encode", "CLIP Text Encode", "MNIST", "test model", "demo"],
            inputs=[
                io.String.Input("text", default="seven",
                    tooltip=f"Up to {words.TOKENS} of these words: {', '.join(words.WORDS)}; figures 0 to 9 work too. "
                            "Leave it empty for the negative prompt. Several prompts stand apart by |."),
            ],
            outputs=[io.Conditioning.Output(is_output_list=True, tooltip=f"{words.TOKENS} text tokens of {words.WIDTH} numbers each, and their pooled sum. "
                                                    "Serves both digit models and no other.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, text):
        if text is None:  # a link: its words are checked when it runs
            return True
        try:
            for part in parts(text):
                words.parse(part)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, text):
        encoded = [words.encode(torch.tensor([words.parse(part)])) for part in parts(text)]
        return io.NodeOutput([[[tokens, {"pooled_output": pooled}]] for tokens, pooled in encoded])


def parts(text):
    """The prompts of a text; nothing between two bars is none, an empty text is the empty prompt."""
    return [part for part in text.split("|") if part.strip()] or [""]
