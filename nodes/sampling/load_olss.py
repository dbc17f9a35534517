import hashlib
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ...methods.files.shelf import Shelf
from ...methods.sampling.olss_files import FOLDER, SUFFIX, load, told
from ...patching.olss import sampler_of


def shelf() -> Shelf:
    own = Path(folder_paths.get_output_directory()) / FOLDER
    return Shelf(own, Path(__file__).resolve().parents[2] / "presets" / "olss", SUFFIX)


class LoadOlss(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraLoadOlss",
            display_name="Load OLSS",
            category="Tessera/sampling",
            description="Loads a few-step sampler that Solve OLSS fitted and saved, with the schedule that belongs to it.",
            search_aliases=["OLSS", "Optimal Linear Subspace Search", "OLSSSampler", "learned scheduler", "few steps"],
            inputs=[
                io.Combo.Input("file", options=shelf().names(),
                    tooltip="A file in output/tessera_olss, or the one for the digits model that comes with the pack. Files put there appear after a refresh of the node list."),
            ],
            outputs=[
                io.Sampler.Output(display_name="sampler", tooltip="The fitted SAMPLER, for SamplerCustomAdvanced. It takes only the sigmas beside it."),
                io.Sigmas.Output(display_name="sigmas", tooltip="The schedule that belongs to it."),
                io.String.Output(display_name="about", tooltip="Model, guidance, size and teacher that it was fitted to."),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, file):
        here = shelf()
        return hashlib.sha256((here.folder(file) / file).read_bytes()).hexdigest() if file in here.names() else file

    @classmethod
    def execute(cls, file):
        here = shelf()
        if file not in here.names():
            raise ValueError(f"There is no sampler {file!r} in {FOLDER}. Save one with Solve OLSS.")
        table = load(here.folder(file) / file)
        return io.NodeOutput(sampler_of(table), table.sigmas.float(), told(table))
