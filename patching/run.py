"""Run state. A node leaves an immutable Feature on the MODEL; its state is born when a sampler starts (OUTER_SAMPLE)
and dies in that wrapper's finally, on success, interrupt or error. Nothing is kept on modules, classes or globals."""

import logging
import time
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import comfy.model_patcher
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP

from .. import archs
from .clock import Clock, expected_evaluations
from .forwards import untangle
from .live import Live
from .pictures import Sketch
from .plan_words import feature_words
from .report import Ledger, publish
from .sizes import compute_dtype, holds_compiled
from .timeline import Timeline

log = logging.getLogger("tessera")
FEATURES, RUN, LEDGER = "tessera_features", "tessera_run", "tessera_ledger"
WRAPPER_KEY = "tessera"
STOCHASTIC = ("ancestral", "sde", "lcm", "ddpm", "sa_solver", "seeds_", "restart")  # in names of sampler functions


class Unserved(ValueError):
    """A feature cannot act on an architecture; the message is for users."""


@dataclass(frozen=True, eq=False)
class Feature:
    """What one node asks of a MODEL. Immutable and shared by clones; two applications are two features."""

    node: str | None  # id of the node in the graph, for its live line
    name: str = "Tessera"  # the node's display name
    unsupported: str = "error"  # or "warn": what to do where the architecture cannot be served
    inactive: str = ""  # why it does nothing on this MODEL
    adds_keys: ClassVar[bool] = False  # it puts keys beside those of the stack's calls: Forward.extra_keys or before
    skips: ClassVar[bool] = False  # it may leave out part of an evaluation's work
    for_sampler: ClassVar[bool] = False  # the SAMPLER of its node does not work without it

    def begin(self, run: "Run") -> Any:
        """The state of one sampling run. May raise ValueError where the node cannot act."""
        return None

    def facts(self, state: Any) -> dict[str, Any]:
        """Numbers about the finished run, JSON-ready."""
        return {}

    def sketch(self, state: Any, steps: int) -> Sketch | None:
        """What draws the mask of the finished run of so many steps, for a report that asks."""
        return None

    def prepare(self, run: "Run", noise_shape: tuple[int, ...]) -> None:
        """Called before the model is loaded: the place to make what depends on the size of the noise."""

    def held_bytes(self, run: "Run", noise_shape: tuple[int, ...], conds: dict[str, Any]) -> int:
        """Bytes that it will hold on the model's device in this run, for core's memory estimate."""
        return 0

    def shown(self, noise_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the most of this noise that the model is given at once."""
        return noise_shape

    def by_block(self, state: Any) -> list[str]:
        """A word an evaluation, of a digit a block: tenths of its attention pairs that were computed, "." where all."""
        return []

    def line(self, facts: dict[str, Any]) -> str:
        """One line for the node on the canvas."""
        return ""

    def plan(self) -> str:
        """In words, before anything is sampled: what it will do. Blocks and schedule are told apart."""
        return feature_words(self)

    def foreseen(self, others: tuple["Feature", ...], model: Any) -> tuple[list[str], list[str]]:
        """(declined, refused) beside the other features on this ModelPatcher, in sentences, before anything is sampled."""
        return [], []

    def bypassed(self, run: "Run", facts: dict[str, Any]) -> str:
        """A sentence where others did, in the finished run, what was this feature's to do: who, and the remedy."""
        return ""

    def conflicts(self, other: "Feature") -> str | None:
        """A sentence where this feature cannot join another one on the same MODEL."""
        return None

    def check_arch(self, arch: archs.Arch | None, class_name: str) -> None:
        """ValueError, or a warning, where this feature cannot act on the architecture."""

    def check_model(self, arch: archs.Arch | None, diffusion_model: Any) -> None:
        """ValueError where a setting does not fit this model's sizes."""

    def attached(self, model: Any) -> None:
        """Called once when a node has put this feature on the MODEL: the place to prepare in the background."""

    def cannot(self, sentence: str) -> None:
        """Says that this feature cannot act on the MODEL: an error, or a feature that does nothing."""
        raise Unserved(sentence)

    def refuses(self, transformer_options: dict[str, Any]) -> str | None:
        """A sentence where another node's patch on the same MODEL would spoil the result."""
        return None


@dataclass
class Run:
    """One sampling run on one guider."""

    features: tuple[Feature, ...]
    clock: Clock
    model: Any  # the BaseModel, which can still wear what another clone set when a run begins
    options: dict[str, Any]  # the guider's transformer_options of this run
    arch: archs.Arch | None
    states: dict[Feature, Any] = field(default_factory=dict)
    seen: dict[Any, int] = field(default_factory=dict)  # stream keys met in this evaluation
    forwards: int = 0  # calls of the diffusion model
    asked: int = 0  # those in which attention came to our dispatcher
    started: float = field(default_factory=time.perf_counter)
    latent_shapes: tuple[tuple[int, ...], ...] = ()  # of several latents that core packs into one row
    sampler: str = ""  # name of the sampler's function, e.g. "sample_euler"
    whole: bool = False  # whether evaluations are asked for in full now: what they compute is kept
    patcher: Any = None  # the MODEL
    device: torch.device | None = None  # that the model runs on
    dtype: torch.dtype | None = None  # that it computes in
    sampling: Any = None  # its model_sampling, with the shift of this MODEL
    compiled: bool = False  # whether object patches of it are compiled
    timeline: Timeline = field(default_factory=Timeline)
    live: Live = field(default_factory=Live)

    @property
    def acting(self) -> tuple[Feature, ...]:
        """The features that can act on this MODEL, now."""
        return tuple(f for f in self.features if not f.inactive and not (self.whole and f.skips))

    @property
    def network(self) -> Any:
        return self.model.diffusion_model if self.patcher is None else self.patcher.get_model_object("diffusion_model")

    @property
    def stochastic(self) -> bool:
        """Whether the sampler is known to add new noise at its steps."""
        return any(word in self.sampler for word in STOCHASTIC)

    def percent_to_sigma(self, percent: float) -> float:
        return float(self.sampling.percent_to_sigma(percent))

    def evaluate(self, sigma: float) -> None:
        """The sampler asks for one prediction."""
        self.clock.tick(sigma)
        self.seen.clear()
        self.live.step(self)


current_forward: ContextVar[Any] = ContextVar("tessera_forward", default=None)


def features_of(model_options: dict[str, Any]) -> tuple[Feature, ...]:
    return model_options.get("transformer_options", {}).get(FEATURES, ())


def attach(model, feature: Feature):
    """A clone of the MODEL that carries one more feature."""
    from . import blocks, compose, forward, memory, reach

    try:
        compose.check(features_of(model.model_options), feature, model)
    except Unserved as sentence:
        if feature.unsupported == "error":
            raise
        log.warning("%s It does nothing on this MODEL.", sentence)
        feature = replace(feature, inactive=str(sentence))
    patched = model.clone()
    options = patched.model_options.setdefault("transformer_options", {})
    options[FEATURES] = (*options.get(FEATURES, ()), feature)
    options.setdefault(LEDGER, Ledger())
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, _outer_sample),
        (WrappersMP.PREPARE_SAMPLING, memory.prepare_sampling),
        (WrappersMP.PREDICT_NOISE, _predict_noise),
        (WrappersMP.APPLY_MODEL, forward.apply_model),
        (WrappersMP.DIFFUSION_MODEL, forward.diffusion_model),
    ):
        patched.remove_wrappers_with_key(kind, WRAPPER_KEY)
        patched.add_wrapper_with_key(kind, WRAPPER_KEY, wrapper)
    blocks.wrap_forwards(patched)
    reach.wrap_attention(patched)
    if not feature.inactive:
        feature.attached(patched)
    return patched


