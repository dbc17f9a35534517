import hashlib
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ...methods.files.place import Damaged, find
from ...methods.video.state_file import SUFFIX, load
from ...patching.video_state import VideoState, VideoStateSocket

CARRIED = Path(__file__).resolve().parents[2] / "presets" / "video_states"


def places() -> dict[str, Path]:
    """Words that follow a file's name, and the folder that they mean; the pack's own files have none."""
    return {
        " [output]": Path(folder_paths.get_output_directory()),
        " [input]": Path(folder_paths.get_input_directory()),
        "": CARRIED,
    }


def names() -> list[str]:
    """Files in ComfyUI's output and input folders and in those right below, then what the pack carries."""
    found = []
    for words, folder in places().items():
        files = [path for depth in ("", "*/") for path in folder.glob(f"{depth}*{SUFFIX}")]
        found += [f"{name}{words}" for name in sorted(path.relative_to(folder).as_posix() for path in files)]
    return found


def path_of(name: str) -> Path:
    """ValueError for what is no file in these folders."""
    words, folder = next((words, folder) for words, folder in places().items() if name.endswith(words))
    plain = name.removesuffix(words)
    if not plain.endswith(SUFFIX):
        raise ValueError(f"{plain} is no video state; they end in {SUFFIX}. Choose another file.")
    try:
        return find(folder / plain, [folder])[0]
    except Damaged as error:
        raise ValueError(f"There is no video state {name!r} in that folder. Choose another file.") from error


class LoadVideoState(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraLoadVideoState",
            display_name="Load Video State",
            category="Tessera/video",
            description="Loads a clip that Save Video State put by, for a block sampler to go on with.",
            search_aliases=["VIDEO_STATE", "VideoStateLoad", "continue video", "resume video", "extend video"],
            inputs=[
                io.Combo.Input("file", options=names(),
                    tooltip="A file in ComfyUI's output or input folder or one right below it, or the moving digit that comes with the pack. New files appear after a refresh "
                            "of the node list."),
            ],
            outputs=[
                VideoStateSocket.Output(display_name="state", tooltip="For the block sampler of the same kind and model."),
                io.String.Output(display_name="about", tooltip="Model, finished frames and size of the clip."),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, file):
        try:
            found = path_of(file).stat()
        except (ValueError, OSError):
            return file
        return hashlib.sha256(f"{file} {found.st_size} {found.st_mtime_ns}".encode()).hexdigest()

    @classmethod
    def execute(cls, file):
        snapshot = load(path_of(file))
        return io.NodeOutput(VideoState(snapshot), snapshot.told())
