from dataclasses import replace
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ...methods.control.easycontrol import write
from ...methods.files.shelf import free, plain_name
from ...patching.control import EasyControlSocket
from ...patching.train_easycontrol import Settings, train

SUFFIX = ".safetensors"
TOLD = 10  # rows of the report


class TrainEasycontrol(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraTrainEasycontrol",
            display_name="Train EasyControl",
            category="Tessera/control",
            description="Trains an EasyControl condition for your FLUX.1 on pairs of latents: what should be drawn, and what is "
            "given beforehand. Only a small LoRA on the condition's tokens learns; the MODEL stays as it is.",
            search_aliases=["EasyControl", "Train LoRA", "train ControlNet", "fine-tune", "condition LoRA", "OminiControl"],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="A plain FLUX.1 from Load Diffusion Model. A second copy of it is loaded for training."),
                io.Latent.Input("targets", tooltip="Latents of the pictures to be drawn: a batch, or a list of batches with a prompt for each."),
                io.Latent.Input("conditions",
                    tooltip="Latents of the conditions, one for each target in the same order; smaller ones are faster to train and to use."),
                io.Conditioning.Input("positive", tooltip="Prompts: one for all targets, one for each batch of a list, or one for each target."),
                io.Conditioning.Input("negative", optional=True,
                    tooltip="The empty prompt, for the steps that learn without one. Connect it if you sample with cfg above 1."),
                io.Combo.Input("mode", options=["spatial", "subject"],
                    tooltip="spatial: the condition is a layout that covers the picture. subject: it is an object without a place."),
                io.Int.Input("rank", default=16, min=1, max=256,
                    tooltip="Rank of the LoRA. Higher learns finer conditions, and makes the file larger; the authors' trainer has 128."),
                io.Int.Input("steps", default=300, min=1, max=100000,
                    tooltip="Steps of the optimizer. More follow the condition more closely, and take longer."),
                io.Int.Input("batch_size", default=8, min=1, max=1024, tooltip="Pairs in a step. More are steadier, and take memory and time."),
                io.Float.Input("learning_rate", default=1e-3, min=1e-6, max=0.1, step=1e-6, round=1e-7,
                    tooltip="Size of a step; it rises at the start and falls towards the end. 1e-4 for FLUX.1, 1e-3 for small models."),
                io.Float.Input("prompt_dropout", default=0.1, min=0.0, max=1.0, step=0.01, round=0.001, advanced=True,
                    tooltip="Share of steps that learn without a prompt, 0 to 1, where negative is connected."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False,
                    tooltip="Seed of the first weights, of the order and of the noise."),
                io.String.Input("filename", default="easycontrol",
                    tooltip="Name of the file in models/controlnet, without folder; a number is added, nothing is overwritten."),
            ],
            outputs=[
                EasyControlSocket.Output(display_name="easycontrol", tooltip="For Apply EasyControl."),
                io.String.Output(display_name="path", tooltip="The file that was written, for Load EasyControl."),
                io.Custom("TESSERA_REPORT").Output(display_name="report", tooltip="The error of every step, as JSON."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, targets, conditions, positive, mode, rank, steps, batch_size, learning_rate, prompt_dropout, seed,
                filename, negative=None):  # fmt: skip
        name = plain_name(filename[0], SUFFIX, "filename")
        folder = Path(folder_paths.get_folder_paths("controlnet")[0])
        settings = Settings(
            rank[0], steps[0], batch_size[0], learning_rate[0], prompt_dropout[0], seed[0], mode[0] == "subject"
        )
        empty = negative[0] if negative else None
        weights, losses = train(model[0], cls.hidden.unique_id, targets, conditions, positive, empty, settings)
        path = free(folder, name, SUFFIX)
        weights = replace(weights, name=path.name, subject=settings.subject)
        write(path, weights, {"tessera_mode": mode[0], "tessera_easycontrol": "1", "rank": str(rank[0])})
        report = {"kind": "lines", "file": path.name, "losses": losses, "lines": lines(path.name, losses)}
        return io.NodeOutput(weights, str(path), report, ui={"tessera_report": [report]})


def lines(name, losses):
    """For the report's panel: the mean error over parts of the training."""
    size = -(-len(losses) // TOLD)
    parts = [losses[i : i + size] for i in range(0, len(losses), size)]
    rows = [f"steps {i * size + 1} to {i * size + len(p)}: {sum(p) / len(p):.4f}" for i, p in enumerate(parts)]
    return [f"{name}: error of the velocity", *rows]
