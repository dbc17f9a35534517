"""What leaves a run: numbers only. A live line for each node, and a record that Run Report hands to API users."""

import logging
import time
from collections import defaultdict, deque
from threading import Lock
from typing import Any

import torch
from server import PromptServer

from .. import archs
from .history import HISTORY
from .pictures import Sketch

log = logging.getLogger("tessera")
EVENT = "tessera.run"
KEPT = 16  # records a MODEL remembers
MARKS = 64  # numbers of a latent by which its run is recognised
CHANGED = "The latent is not what the last runs on this MODEL gave out; these are the facts of the newest run."


class Ledger:
    """The last runs of a MODEL and its clones, newest last."""

    def __init__(self):
        self._records: deque[tuple[tuple[Any, ...], Marks | None, dict[str, Any], Sketches]] = deque(maxlen=KEPT)
        self._lock = Lock()

    def __deepcopy__(self, memo):
        return self

    def add(
        self, features: tuple[Any, ...], record: dict[str, Any], marks: "Marks | None" = None,
        sketches: "Sketches | None" = None,
    ) -> None:  # fmt: skip
        with self._lock:
            self._records.append((features, marks, record, sketches or {}))

    def find(self, features: tuple[Any, ...], patches: str, marks: "Marks | None") -> dict[str, Any] | None:
        """The record of exactly these features whose run gave out the latent of these marks; else the newest one,
        preferring the same weight patches (LoRA), with a note where a latent was asked for. Branches of one MODEL share
        its ledger, so features are told apart by identity and not by name."""
        with self._lock:
            mine = [(held, record) for owners, held, record, _ in self._records if owners == features]
        made = [record for held, record in mine if marks is not None and same_latent(held, marks)]
        if made:
            return made[-1]
        every = [record for _, record in mine]
        found = ([r for r in every if r["patches"] == patches] or every or [None])[-1]
        return found if found is None or marks is None else {**found, "notes": [CHANGED]}

    def draw(self, record: dict[str, Any]) -> None:
        """Adds the masks to the features of a record that find() gave, once."""
        entries = record["features"]
        with self._lock:
            for sketches in [s for _, _, held, s in self._records if held["features"] is entries]:
                while sketches:
                    number, make = sketches.popitem()
                    entries[number]["mask"] = make()


Marks = tuple[tuple[int, ...], tuple[float, ...]]
Sketches = dict[int, Sketch]  # by place in a record's features


def marks_of(latent: Any) -> Marks | None:
    """Shape and some numbers, evenly spread, of a latent [B, ...] (of its first part, where it has several)."""
    if getattr(latent, "is_nested", False):
        latent = latent.unbind()[0]
    if not isinstance(latent, torch.Tensor) or not latent.numel():
        return None
    flat = latent.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, min(MARKS, flat.numel())).round().long().to(flat.device)
    return tuple(latent.shape), tuple(flat[places].float().tolist())


def same_latent(a: Marks | None, b: Marks) -> bool:
    """Equal up to the rounding of a half precision copy, NaN where NaN."""
    if a is None or a[0] != b[0]:
        return False
    return torch.allclose(torch.tensor(a[1]), torch.tensor(b[1]), rtol=1e-2, atol=1e-5, equal_nan=True)


def publish(
    run, ended: str, ledger: Ledger | None, patches: str, made: Any = None, owners: Any = None, told: bool = True
) -> dict[str, Any]:
    """Collects the facts of every feature, stores the record under its owners, the features of the MODEL, and tells the
    canvas. made: the latent that the run gave."""
    marks = marks_of(made)  # waits for the device, so that the last evaluation has ended
    run.timeline.end(run, time.perf_counter())
    seconds = time.perf_counter() - run.started
    entries, sketches, lost = [], {}, defaultdict(list)
    for number, feature in enumerate(run.features):
        state = run.states.get(feature)
        facts = feature.facts(state) if state is not None else {}
        bypassed = feature.bypassed(run, facts) if facts and ended == "finished" else ""
        if bypassed:
            facts["bypassed"] = bypassed
            lost[bypassed].append(feature.name)
        entries.append({"name": feature.name, "node": feature.node, "facts": facts, "line": feature.line(facts)})
        sketch = feature.sketch(state, run.clock.steps) if state is not None and ended != "error" else None
        if sketch is not None:
            sketches[number] = sketch
    for sentence, names in lost.items():
        log.warning("%s: %s", ", ".join(names), sentence)
    record = {
        "ended": ended,
        "seconds": round(seconds, 4),
        "architecture": run.arch.name if run.arch else archs.class_name(run.network),
        "known": run.arch is not None,
        "steps": run.clock.steps,
        "evaluations": run.clock.evaluation + 1,
        "forwards": run.forwards,
        "features": entries,
        "patches": patches,
    }
    if ledger is not None:
        ledger.add(owners or run.features, record, marks, sketches)
    if told:
        whole = run.live.whole(run, record, sketches)
        HISTORY.add(run.live.client, whole, sketches)
        notify(whole, run.live.client)
    return record


def notify(record: dict[str, Any], client: str | None) -> None:
    """Sends a record to the canvas of whoever queued the prompt; silent where no canvas did."""
    if client is not None:
        PromptServer.instance.send_sync(EVENT, record, client)


def tell(event: str, data: dict[str, Any]) -> None:
    """Sends small facts to the canvas of whoever queued the prompt; silent where none did."""
    server = getattr(PromptServer, "instance", None)
    client = getattr(server, "client_id", None)
    if client is not None:
        server.send_sync(event, data, client)


def latest_record(model, latent: Any = None, masks: bool = False) -> dict[str, Any]:
    """The record of the run on this MODEL that made this latent, of the last run without one; with masks, where
    attention was sparse. ValueError where there is none to report."""
    options = model.model_options.get("transformer_options", {})
    features, ledger = options.get("tessera_features", ()), options.get("tessera_ledger")
    if not features or ledger is None:
        raise ValueError("Run Report found no Tessera node on this MODEL; connect the MODEL that the sampler uses.")
    record = ledger.find(features, str(model.patches_uuid), None if latent is None else marks_of(latent))
    if record is None:
        raise ValueError(
            "Run Report found no finished run on this MODEL; connect the latent of the sampler that uses it."
        )
    if masks:
        ledger.draw(record)
    return record
