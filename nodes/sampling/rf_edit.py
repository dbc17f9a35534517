from comfy_api.latest import io

from ...patching.feature_sharing import BankSocket, EditFeature
from ...patching.run import attach


class RfEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraRfEdit",
            display_name="RF Edit",
            category="Tessera/sampling",
            description="Keeps an edit close to its source: the first steps of the edit use the attention features that RF Invert recorded, the rest follow "
            "the new prompt alone.",
            search_aliases=["RF-Edit", "RF-Solver-Edit", "feature sharing", "feature injection", "attention injection", "inject", "prompt editing",
                            "Flux attention injection", "V injection"],
            inputs=[
                io.Model.Input("model", tooltip="The model that RF Invert used; caches and attention nodes may be on it."),
                BankSocket.Input("bank", tooltip="From RF Invert."),
                io.Int.Input("inject_steps", default=4, min=0, max=1000,
                    tooltip="Steps from the start that use the source's features; at most RF Invert's record_steps. 2 to 8 of 25 is usual: more keeps "
                            "more of the source, fewer follows the prompt. 0 is off."),
                io.Float.Input("strength", default=1.0, min=0.0, max=1.0, step=0.05, round=0.001,
                    tooltip="Share of the source's features, 0 to 1. Lower follows the prompt more; 0 is off."),
                io.Combo.Input("tokens", options=["all", "image"], advanced=True,
                    tooltip="all: the text's tokens too, as in the paper. image: the picture's alone; the prompts may then differ in length only where "
                            "image and text do not attend jointly."),
                io.Combo.Input("prompts", options=["both", "positive"], advanced=True,
                    tooltip="With cfg: share with the positive and the negative prompt alike, or with the positive alone, which moves farther from the "
                            "source."),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL for the edit. Sample it with RF Invert's noise and sigmas.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the node id is in the MODEL: two equal nodes must not share one cached result
        )  # fmt: skip

    @classmethod
    def execute(cls, model, bank, inject_steps, strength, tokens, prompts):
        if inject_steps > bank.steps:
            raise ValueError(
                f"inject_steps {inject_steps} are more than the {bank.steps} steps that RF Invert recorded. Lower it, or raise "
                "record_steps there."
            )
        feature = EditFeature(cls.hidden.unique_id, bank=bank, inject_steps=inject_steps, strength=strength, tokens=tokens,
                              prompts=prompts, blocks=frozenset(block for block, _ in bank.kept))  # fmt: skip
        return io.NodeOutput(attach(model, feature))
