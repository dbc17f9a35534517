"""What the tests of Accelerate share: a clock that counts blocks, and what a run told."""

import pytest

from tessera.patching import trials
from tessera.patching.report import latest_record


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Time counts computed blocks, so that what is chosen does not depend on the machine."""
    real = trials.run_once

    class Counted:
        now = 0.0

        def perf_counter(self):
            return self.now

    counted = Counted()

    def run_once(*args, **kwargs):
        out = real(*args, **kwargs)
        computed = [f["facts"]["blocks_computed"] for f in out[1]["features"] if "blocks_computed" in f["facts"]]
        counted.now += computed[0] + 1 if computed else 2 * out[1]["forwards"] + 1
        return out

    monkeypatch.setattr(trials, "time", counted)
    monkeypatch.setattr(trials, "run_once", run_once)
    return counted


def told(model) -> dict:
    return next(f for f in latest_record(model)["features"] if f["name"] == "Accelerate")["facts"]
