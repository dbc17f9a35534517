"""Whether a run is what a profile of settings was made for."""

import logging
from typing import Any

from .sizes import fingerprint

log = logging.getLogger("tessera")


def check_profile(feature: Any, run: Any) -> None:
    """ValueError, or a warning where the node asks for one, when the feature's `profile` is of another model, sampler or
    number of steps."""
    if feature.profile is None:
        return
    model = fingerprint(run.patcher) if feature.profile.model else ""
    misfit = feature.profile.misfit(model, run.sampler, run.clock.steps)
    if misfit and feature.unsupported == "error":
        raise ValueError(misfit)
    if misfit:
        log.warning("%s: %s", feature.name, misfit)
