import hashlib
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ...methods.cache.profile_files import FOLDER, SUFFIX, load
from ...methods.files.shelf import Shelf
from ...patching.cache_widgets import ProfileSocket


def shelf() -> Shelf:
    own = Path(folder_paths.get_output_directory()) / FOLDER
    return Shelf(own, Path(__file__).resolve().parents[2] / "presets" / "profiles", SUFFIX)


class LoadCacheProfile(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraLoadCacheProfile",
            display_name="Load Cache Profile",
            category="Tessera/loaders",
            description="Loads a profile that Solve Threshold saved, or that somebody shared: settings of a cache that were found and "
            "checked for one model, sampler and number of steps.",
            search_aliases=["cache profile", "cache preset", "threshold preset", "shared settings"],
            inputs=[
                io.Combo.Input("profile", options=shelf().names(),
                    tooltip="A JSON file in output/tessera_profiles, or the one for the digit models that comes with the pack. Files put there appear after a refresh of the node list."),
            ],
            outputs=[
                ProfileSocket.Output(display_name="profile", tooltip="Connect it to `profile` of the cache node that it was made for."),
                io.String.Output(display_name="about", tooltip="Which node, sampler and steps it is for, and what was measured."),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, profile):
        path = shelf().folder(profile) / profile
        return hashlib.sha256(path.read_bytes()).hexdigest() if profile in shelf().names() else profile

    @classmethod
    def execute(cls, profile):
        found = load(shelf().folder(profile), profile)
        facts = ", ".join(f"{name} {value}" for name, value in found.facts.items() if value is not None)
        about = f"{found.node}: {found.sampler.removeprefix('sample_') or 'any sampler'}, {found.steps or 'any'} steps; {facts}"
        return io.NodeOutput(found, about)
