"""The settings at which fidelity.py measures every accelerator on the digit models: of each node its default first."""

from dataclasses import dataclass, field
from typing import Any

from quality_settings import SETTINGS as ATTENTION

CORE = "EasyCache (ComfyUI)"


@dataclass(frozen=True)
class Point:
    """A node with inputs that are not its defaults; `node` empty: core's EasyCache. formats: of Quantize Model."""

    node: str
    title: str
    inputs: dict[str, Any] = field(default_factory=dict)
    main: bool = False

    @property
    def label(self) -> str:
        return ", ".join(f"{k} {v}" for k, v in self.inputs.items()) or "default"


def _ladder(node: str, title: str, *inputs: dict[str, Any]) -> list[Point]:
    return [Point(node, title, given, n == 0) for n, given in enumerate(inputs)]


COMMON = [
    *_ladder("TesseraTaylorCache", "Taylor Cache", {}, {"interval": 2}, {"interval": 4, "order": 2}, {"interval": 5}, {"interval": 8}),
    *_ladder("TesseraConfidenceTaylorCache", "Confidence Taylor Cache", {}, {"threshold": 0.03}, {"threshold": 0.2}),
    *_ladder("TesseraStepCache", "Step Cache", {}, {"threshold": 0.05}, {"threshold": 0.2},
             {"policy": "FORA"}, {"policy": "EasyCache", "threshold": 0.05}),
    *_ladder("TesseraRegionAdaptiveSampling", "Region-Adaptive Sampling", {"round_to": 8}, {"sample_ratio": 0.25, "round_to": 8}),
    *_ladder("TesseraDynamicTokens", "Dynamic Tokens", {}, {"quantile": 0.6}),
    *_ladder("TesseraDynamicGrain", "Dynamic Grain", {}, {"coarse_fraction": 0.25}),
    *_ladder("", CORE, {"threshold": 0.1}, {"threshold": 0.2}),
    *_ladder("TesseraQuantizeModel", "Quantize Model", {"format": "tlq4"}, {"format": "int8_row"}, {"format": "int4_g64"}),
]  # fmt: skip
POINTS = {
    kind: COMMON + [Point(s.node, s.title, {**s.inputs, "min_tokens": 0}, s.main) for s in ATTENTION[kind]]
    for kind in ("image", "video")
}
