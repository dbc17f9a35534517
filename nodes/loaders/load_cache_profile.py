import hashlib
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ...methods.cache.profile_files import FOLDER, load, names
from ...patching.cache_widgets import ProfileSocket

CARRIED = Path(__file__).resolve().parents[2] / "presets" / "profiles"  # for the digit models


def every() -> list[str]:
    """Names of the user's own profiles and of those that the pack carries."""
    return sorted({*names(own()), *names(CARRIED)})


def own() -> Path:
    return Path(folder_paths.get_output_directory()) / FOLDER


def folder(profile: str) -> Path:
    """Where this profile lies; the user's own goes before one of the same name that the pack carries."""
    return CARRIED if profile in names(CARRIED) and profile not in names(own()) else own()


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
                io.Combo.Input("profile", options=every(),
                    tooltip="A JSON file in output/tessera_profiles, or the one for the digit models that comes with the pack. Files put there appear after a refresh of the node list."),
            ],
            outputs=[
                ProfileSocket.Output(display_name="profile", tooltip="Connect it to `profile` of the cache node that it was made for."),
                io.String.Output(display_name="about", tooltip="Which node, sampler and steps it is for, and what was measured."),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, profile):
        path = folder(profile) / profile
        return hashlib.sha256(path.read_bytes()).hexdigest() if profile in every() else profile

    @classmethod
    def execute(cls, profile):
        found = load(folder(profile), profile)
        facts = ", ".join(f"{name} {value}" for name, value in found.facts.items() if value is not None)
        about = f"{found.node}: {found.sampler.removeprefix('sample_') or 'any sampler'}, {found.steps or 'any'} steps; {facts}"
        return io.NodeOutput(found, about)
