"""What ComfyUI offers, or does at once for graphs that come through the API, where a graph names a cache node or a loader of
another pack that is not installed: the Tessera node that does the same, with its inputs carried over."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from comfy_api.latest import io


@dataclass(frozen=True)
class Switch:
    """old: node id there, `widgets` its widgets in order; new: node id here. inputs: {input here: input there};
    values: {input here: value} where the default would be another policy."""

    old: str
    widgets: tuple[str, ...]
    new: str
    inputs: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    takes_model: bool = True


STEP, TAYLOR = "TesseraStepCache", "TesseraTaylorCache"
TAYLORSEER = ("model_type", "fresh_threshold", "max_order", "first_enhance", "last_enhance")
SEER = {"interval": "fresh_threshold", "order": "max_order", "warmup": "first_enhance"}
SWITCHES = (
    # welltop-cn/ComfyUI-TeaCache
    Switch("TeaCache", ("model_type", "rel_l1_thresh", "start_percent", "end_percent", "cache_device"), STEP,
           {"threshold": "rel_l1_thresh", "start_percent": "start_percent", "end_percent": "end_percent"},
           {"policy": "TeaCache", "warmup": 1}),
    # chengzeyi/Comfy-WaveSpeed
    Switch("ApplyFBCacheOnModel",
           ("object_to_patch", "residual_diff_threshold", "start", "end", "max_consecutive_cache_hits"), STEP,
           {"threshold": "residual_diff_threshold", "start_percent": "start", "end_percent": "end",
            "max_consecutive": "max_consecutive_cache_hits"}, {"policy": "FBCache", "warmup": 1}),
    # Zehong-Ma/ComfyUI-MagCache: its curves are fixed for a few models; FBCache needs none and measures at every step
    Switch("MagCache",
           ("model_type", "magcache_thresh", "retention_ratio", "magcache_K", "start_step", "end_step"), STEP,
           {"max_consecutive": "magcache_K", "start_percent": "retention_ratio"}, {"policy": "FBCache"}),
    # philipy1219/ComfyUI-TaylorSeer
    Switch("TaylorSeer", TAYLORSEER, TAYLOR, SEER, {"level": "last_block"}),
    Switch("TaylorSeerLite", TAYLORSEER, TAYLOR, SEER, {"level": "last_block"}),
)  # fmt: skip

LOADER = "TesseraLoadQuantizedModel"
LOADERS = (
    # city96/ComfyUI-GGUF: what it asks of dtypes and devices of dequantization has no counterpart, weights stay packed
    Switch("UnetLoaderGGUF", ("unet_name",), LOADER, {"file": "unet_name"}, takes_model=False),
    Switch("UnetLoaderGGUFAdvanced", ("unet_name", "dequant_dtype", "patch_dtype", "patch_on_device"), LOADER,
           {"file": "unet_name"}, takes_model=False),
    # nunchaku-tech/ComfyUI-nunchaku: offload is ComfyUI's own, its cache is Taylor Cache's to do
    Switch("NunchakuFluxDiTLoader",
           ("model_path", "cache_threshold", "attention", "cpu_offload", "device_id", "data_type", "i2f_mode"), LOADER,
           {"file": "model_path"}, takes_model=False),
    Switch("NunchakuQwenImageDiTLoader", ("model_name", "cpu_offload", "num_blocks_on_gpu", "use_pin_memory"), LOADER,
           {"file": "model_name"}, takes_model=False),
)  # fmt: skip


def replacements(nodes: Iterable[type[io.ComfyNode]]) -> list[io.NodeReplace]:
    """What to register for these nodes of ours; none for a node that is missing."""
    schemas = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in nodes}
    return [_replace(switch, schemas[switch.new]) for switch in (*SWITCHES, *LOADERS) if switch.new in schemas]


def _replace(switch: Switch, schema: io.Schema) -> io.NodeReplace:
    mapping: list[Any] = [{"new_id": "model", "old_id": "model"}] if switch.takes_model else []
    mapping += [{"new_id": new, "old_id": old} for new, old in switch.inputs.items()]
    for widget in schema.inputs:  # the API fills in nothing: every input that must be given is
        if widget.optional or widget.id == "model" or widget.id in switch.inputs:
            continue
        options = getattr(widget, "options", None)
        default = options[0] if widget.default is None and options else widget.default
        mapping.append({"new_id": widget.id, "set_value": switch.values.get(widget.id, default)})
    return io.NodeReplace(
        new_node_id=switch.new,
        old_node_id=switch.old,
        old_widget_ids=list(switch.widgets),
        input_mapping=mapping,
        output_mapping=[{"new_idx": 0, "old_idx": 0}],
    )
