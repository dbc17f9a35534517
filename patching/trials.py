"""Trial runs inside a sampler's own run: the same guider, prompts, noise and schedule, other features."""

import contextlib
import copy
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.utils
import torch

from .. import archs
from ..methods.measure.quality import similarity, ssim
from ..methods.measure.stack_search import Stack, Tried
from .cache import EASYCACHE
from .device_name import device_name
from .run import LEDGER, Feature, features_of, first_part, run_once, sampler_name
from .sampling import synchronize
from .stacks import features_of_stack

log = logging.getLogger("tessera")
NAMES = ("noise", "latent_image", "sampler", "sigmas", "denoise_mask", "callback", "disable_pbar", "seed")
PATIENCE = 1.1  # of the plain run's time: a trial that takes longer is ended, for it cannot win


class Abandoned(Exception):
    """A trial has taken longer than the plain run."""


class Warm(Exception):
    """Enough steps are done to have loaded and compiled everything."""


class Trials:
    """One sampler's job, run with several stacks. What memory.grid_of asks of a Run is here too."""

    def __init__(self, executor, others: tuple[Any, ...], args: Any, kwargs: dict[str, Any], decode: Callable | None,
                 packed: Any):  # fmt: skip
        self.executor, self.others, self.decode, self.packed = executor, others, decode, packed
        self.guider = executor.class_obj
        self.given = {**dict(zip(NAMES, args, strict=False)), **kwargs}
        self.conds = {k: [dict(c) for c in rows] for k, rows in self.guider.conds.items()}
        self.patcher = self.guider.model_patcher
        self.model = self.patcher.model
        network = self.network = self.patcher.get_model_object("diffusion_model")
        self.arch = archs.find(network)
        self.architecture = self.arch.name if self.arch else archs.class_name(network)
        self.sampler = sampler_name(self.given["sampler"])
        self.steps = max(1, len(self.given["sigmas"]) - 1)
        self.latent_shapes = tuple(tuple(s) for s in self.given.get("latent_shapes") or ())
        self.shape = tuple(self.given["noise"].shape)
        self.judged = "picture" if decode else "latent"
        self.device = device_name(self.patcher)
        self.done, self.total, self.reference, self.plain_seconds = 0, 0, None, math.inf
        self.pictures: torch.Tensor | None = None
        self.bar: Any = None
        self.compiled: set[str] = set()
        self.easycache = self._kept()

    def side(self, packed: bool) -> tuple[tuple[Any, ...], Any]:
        """(features, ModelPatcher) of the MODEL that is sampled."""
        if not packed:
            return self.others, self.patcher
        features = features_of(self.packed.model_options)
        return tuple(f for f in features if type(f) is not Feature), self.packed  # not the Meter that wraps it

    def begin(self, total: int) -> None:
        """Before the first of so many trials."""
        self.total = total
        self.bar = comfy.utils.ProgressBar(total * self.steps)

    def plain(self) -> Tried:
        """The run that all others are compared with, after a step that loads the model."""
        self._warm((), 1, False)
        made, seconds, _ = self._run(Stack(), math.inf)
        self.reference, self.plain_seconds = made, seconds
        if not made.isfinite().all():
            raise ValueError(
                "Accelerate: the plain run gives values that are not finite. Mend the graph without it first."
            )
        self.pictures = self._pictured(made) if self.decode else None
        return Tried(Stack(), 1.0, 0.0, seconds)

    def trial(self, stack: Stack) -> Tried:
        """One stack, judged against the plain run."""
        features = features_of_stack(stack.parts, None)
        kinds = {part["method"] for part in stack.parts.values()}
        if self.patcher.load_device.type == "cuda" and not kinds <= self.compiled:
            with self.weights("weights" in stack.parts):
                self._warm(features, min(self.steps, 8), "weights" in stack.parts)
            self.compiled |= kinds
        try:
            made, seconds, facts = self._run(stack, self.plain_seconds * PATIENCE)
        except Abandoned:
            return Tried(stack, 1 / PATIENCE, 1.0, self.plain_seconds * PATIENCE, {"abandoned": True})
        return Tried(stack, self.plain_seconds / seconds, self._loss(made), seconds, facts)

    def seconds_of(self, stack: Stack) -> float:
        """Of one more run."""
        try:
            return self._run(stack, self.plain_seconds * 2)[1]
        except Abandoned:
            return self.plain_seconds * 2

    def _loss(self, made: torch.Tensor) -> float:
        if not made.isfinite().all():
            return 1.0
        if self.decode is None:
            return 1.0 - similarity(self.reference, made)
        return min(1.0, max(0.0, 1.0 - ssim(self.pictures, self._pictured(made))))

    def _pictured(self, made: torch.Tensor) -> torch.Tensor:
        with same_noise(self.patcher.load_device):  # some VAEs add noise
            return self.decode(made).float().cpu().clamp(0, 1)  # type: ignore[misc]

    @contextlib.contextmanager
    def weights(self, packed: bool) -> Iterator[None]:
        """Within it the guider samples the packed MODEL, if asked to."""
        if not packed:
            yield
            return
        guider, kept = self.guider, (self.guider.model_patcher, self.guider.model_options)
        if any(cond.get("hooks") is not None for rows in self.conds.values() for cond in rows):
            raise ValueError("Accelerate cannot swap weights under prompts with hooks. Disconnect packed_model.")
        guider.model_patcher = self.packed
        guider.model_options = comfy.model_patcher.create_model_options_clone(self.packed.model_options)
        guider.model_options["transformer_options"][LEDGER] = kept[1]["transformer_options"].get(LEDGER)
        # core does this before our wrapper, and only for the MODEL that the guider came with: without it no wrapper acts
        comfy.sampler_helpers.prepare_model_patcher(self.packed, {}, guider.model_options)
        try:
            yield
        finally:
            guider.model_patcher, guider.model_options = kept

    def _run(self, stack: Stack, most: float) -> tuple[torch.Tensor, float, dict[str, Any]]:
        """(latent on the CPU, seconds, facts). Abandoned where it takes longer than `most` seconds."""
        self.done += 1
        before = (self.done - 1) * self.steps
        synchronize(self.patcher.load_device)
        start = time.perf_counter()

        def step(number, *rest):
            comfy.model_management.throw_exception_if_processing_interrupted()
            self.bar.update_absolute(before + number + 1)
            if time.perf_counter() - start > most:
                raise Abandoned

        with self.weights("weights" in stack.parts):
            made, record = self._once(features_of_stack(stack.parts, None), step, "weights" in stack.parts)
        synchronize(self.patcher.load_device)
        seconds = time.perf_counter() - start
        return first_part(made, self.latent_shapes).detach().float().cpu(), seconds, summary(record)

    def _warm(self, features: tuple[Any, ...], steps: int, packed: bool) -> None:
        def stop(number, *rest):
            comfy.model_management.throw_exception_if_processing_interrupted()
            if number + 1 >= steps:
                raise Warm

        with contextlib.suppress(Warm):
            self._once(features, stop, packed)

    def _kept(self) -> tuple[Any, dict[str, Any]]:
        """(core's EasyCache, if there is one, and what it holds)."""
        held = self.guider.model_options.get("transformer_options", {}).get(EASYCACHE)
        return held, {name: copy.copy(value) for name, value in vars(held).items()} if held is not None else {}

    def _renew(self) -> None:
        """As it was before the trials: core makes a new one for each sampler, around all of our runs."""
        held, state = self.easycache
        if held is not None:
            vars(held).update({name: copy.copy(value) for name, value in state.items()})

    def _once(self, features: tuple[Any, ...], callback: Callable, packed: bool) -> tuple[Any, dict[str, Any]]:
        """A run that nothing outside hears of, on copies of what samplers and conditions write into."""
        self.guider.conds = {k: [dict(c) for c in rows] for k, rows in self.conds.items()}
        given = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in self.given.items()}
        given.update(callback=callback, disable_pbar=True)
        args = tuple(given.pop(name, None) for name in NAMES)
        others, _ = self.side(packed)
        try:
            with same_noise(self.patcher.load_device), quiet():
                return run_once(self.executor, (*others, *features), args, given, told=False)
        finally:
            self.guider.conds = {k: [dict(c) for c in rows] for k, rows in self.conds.items()}
            self._renew()


@contextlib.contextmanager
def same_noise(device: torch.device) -> Iterator[None]:
    """What is drawn from torch's own generators within it, by samplers that take no seed, is drawn again afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What the features warn of is told once, by the run that follows the trials."""
    mine = threading.get_ident()

    def elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != mine

    log.addFilter(elsewhere)
    try:
        yield
    finally:
        log.removeFilter(elsewhere)


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """Of a trial's record what a point of the chart tells."""
    facts = [f["facts"] for f in record.get("features", ())]
    pairs = [f for f in facts if f.get("dense_pairs")]
    told: dict[str, Any] = {"blocks_skipped": sum(f.get("blocks_skipped", 0) for f in facts)}
    if pairs:
        told["pairs_fraction"] = round(sum(f["pairs"] for f in pairs) / sum(f["dense_pairs"] for f in pairs), 4)
    return told
