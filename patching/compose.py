"""What may act together on one MODEL, and what is refused with a sentence before an image is spoilt."""

from .. import archs

LISTED = "The node Plan lists what is on a MODEL and what cannot join it."


def check(present, feature, model) -> None:
    """At node execution: ValueError where the new feature cannot join the features on this MODEL."""
    for other in present:
        conflict = feature.conflicts(other) or other.conflicts(feature)
        if conflict:
            raise refusal(conflict)
    network = model.get_model_object("diffusion_model")
    arch = archs.find(network)
    feature.check_arch(arch, archs.class_name(network))
    feature.check_model(arch, network)


def joins(present, feature, model) -> None:
    """ValueError where the feature cannot act in a run on this MODEL, with all that is on it by now."""
    check(present, feature, model)
    reason = feature.refuses(model.model_options.get("transformer_options", {}))
    if reason:
        raise refusal(reason)


def check_run(run, patcher) -> None:
    """At sampling: what other nodes put on the MODEL after ours."""
    options = patcher.model_options.get("transformer_options", {})
    for feature in run.features:
        reason = feature.refuses(options)
        if reason:
            raise refusal(reason)


def refusal(sentence: str) -> ValueError:
    """What a refused combination raises."""
    return ValueError(f"{sentence} {LISTED}")
