"""What tests of Step Cache share: settings that really skip on models whose weights are random, and what a run told."""

import functools
from types import SimpleNamespace

from nodes_helper import Job, facts, model_of, run_node, watching

from tessera.nodes.cache.step_cache import StepCache

STEPS = 6
CALIBRATION = SimpleNamespace(mag_ratios=(1.0, 0.95, 0.97, 0.98, 0.99, 1.02), sigmas=(), tea_coefficients=(), model="")
ON = {  # settings that skip within 6 steps on models whose weights are random
    "FBCache": {"threshold": 1.5},
    "EasyCache": {"threshold": 2.0},
    "TeaCache": {"threshold": 2.0, "coefficients": "1, 0"},
    "MagCache": {"threshold": 0.3, "calibration": CALIBRATION},
    "DBCache": {"threshold": 1.5},
    "FORA": {"interval": 3},
    "PAB": {"interval": 3, "cross_interval": 2},
}


def step(model, policy, **inputs):
    return run_node(StepCache, model=model, policy=policy, **{"warmup": 2, **ON[policy], **inputs})[0]


def told(model) -> dict:
    return facts(model, "Step Cache")


def kinds(model) -> str:
    """One letter an evaluation: f computed, s skipped."""
    return "".join("f" if d["kind"] == "full" else "s" for d in told(model)["decisions"])


def job_of(spec, **more):
    return Job(spec, **{"steps": STEPS, **more})


@functools.cache
def plain(name, dtype):
    """(picture, how often each block ran) without any node."""
    model, spec = model_of(name, dtype)
    with watching(model) as watch:
        picture = job_of(spec)(model)
    return picture, watch.each


def constant(model, blocks):
    """A MODEL in which these blocks add the same to every stream at every step."""
    patched = model.clone()
    for number, (kind, index) in enumerate(blocks):

        def block(args, extra, number=number):
            streams = {k: args[k] + 0.1 * (number + 1) for k in ("img", "txt") if k in args}
            return streams

        patched.set_model_patch_replace(block, "dit", kind, index)
    return patched


REST = [("double_block", 1), ("single_block", 0), ("single_block", 1)]
