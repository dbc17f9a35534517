"""What tests of Confidence Taylor Cache share."""

from nodes_helper import facts, kinds, run_node

from tessera.nodes.cache.confidence_taylor_cache import NAME, ConfidenceTaylorCache


def confident(model, **inputs):
    """The MODEL after a Confidence Taylor Cache that judges from the third evaluation on."""
    return run_node(
        ConfidenceTaylorCache, model=model, **{"warmup": 2, "threshold": 0.08, "max_consecutive": -1, **inputs}
    )[0]


def told(model) -> dict:
    return facts(model, NAME)


def decided(model) -> str:
    return kinds(model, NAME)


def errors(model) -> list:
    return [d.get("error") for d in told(model)["decisions"]]


def between(model, job, **inputs):
    """The MODEL with a threshold that some evaluations meet and some do not: the middle of what a run measures."""
    probe = confident(model, threshold=1e-9, **inputs)
    job(probe)
    found = sorted(e for e in errors(probe)[2:-1] if e is not None)
    return confident(model, threshold=(found[len(found) // 2] + found[len(found) // 2 - 1]) / 2, **inputs)
