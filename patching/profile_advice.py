"""Which nodes act on what a profile found, of those that serve the architecture and are not on the MODEL yet."""

from typing import Any

from .. import archs
from ..methods.quant.keep_list import select
from .attention import AttentionFeature
from .cache import CacheFeature
from .plan_foreign import packed
from .region import RegionFeature
from .run import Unserved, features_of
from .sizes import plain_name

ATTENTION, LINEAR = 0.4, 0.5  # shares of a step
MANY, FEW = 20, 8  # steps of the schedule
LONG = 4096  # queries from which sparse attention pays


class _Anywhere:
    """A method that asks for the places of image tokens, as sparse ones do."""

    spatial = True


def advice(model: Any, told: dict[str, Any]) -> list[dict[str, str]]:
    """[{"node", "why"}], what acts on the bottleneck first."""
    time = {kind: row["share"] if told["step_seconds"] else row["flops_share"] for kind, row in told["classes"].items()}
    attention, linear = sparse(model, told, time), quantized(model, told, time)
    first = attention + linear if told["bottleneck"] == "attention" else linear + attention
    return first + caches(model, told) + compiled(told)


def sparse(model: Any, told: dict[str, Any], time: dict[str, float]) -> list[dict[str, str]]:
    present = {f.name for f in features_of(model.model_options) if isinstance(f, AttentionFeature)}
    longest = max((row["queries"] for row in told["attention"]), default=0)
    if time["attention"] < ATTENTION or not serves_attention(model) or present:
        return []
    why = f"attention is {time['attention']:.0%} of a step of {longest:,} queries"
    if longest < LONG:
        why += f"; sparse attention begins to pay from some {LONG:,} on"
    made = [{"node": "Log-Linear Sparse Attention", "why": f"{why}. Attention Probe finds its density"}]
    if told["frames"] > 1:
        made += [{"node": name, "why": f"{why}, in {told['frames']} latent frames"}
                 for name in ("Window Attention 3D", "Attention Tile")]  # fmt: skip
    else:
        made.append({"node": "Local Window Attention", "why": f"{why}; best with weights trained for it"})
    return made


def serves_attention(model: Any) -> bool:
    """Whether attention nodes can act on this MODEL, by the rule that refuses them."""
    network = model.get_model_object("diffusion_model")
    try:
        AttentionFeature(None, method=_Anywhere()).check_arch(archs.find(network), archs.class_name(network))  # type: ignore[arg-type]
    except Unserved:
        return False
    return True


def quantized(model: Any, told: dict[str, Any], time: dict[str, float]) -> list[dict[str, str]]:
    products = time["linear"] >= LINEAR
    if packed(model) or not (products or told["memory"]["offloaded"]):
        return []
    network = model.get_model_object("diffusion_model")
    arch = archs.find(network)
    weights = {plain_name(name): weight for name, weight in network.state_dict().items()}
    chosen = select(weights, "" if arch is None else arch.home, None).chosen
    if hasattr(type(archs.original(network)), "bridged") or not chosen:
        return []
    why = f"linear layers are {time['linear']:.0%} of a step" if products else "the weights do not fit on the device"
    return [{"node": "Quantize Model", "why": f"{why}, in {told['weight_dtype']}; fp8 or 4 bits make them smaller"}]


def caches(model: Any, told: dict[str, Any]) -> list[dict[str, str]]:
    steps, present = told["schedule"], features_of(model.model_options)
    if any(isinstance(f, CacheFeature | RegionFeature) and not f.inactive for f in present) or steps <= FEW:
        return []
    arch = archs.find(model.get_model_object("diffusion_model"))
    level = "" if arch is not None and "blocks" not in arch.limits else ", with level output"
    if steps >= MANY:
        return [{"node": "Taylor Cache", "why": f"{steps} steps lie near enough to forecast most of them{level}"}]
    return [
        {
            "node": "Step Cache",
            "why": f"in {steps} steps a few can be skipped where little changes{level}; Solve Threshold finds how many",
        }
    ]


def compiled(told: dict[str, Any]) -> list[dict[str, str]]:
    if told["bottleneck"] != "elementwise":
        return []
    return [{"node": "TorchCompileModel", "why": "a node of ComfyUI: fused elementwise work moves less memory"}]
