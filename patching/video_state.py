"""VIDEO_STATE: what a block sampler needs to go on with a clip, on the CPU."""

from comfy_api.latest import io

from ..methods.video.state_file import Snapshot

__all__ = ["Snapshot", "VideoState", "VideoStateSocket"]

VideoStateSocket = io.Custom("TESSERA_VIDEO_STATE")


class VideoState:
    """What goes from node to node: filled by the run of the sampler that it came with, empty before."""

    def __init__(self, snapshot: Snapshot | None = None):
        self.snapshot = snapshot

    def taken(self, what: str) -> Snapshot:
        """ValueError where nothing was kept."""
        if self.snapshot is None:
            raise ValueError(
                f"{what} got an empty video state: its sampler has not run, or keep_state is off. Switch keep_state on and connect "
                "the sampler's latent."
            )
        return self.snapshot
