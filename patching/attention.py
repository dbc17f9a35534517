"""The attention dispatcher. Nodes add plans; for every attention call of the diffusion model the newest plan that
applies answers or declines with a reason, then the next one, then the override that another pack installed (before or
after us), at last the dense backend."""

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..methods.attention.call import Answer, AttentionCall, AttentionMethod, Decline
from . import extra_keys, prewarm, rivals
from .attention_around import around, arounds, block_of, keepers, options_of, stack_of, with_keys, with_past
from .blocks import eager, positions
from .convention import unpack
from .memory import grid_of, stream_elements
from .pictures import Drawing, Sketch
from .run import Feature
from .sizes import heads_of
from .timeline import BlockRows
from .work import Work, advice, saving

OVERRIDE = "optimized_attention_override"


@dataclass
class PlanState:
    """What a plan did in one run."""

    method: Any  # what the method keeps for the run, e.g. index lists by token layout
    served: int = 0
    declined: Counter = field(default_factory=Counter)
    pairs: float = 0.0  # query-key pairs computed by served calls, summed over heads and batch rows
    dense_pairs: float = 0.0  # what dense attention would have computed in the same calls
    work: Work = field(default_factory=Work)
    drawing: Drawing = field(default_factory=Drawing)
    rows: BlockRows = field(default_factory=BlockRows)

    def add(self, call: AttentionCall, answer: Answer) -> None:
        self.served += 1
        self.pairs += answer.pairs
        self.dense_pairs += answer.dense_pairs
        self.drawing.see(call, answer)
        self.rows.share(call.forward.run.clock.evaluation, call.block, answer.pairs, answer.dense_pairs)

    def facts(self) -> dict[str, Any]:
        calls = self.served + sum(self.declined.values())
        return {
            "calls": calls,
            "served": self.served,
            "declined": dict(self.declined),
            "pairs": self.pairs,
            "dense_pairs": self.dense_pairs,
            "pairs_fraction": round(self.pairs / self.dense_pairs, 6) if self.dense_pairs else 1.0,
            **self.work.facts(),
        }


