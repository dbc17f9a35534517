from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ...methods.video.state_file import SUFFIX, save
from ...patching.video_state import VideoState, VideoStateSocket


class SaveVideoState(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraSaveVideoState",
            display_name="Save Video State",
            category="Tessera/video",
            description="Saves where a block sampler stands in a clip: its finished frames and what its memory holds of them. Load Video State takes it up "
            "again, also after ComfyUI was closed, and the clip goes on as if it had never stopped.",
            search_aliases=["VIDEO_STATE", "VideoStateSave", "checkpoint a clip", "continue video", "resume video", "KV cache to disk"],
            inputs=[
                io.Latent.Input("samples", tooltip="The latent that the sampler made; it only makes this node wait for the sampler."),
                VideoStateSocket.Input("state", tooltip="The state output of a block sampler whose keep_state is on."),
                io.String.Input("filename_prefix", default="video_states/clip",
                    tooltip="Begin of the file's name in ComfyUI's output folder, where it may name a folder; a number follows."),
            ],
            outputs=[
                io.Latent.Output(display_name="samples", tooltip="The latent as it came."),
                VideoStateSocket.Output(display_name="state", tooltip="The state as it was saved, for a block sampler that goes on in the same graph."),
                io.String.Output(display_name="file", tooltip="The file's name in the output folder, and what it holds."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, samples, state, filename_prefix):
        snapshot = state.taken("Save Video State")
        folder, name, number, inside, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        file = f"{name}_{number:05}_{SUFFIX}"
        save(Path(folder) / file, snapshot)
        about = f"{(Path(inside) / file).as_posix()}\n{snapshot.told()}"
        return io.NodeOutput(samples, VideoState(snapshot), about)
