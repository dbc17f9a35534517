"""Step Cache: the published policies that decide step by step, as one feature each. What differs is the gate, the level at
which it can see what it measures, and what stands in for a skipped evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import archs
from ..methods.cache.easycache import EasyCache
from ..methods.cache.first_blocks import FirstBlocks
from ..methods.cache.foca import FoCa
from ..methods.cache.gate import MakeGate
from ..methods.cache.magcache import MagCache, ratios_for
from ..methods.cache.teacache import TeaCache, parsed
from .blocks import positions
from .cache import FOREVER, CacheFeature, log
from .cache_attention import AttentionCache
from .cache_blocks import StackCache
from .cache_output import OutputCache
from .cache_state import CacheState
from .run import Run, current_forward
from .sizes import fingerprint

POLICIES = ("FBCache", "EasyCache", "TeaCache", "MagCache", "DBCache", "FORA", "PAB")
FILLS: dict[str, dict[str, Any]] = {
    "residual": {"residual": True, "order": 0},
    "reuse": {"order": 0},
    "taylor1": {"order": 1},
    "taylor2": {"order": 2},
    "foca": {"order": 1, "fill": FoCa, "copies": 1},
}
LEVELS = ("auto", "last_block", "output")
AT_BLOCKS = ("FBCache", "DBCache", "TeaCache")  # policies that look into the block stack
OTHERS = "Use policy EasyCache or FORA, which need nothing of the model."


@dataclass(frozen=True, eq=False)
class StepCache(CacheFeature):
    """What both levels share."""

    policy: str = ""
    published: bool = False  # TeaCache: the polynomial is to be one that was published for this model

    def facts(self, state: CacheState) -> dict[str, Any]:
        return {**super().facts(state), "policy": self.policy}

    def line(self, facts: dict[str, Any]) -> str:
        line = super().line(facts)
        if not facts or self.inactive:
            return line
        source = facts.get("coefficients", "")
        return f"{self.policy}{f' with the polynomial of {source}' if source else ''}: {line}"


class StepStack(StepCache, StackCache):
    """A policy in place of the block stack."""

    def check_arch(self, arch, class_name: str) -> None:
        if arch is None or "blocks" in arch.limits:
            why = arch.limits["blocks"] if arch is not None else f"The blocks of {class_name} are unknown."
            advice = OTHERS if self.policy in AT_BLOCKS else "Set level to output."
            self.cannot(f"{self.name}: policy {self.policy} acts on blocks here. {why} {advice}")
        if self.policy == "TeaCache" and arch.modulated is None:
            self.cannot(
                f"{self.name}: what TeaCache measures is not known for {arch.name}. Use policy FBCache, DBCache, "
                "MagCache, EasyCache or FORA."
            )

    def check_model(self, arch, diffusion_model: Any) -> None:
        super().check_model(arch, diffusion_model)
        if self.published and (arch.rescaled is None or arch.rescaled(diffusion_model, None) is None):
            self.cannot(
                f"{self.name}: TeaCache has no published polynomial for this {arch.name}. Connect Calibrate Cache, type "
                "coefficients, or use policy FBCache, DBCache, EasyCache or FORA."
            )


class StepOutput(StepCache, OutputCache):
    """A policy in place of the whole model."""


def step_feature(node: str | None, model, name: str, inputs: dict[str, Any]) -> CacheFeature:
    """The feature of one Step Cache node; `inputs` as its schema names them. ValueError where they do not go together."""
    policy, threshold, interval = (inputs.pop(key) for key in ("policy", "threshold", "interval"))
    most, level, fill = (inputs.pop(key) for key in ("max_consecutive", "level", "fill"))
    first, last = inputs.pop("first_blocks"), inputs.pop("last_blocks")
    cross, retention = inputs.pop("cross_interval"), inputs.pop("retention")
    coefficients, calibration = inputs.pop("coefficients"), inputs.pop("calibration", None)
    arch = archs.find(model.get_model_object("diffusion_model"))
    cap = FOREVER if most < 0 else most + 1
    common = {"node": node, "name": name, "policy": policy, **inputs}
    if policy == "PAB":
        spans = (min(n, cap) if threshold > 0 else 1 for n in (interval, cross))
        return AttentionCache(**common, order=0, **dict(zip(("interval", "cross_interval"), spans, strict=True)))
    counted = min(interval, cap) if policy == "FORA" else cap
    kind = _level(policy, level, arch)
    settings = {**common, "interval": counted if threshold > 0 else 1, **_fill(policy, fill)}
    settings["gate"] = _gate(policy, threshold, most, retention, coefficients, calibration)
    if policy == "TeaCache":
        settings["published"] = coefficients.strip() == "auto" and not _fitted(calibration)
    if policy in ("FBCache", "DBCache"):
        settings |= _ends(policy, first, last, arch, model.get_model_object("diffusion_model"))
    settings["copies"] = settings.get("copies", 0) + {"EasyCache": 2, "MagCache": 0, "FORA": 0}.get(policy, 1)
    return kind(**settings)


def _level(policy: str, level: str, arch) -> type[StepCache]:
    if policy in AT_BLOCKS and level == "output":
        raise ValueError(f"Policy {policy} looks at blocks and cannot act at level output. Set level to auto. {OTHERS}")
    if policy == "EasyCache":
        if level == "last_block":
            raise ValueError("Policy EasyCache measures the model's whole output. Set level to auto or output.")
        return StepOutput
    known = arch is not None and "blocks" not in arch.limits
    return StepStack if level == "last_block" or policy in AT_BLOCKS or (level == "auto" and known) else StepOutput


def _fill(policy: str, fill: str) -> dict[str, Any]:
    """As published where it is auto: FORA takes up outputs, the others add what was added."""
    return FILLS[("reuse" if policy == "FORA" else "residual") if fill == "auto" else fill]


def _ends(policy: str, first: int, last: int, arch, diffusion_model) -> dict[str, int]:
    """Blocks that always run. -1: eight, as DBCache was published, or a third of a stack of fewer than 24."""
    if policy == "FBCache":
        return {"first_blocks": 1}
    known = arch is not None and "blocks" not in arch.limits
    count = len(positions(arch, diffusion_model)) if known else 24
    return {"first_blocks": max(1, min(8, count // 3)) if first < 0 else first, "last_blocks": last}


def _fitted(calibration) -> tuple[float, ...]:
    return tuple(getattr(calibration, "tea_coefficients", ()) or ())


def _gate(
    policy: str, threshold: float, most: int, retention: float, coefficients: str, calibration
) -> Callable[[Run], MakeGate | None] | None:
    if policy == "FORA":
        return None
    if policy == "EasyCache":
        return lambda run: lambda: EasyCache(threshold)
    if policy == "TeaCache":
        typed = () if coefficients.strip() == "auto" else parsed(coefficients)
        return lambda run: lambda: TeaCache(threshold, lambda: _polynomial(run, typed, calibration))
    if policy == "MagCache":
        if calibration is None or not calibration.mag_ratios:
            raise ValueError(
                "Policy MagCache needs the ratios of a plain run: connect Calibrate Cache to `calibration`, or use "
                "policy FBCache or EasyCache."
            )
        return lambda run: _magcache(run, threshold, most, retention, calibration)
    return lambda run: lambda: FirstBlocks(threshold)


def _polynomial(run: Run, typed: tuple[float, ...], calibration) -> tuple[str, tuple[float, ...]]:
    """The typed one, else the fitted one, else the published one, which may depend on the size of the picture."""
    if typed:
        return "the node", typed
    if _fitted(calibration):
        return "the calibration", _fitted(calibration)
    forward = current_forward.get()
    return run.arch.rescaled(run.network, forward.grid)


def _magcache(run: Run, threshold: float, most: int, retention: float, calibration) -> MakeGate:
    made_for = getattr(calibration, "model", "")
    if made_for and made_for != fingerprint(run.patcher):
        log.warning("Step Cache: the calibration was recorded on another model; record it on this one.")
    sigmas = run.clock.sigmas[:-1] or run.clock.sigmas
    ratios = ratios_for(calibration.mag_ratios, tuple(getattr(calibration, "sigmas", ())), sigmas)
    return lambda: MagCache(threshold, ratios, most, retention)