@dataclass(frozen=True, eq=False)
class AttentionFeature(Feature):
    """A plan: a method, and the calls that it is offered."""

    method: AttentionMethod | None = None
    blocks: frozenset[int] | None = None  # numbers in the residual stack; None: all
    sigma_percent: tuple[float, float] = (0.0, 1.0)
    min_tokens: int = 4096
    dense_steps: tuple[int, int] = (0, 0)  # at the start and at the end of the run
    dense_blocks: tuple[int, int] = (0, 0)  # at the start and at the end of the stack
    scope: str = "all"  # or the kind of calls, "self" or "joint"

    def attached(self, model) -> None:
        prewarm.start(self.method, model)

    def begin(self, run) -> PlanState:
        return PlanState(self.method.begin())

    def check_arch(self, arch, class_name: str) -> None:
        if arch is None:
            self.cannot(f"{self.name} does not know the token layout of {class_name}.")
        elif "attention" in arch.limits:
            self.cannot(f"{self.name} cannot act here: {arch.limits['attention']}")
        elif arch.unordered and self.method.spatial:
            self.cannot(f"{self.name} cannot act here: the tokens of {arch.name} are a set without places.")
        elif not (arch.override or arch.reached):
            self.cannot(
                f"{self.name} cannot reach the attention of {arch.name}, which does not call ComfyUI's override."
            )

    def check_model(self, arch, diffusion_model) -> None:
        if arch is None:
            return
        stack = positions(arch, diffusion_model)
        count = len(stack)
        beyond = sorted(n for n in self.blocks or () if n >= count)
        if beyond:
            raise ValueError(
                f"blocks: this {arch.name} has blocks 0 to {count - 1}, there is no block {beyond[0]}. Name blocks that it has."
            )
        if count and sum(self.dense_blocks) >= count:
            first, last = self.dense_blocks
            raise ValueError(
                f"dense_first_blocks {first} and dense_last_blocks {last} leave none of the {count} blocks of this "
                f"{arch.name} to {self.name}. Lower them."
            )
        if count and not self._chosen(count):
            raise ValueError(
                f"blocks: all that are named are among the dense first {self.dense_blocks[0]} or last "
                f"{self.dense_blocks[1]}, which leaves none to {self.name}. Name others or lower these."
            )
        check = getattr(self.method, "check", None)
        if check is not None:
            check(arch, stack, self._chosen(count))

    def _chosen(self, count: int) -> set[int]:
        """Of so many blocks those that are offered to the method."""
        stack = range(self.dense_blocks[0], count - self.dense_blocks[1])
        return {number for number in stack if self.blocks is None or number in self.blocks}

    def held_bytes(self, run, noise_shape: tuple[int, ...], conds: dict[str, Any]) -> int:
        """What a method that remembers keeps in the blocks that it serves."""
        held = getattr(self.method, "held_bytes", None)
        grid = grid_of(run, noise_shape) if held is not None and run.arch is not None else None
        if held is None or (grid is not None and math.prod(grid) < self.min_tokens):
            return 0
        model = run.network
        blocks = len(self._chosen(len(positions(run.arch, model))))
        series = run.clock.evaluations_a_step if run.clock.returns else 1
        elements = stream_elements(run, noise_shape, conds)
        return blocks * series * held(elements, heads_of(model)[1], run.dtype)

    def facts(self, state: PlanState) -> dict[str, Any]:
        own = getattr(self.method, "facts", None)
        return state.facts() if own is None else {**state.facts(), **own(state.method)}

    def sketch(self, state: PlanState, steps: int) -> Sketch | None:
        return state.drawing.sketch(steps)

    def by_block(self, state: PlanState) -> list[str]:
        return state.rows.words(0, 1 + max(state.rows.rows, default=-1))

    def bypassed(self, run, facts: dict[str, Any]) -> str:
        return "" if self.inactive or facts.get("calls", 1) else rivals.sentence(run, self)

    def line(self, facts: dict[str, Any]) -> str:
        if self.inactive:
            return self.inactive
        if not facts or not facts["calls"]:
            return (facts or {}).get("bypassed") or "no image self-attention reached this node"
        declined = "".join(f"; {n} declined: {why}" for why, n in facts["declined"].items())
        own = getattr(self.method, "line", None)
        told = f"; {own(facts)}" if own is not None and facts["served"] else ""
        served = f"served {facts['served']} of {facts['calls']} calls, {facts['pairs_fraction']:.1%} of pairs"
        saved = f", {saving(facts)}" if facts["served"] else ""
        hint = advice(facts)
        return f"{served}{saved}{told}{declined}{f'; {hint}' if hint else ''}"

    def reason_to_decline(self, call: AttentionCall) -> str | None:
        run = call.forward.run
        start, end = (run.percent_to_sigma(p) for p in self.sigma_percent)
        if not end < run.clock.sigma <= start:  # a window of no width is none
            return "outside the chosen steps"
        if not self.dense_steps[0] <= run.clock.step < run.clock.steps - self.dense_steps[1]:
            return "outside the chosen steps"
        number, count = call.block.number, call.block.count
        if not self.dense_blocks[0] <= number < count - self.dense_blocks[1]:
            return "outside the chosen blocks"
        if self.blocks is not None and number not in self.blocks:
            return "outside the chosen blocks"
        if self.scope not in ("all", call.kind):
            return "outside the chosen scope"
        if call.layout is None:
            return "token layout unknown"
        tokens = call.layout.image.stop - call.layout.image.start
        return f"fewer than {self.min_tokens} image tokens" if tokens < self.min_tokens else None


def _plans(forward) -> list[AttentionFeature]:
    return [f for f in reversed(forward.run.acting) if isinstance(f, AttentionFeature)]


def install(forward, options: dict[str, Any]) -> None:
    """Puts the dispatcher into this call's options; what it finds there becomes the fallback."""
    plans, arch = _plans(forward), forward.run.arch
    more_keys = any(feature.adds_keys for feature in forward.run.acting)
    if not (plans or arounds(forward) or keepers(forward) or more_keys) or arch is None:
        return
    if arch.override:
        forward.override = options[OVERRIDE] = eager(_hook(forward, plans, options.get(OVERRIDE)), options)
        if arch.rotates and any(getattr(plan.method, "wants_rotation", False) for plan in plans):
            patches = options.get("patches", {})
            options["patches"] = {**patches, "attn1_patch": [*patches.get("attn1_patch", ()), _rotation(forward)]}
    elif arch.reached:
        forward.dispatch = eager(_hook(forward, plans, None), options)