def find_options(args, kwargs) -> dict[str, Any]:
    """The transformer_options of a hooked call, wherever its signature puts it."""
    if isinstance(kwargs.get("transformer_options"), dict):
        return kwargs["transformer_options"]
    for value in reversed(args):
        if isinstance(value, dict) and ("cond_or_uncond" in value or "wrappers" in value):
            return value
    return {}


def replace_options(args, kwargs, options: dict[str, Any]):
    """(args, kwargs) with `options` in place of the transformer_options found there."""
    found = find_options(args, kwargs)
    if "transformer_options" in kwargs:
        return args, {**kwargs, "transformer_options": options}
    return [options if value is found else value for value in args], kwargs


def first_part(latent: Any, shapes: Any) -> Any:
    """The first of several latents (video and audio) that core packs into one row; a single latent as it is."""
    if latent is None or not shapes or len(shapes) < 2:
        return latent
    return comfy.utils.unpack_latents(latent, shapes)[0]


def sampler_name(sampler: Any) -> str:
    """The name of a SAMPLER's function; empty where it has none."""
    function = getattr(sampler, "sampler_function", None)
    return getattr(function, "__name__", "")


class ChoosingFeature(Feature):
    """A feature that decides, when a sampler starts, which others act in that run."""

    def choose(self, executor, features: tuple[Feature, ...], args: Any, kwargs: dict[str, Any]) -> Any:
        """features: all on the MODEL. The latent that the sampler is to get; each run_once is one sampling run."""
        return run_once(executor, features, args, kwargs)[0]


