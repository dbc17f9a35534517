"""What tests of Region-Adaptive Sampling share."""

from nodes_helper import facts, run_node

from tessera.nodes.cache.region_adaptive_sampling import RegionAdaptiveSampling

NAME = "Region-Adaptive Sampling"


def ras(model, **inputs):
    """The MODEL after the node, leaving tokens out at steps 2, 3, 5 and 6 of 8."""
    return run_node(RegionAdaptiveSampling, model=model, **{"start_step": 2, "reset_every": 3, **inputs})[0]


def told(model) -> dict:
    return facts(model, NAME)


def steps(model) -> str:
    """One letter an evaluation: f full, r region."""
    return "".join(d["kind"][0] for d in told(model)["decisions"])