def above(forward, options: dict[str, Any]) -> dict[str, Any]:
    """The options with the dispatcher on top of an override that another pack's wrapper has set in this call."""
    theirs = options.get(OVERRIDE)
    if forward.override is None or theirs is forward.override:
        return options
    forward.override = eager(_hook(forward, _plans(forward), theirs), options)
    return {**options, OVERRIDE: forward.override}


def _rotation(forward):
    def record(*args, pe=None, **kwargs):
        forward.rotation = pe
        return {}

    return record


def _hook(forward, plans: list[AttentionFeature], earlier: Callable | None):
    """The dispatcher, and in front of it what may answer before any plan."""
    hook = with_past(forward, _dispatcher(forward, plans, earlier))
    for feature in arounds(forward):
        hook = around(forward, feature, hook)
    for keeper in keepers(forward):
        hook = with_keys(forward, keeper, hook)
    return hook


def _dispatcher(forward, plans: list[AttentionFeature], earlier: Callable | None):
    stack = stack_of(forward)

    def dispatch(func, *args, **kwargs):
        rest = functools.partial(_rest, forward, earlier, func, *args, **kwargs)
        forward.asked = True
        if forward.passed_on:  # the other pack's override asks in its turn what it found: us
            return rest()
        if kwargs.get("low_precision_attention") is False and block_of(forward, stack, options_of(kwargs)) is not None:
            for plan in plans:
                forward.run.states[plan].declined["the model asks for exact attention"] += 1
            return rest()
        call, pack = _describe(forward, stack, args, kwargs)
        if call is None or call.kind not in ("self", "joint"):
            return rest()
        queries = call.q.shape[2]
        if extra_keys.biases(forward, call):
            quick, call = extra_keys.served(forward, call, pack, earlier), extra_keys.biased(forward, call)
            args, kwargs = extra_keys.with_mask(args, kwargs, call.mask)
            dense = functools.partial(_rest, forward, earlier, func, *args, **kwargs)
            rest = quick or dense
        call = extra_keys.widened(call) if plans else call
        for plan in plans:
            state = forward.run.states[plan]
            state.work.offered(call)
            reason = plan.reason_to_decline(call)
            if reason is None:
                typical = getattr(plan.method, "typical", None)
                try:
                    answer = state.work.timed(
                        functools.partial(plan.method.attend, state.method, call),
                        functools.partial(func, *args, **kwargs),
                        call.q.device,
                        typical is None or typical(state.method, call),
                    )
                except Decline as decline:
                    reason = str(decline)
                else:
                    state.add(call, answer)
                    state.work.spared(call, answer)
                    return pack(extra_keys.own(call, answer.out, queries))
            state.declined[reason] += 1
        return rest()

    return dispatch


def _rest(forward, earlier: Callable | None, func, *args, **kwargs):
    """What a call gets that no plan answers."""
    if earlier is None:
        return func(*args, **kwargs)
    before, forward.passed_on = forward.passed_on, True
    try:
        return earlier(func, *args, **kwargs)
    finally:
        forward.passed_on = before


def _describe(forward, stack, args, kwargs):
    """(AttentionCall, function that packs [B, H, N, D] as the caller expects), or (None, None) for calls outside the
    residual stack."""
    block = block_of(forward, stack, options_of(kwargs))
    if block is None:
        return None, None
    nth = forward.calls.get(block.number, 0)
    forward.calls[block.number] = nth + 1
    kinds = block.spec.calls
    kind = kinds[nth % len(kinds)] if kinds else "other"
    q, k, v, mask, pack = unpack(args, kwargs)
    layout = extra_keys.layout(forward, kind, q.shape[2], k.shape[2], _references(kwargs) + forward.appended)
    scale = q.shape[-1] ** -0.5 if kwargs.get("scale") is None else float(kwargs["scale"])
    return AttentionCall(q, k, v, mask, scale, kind, layout, block, forward), pack


def _references(kwargs) -> int:
    return sum(options_of(kwargs).get("reference_image_num_tokens") or ())
