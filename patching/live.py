"""What the canvas of whoever queued the prompt is told of a run while it lasts: one small event an evaluation, so few a
second that a page keeps up; and afterwards the whole of it, which is kept for pages that load again."""

import logging
import time
from collections import deque
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from server import PromptServer

from .. import archs
from . import remedies

log = logging.getLogger("tessera")
STEP = "tessera.step"
A_SECOND = 10  # events at the most


@dataclass
class Live:
    """Of one run. client: the page that queued the prompt; without one nothing is sent."""

    id: str = field(default_factory=lambda: uuid4().hex)
    client: str | None = None
    node: str | None = None  # which samples
    at: float = field(default_factory=time.time)  # seconds since 1970
    sent: deque[float] = field(default_factory=lambda: deque(maxlen=A_SECOND))
    told: int = 0  # columns that the page knows whole
    peak_before: int | None = None  # bytes, of the device
    broken: bool = False

    def begin(self, run: Any) -> None:
        """Before the model is loaded."""
        try:
            server = getattr(PromptServer, "instance", None)
            self.client = getattr(server, "client_id", None)
            self.node = getattr(server, "last_node_id", None) if self.client is not None else None
            self.peak_before = device_peak(run)
            named = [{"name": f.name, "node": f.node} for f in run.features if f.node is not None]
            self.send({**self.head(run), "features": named, "timeline": run.timeline.told()})
        except Exception:
            self.fail()

    def step(self, run: Any) -> None:
        """At the start of an evaluation: the ones that ended since the page was told, and the one that begins."""
        if self.broken:
            return
        try:
            run.timeline.begin(run)
            now = time.perf_counter()
            if self.client is None or (len(self.sent) == A_SECOND and now - self.sent[0] < 1.0):
                return
            self.sent.append(now)
            self.send({**self.head(run), "timeline": run.timeline.told(self.told)})
            self.told = max(0, len(run.timeline.columns) - run.timeline.open)
        except Exception:
            self.fail()

    def fail(self) -> None:
        """What goes wrong here must not cost the picture: it is logged, and no more steps are told."""
        self.broken = True
        log.exception("Tessera: the canvas cannot be told of the steps of this run")

    def send(self, event: dict[str, Any]) -> None:
        if self.client is not None:
            PromptServer.instance.send_sync(STEP, event, self.client)

    def head(self, run: Any) -> dict[str, Any]:
        columns, clock = run.timeline.columns, run.clock
        now = time.perf_counter()
        return {
            "run": self.id,
            "at": round(self.at, 3),
            "sampler_node": self.node,
            "architecture": run.arch.name if run.arch else archs.class_name(run.network),
            "steps": clock.steps,
            "expected": len(clock.expected) or None,
            "position": round(clock.position, 4),
            "elapsed": round(now - run.started, 4),
            "sampling": round(now - columns[0].began, 4) if columns else None,  # without loading
        }

    def whole(self, run: Any, record: dict[str, Any], drawn: Container[int]) -> dict[str, Any]:
        """The record of a finished run with all that the sidebar draws. drawn: places of the features with a mask."""
        features = [
            {
                **entry,
                "declined": remedies.told(entry["facts"].get("declined")),
                "by_block": feature.by_block(run.states[feature]) if run.states.get(feature) is not None else [],
                "inactive": feature.inactive,
                "mask_kept": number in drawn,
            }
            for number, (feature, entry) in enumerate(zip(run.features, record["features"], strict=True))
        ]
        memory = device_memory(run, self.peak_before)
        return {**record, **self.head(run), "features": features, "timeline": run.timeline.told(), "memory": memory}


def device_peak(run: Any) -> int | None:
    from .sampling import peak

    return peak(run.device) if run.device is not None else None


def device_memory(run: Any, before: int | None) -> dict[str, Any]:
    """The device's highest mark. It is this run's own where it rose in the run; else the run stayed below it: resetting
    it would take it from others who measure."""
    now = device_peak(run)
    return {
        "device": str(run.device) if run.device is not None else "",
        "peak": now,
        "own": now is not None and before is not None and now > before,
    }