def _outer_sample(executor, *args, **kwargs):
    features = features_of(executor.class_obj.model_options)
    for feature in features:
        if isinstance(feature, ChoosingFeature) and not feature.inactive:
            return feature.choose(executor, features, args, kwargs)
    return run_once(executor, features, args, kwargs)[0]


def run_once(
    executor, features: tuple[Feature, ...], args: Any, kwargs: dict[str, Any], owners: Any = None, told: bool = True
) -> tuple[Any, dict[str, Any]]:
    """(latent, record) of one sampling run with these features. owners: those on the MODEL, where they are others; told:
    whether the canvas and Run Report hear of it."""
    guider = executor.class_obj
    patcher, kept = guider.model_patcher, guider.model_options
    untangle(patcher)
    sigmas = args[3] if len(args) > 3 else kwargs["sigmas"]
    guider.model_options = comfy.model_patcher.create_model_options_clone(kept)
    options = guider.model_options["transformer_options"]
    options[FEATURES] = features
    schedule, sampler = [float(s) for s in sigmas], sampler_name(args[2] if len(args) > 2 else kwargs.get("sampler"))
    clock = Clock(schedule, expected_evaluations(sampler, schedule))
    arch = archs.find(patcher.get_model_object("diffusion_model"))
    run = Run(features, clock, patcher.model, options, arch, sampler=sampler, patcher=patcher)
    run.device, run.dtype = getattr(patcher, "load_device", None), compute_dtype(patcher)
    run.sampling, run.compiled = patcher.get_model_object("model_sampling"), holds_compiled(patcher)
    run.latent_shapes = tuple(tuple(shape) for shape in kwargs.get("latent_shapes") or ())
    options[RUN] = run
    ended, made, record = "error", None, {}
    if told:
        run.live.begin(run)
    try:
        from .compose import check_run

        check_run(run, patcher)
        for feature in features:
            run.states[feature] = feature.begin(run)
        made = executor(*args, **kwargs)
        ended = "finished"
    except BaseException as error:
        ended = "interrupted" if type(error).__name__ == "InterruptProcessingException" else "error"
        raise
    finally:
        guider.model_options = kept
        options.pop(RUN, None)
        try:
            patches, ledger = str(getattr(patcher, "patches_uuid", "")), options.get(LEDGER) if told else None
            record = publish(run, ended, ledger, patches, first_part(made, run.latent_shapes), owners or features, told)
        except Exception:  # a report must not replace the run's own result or error
            log.exception("Tessera: the report of this run could not be written")
        run.states.clear()
        run.options = {}
        run.model = run.patcher = None
    return made, record


def _predict_noise(executor, *args, **kwargs):
    options = executor.class_obj.model_options.get("transformer_options", {})
    model_options = args[2] if len(args) > 2 else kwargs.get("model_options", {})
    run = model_options.get("transformer_options", {}).get(RUN) or options.get(RUN)
    if run is not None:
        run.evaluate(float(torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"]).max()))
    return executor(*args, **kwargs)
