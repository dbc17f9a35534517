"""RF-Edit's shared features: recorded at the attention calls of an inversion, put back at those of an edit."""

from dataclasses import dataclass, field
from typing import Any

import torch
from comfy_api.latest import io

from .. import archs
from ..methods.sampling.feature_bank import Bank, mixed
from .attention_around import AroundAttention, KeyFeature
from .blocks import BlockFeature, BlockPosition, positions
from .dynamic_grain import DynamicGrain
from .extra_keys import layout
from .forward import Forward, StreamKey
from .region import RegionFeature
from .run import Feature, Run
from .tiles import TileFeature
from .widgets import parse_blocks

BankSocket = io.Custom("TESSERA_RF_BANK")
LAST_THIRD = "last third"
POSITIVE = 0  # role of a stream


def blocks_of(model, text: str) -> frozenset[int]:
    """Block numbers of "last third", as in the paper's code (single blocks 20 to 37 of FLUX.1), "all" or "2-18,25"."""
    diffusion_model = model.get_model_object("diffusion_model")
    arch = archs.find(diffusion_model)
    count = len(positions(arch, diffusion_model)) if arch is not None else 0
    if text.strip().lower() == LAST_THIRD:
        return frozenset(range(count - max(1, count // 3), count))
    chosen = parse_blocks(text)
    return frozenset(range(count)) if chosen is None else chosen


@dataclass(frozen=True, eq=False)
class SharingFeature(BlockFeature, KeyFeature, AroundAttention):
    """What both sides share: which calls they mean. blocks: numbers in the stack."""

    blocks: frozenset[int] = frozenset()
    bank: Bank = field(default_factory=lambda: Bank((), 0))

    def check_arch(self, arch, class_name: str) -> None:
        if arch is None:
            self.cannot(f"{self.name} does not know the attention of {class_name}.")
        elif "attention" in arch.limits:
            self.cannot(f"{self.name} cannot act here: {arch.limits['attention']}")
        elif not (arch.override or arch.reached):
            self.cannot(
                f"{self.name} cannot reach the attention of {arch.name}, which does not call ComfyUI's override."
            )

    def check_model(self, arch, diffusion_model) -> None:
        count = len(positions(arch, diffusion_model)) if arch is not None else 0
        beyond = sorted(n for n in self.blocks if n >= count)
        if beyond and arch is not None:
            raise ValueError(
                f"blocks: this {arch.name} has blocks 0 to {count - 1}, there is no block {beyond[0]}. Name blocks that it has."
            )

    def conflicts(self, other: Feature) -> str | None:
        if isinstance(other, SharingFeature):
            return f"{self.name} is on this MODEL already, or one that shares features with it. Remove one of the two."
        if isinstance(other, RegionFeature | DynamicGrain | TileFeature):
            return (
                f"{self.name} shares features of all the picture's tokens, and {other.name} gives the MODEL some of them. "
                "Use one of them."
            )
        return None

    def means(self, block: BlockPosition, nth: int) -> bool:
        kinds = block.spec.calls
        return block.number in self.blocks and bool(kinds) and kinds[nth % len(kinds)] in ("self", "joint")


@dataclass(frozen=True, eq=False)
class RecordFeature(SharingFeature):
    """Copies what the bank wants; the picture is not changed."""

    name: str = "RF Invert"

    def around_keys(self, state: Any, forward: Forward, q, k, v, mask):
        nth = forward.calls.get(forward.block.number, 0)
        if self.bank.what != "attn_out" and self._at(forward, nth):
            held = {"v": (v,), "k": (k,), "kv": (k, v)}[self.bank.what]
            self._keep(forward, nth, held, q.shape[2], k.shape[2])
        return None

    def around_call(self, state: Any, forward: Forward, block: BlockPosition, nth: int, q, proceed):
        out = proceed()
        if self.bank.what == "attn_out" and self.means(block, nth) and self.bank.wants(forward.run.clock.sigma):
            tokens = out.shape[1 if out.ndim == 3 else 2]
            self._keep(forward, nth, (out,), tokens, tokens)
        return out

    def _at(self, forward: Forward, nth: int) -> bool:
        return self.means(forward.block, nth) and self.bank.wants(forward.run.clock.sigma)

    def _keep(self, forward: Forward, nth: int, tensors, queries: int, keys: int) -> None:
        rows = [i for i, key in enumerate(forward.keys) if key.role == POSITIVE]
        if not rows:
            return
        if len(rows) > 1 or forward.keys[rows[0]].window or forward.keys[rows[0]].occurrence:
            raise ValueError(
                "RF Invert records one positive prompt over the whole picture; this run has several, or context windows. Use "
                "one prompt, or set record_steps to 0."
            )
        block, clock, count = forward.block, forward.run.clock, len(forward.keys)
        found = layout(forward, block.spec.calls[nth % len(block.spec.calls)], queries, keys, 0)
        self.bank.images[block.number] = found.image if found is not None else None
        self.bank.grid = forward.grid
        self.bank.keep((block.number, nth), clock.sigma, tuple(t.chunk(count)[rows[0]] for t in tensors))


@dataclass
class Shared:
    """What one run put back. first: its first step among those of the bank's schedule."""

    first: int = 0
    calls: int = 0
    steps: set[int] = field(default_factory=set)


@dataclass(frozen=True, eq=False)
class EditFeature(SharingFeature):
    """Gives the first steps the features of the source. tokens: "all", text too, or "image"."""

    name: str = "RF Edit"
    inject_steps: int = 4
    strength: float = 1.0
    tokens: str = "all"
    prompts: str = "both"

    def begin(self, run: Run) -> Shared:
        """A run may also be a part of the schedule: two samplers in turn share what one would."""
        n, mine, its = self.inject_steps, run.clock.sigmas, self.bank.sigmas
        first = next((i for i, sigma in enumerate(its[:-1]) if mine and abs(sigma - mine[0]) <= 1e-4), -1)
        same = first >= 0 and all(abs(a - b) <= 1e-4 for a, b in zip(mine, its[first : n + 1], strict=False))
        if self.shares and not same:
            raise ValueError(
                f"RF Edit shares features sigma by sigma, and this run's schedule {_told(mine, n)} is not that of RF Invert, "
                f"{_told(its, n)}. Give both the same sigmas."
            )
        return Shared(first)

    def check_model(self, arch, diffusion_model) -> None:
        count = len(positions(arch, diffusion_model)) if arch is not None else 0
        if arch is not None and max(self.blocks, default=-1) >= count:
            raise ValueError(
                f"RF Edit has features of block {max(self.blocks)}, and this {arch.name} has blocks 0 to {count - 1}. Use the model "
                "that RF Invert used."
            )

    @property
    def shares(self) -> bool:
        return self.inject_steps > 0 and self.strength > 0

    def around_keys(self, state: Shared, forward: Forward, q, k, v, mask):
        nth = forward.calls.get(forward.block.number, 0)
        what = self.bank.what
        found = self._found(state, forward, forward.block, nth, v) if what != "attn_out" else None
        if found is None:
            return None
        names = {"v": ("v",), "k": ("k",), "kv": ("k", "v")}[what]
        given = {"k": k, "v": v}
        for name, other in zip(names, found, strict=True):
            given[name] = self._mixed(forward, given[name], other, 2)
        state.calls += 1
        state.steps.add(forward.run.clock.step)
        return given["k"], given["v"], mask

    def around_call(self, state: Shared, forward: Forward, block: BlockPosition, nth: int, q, proceed):
        found = self._found(state, forward, block, nth, q) if self.bank.what == "attn_out" else None
        out = proceed()
        if found is None:
            return out
        state.calls += 1
        state.steps.add(forward.run.clock.step)
        return self._mixed(forward, out, found[0], 1 if out.ndim == 3 else 2)

    def _found(self, state: Shared, forward: Forward, block: BlockPosition, nth: int, like: torch.Tensor):
        if not self.shares or state.first + forward.run.clock.step >= self.inject_steps or not self.means(block, nth):
            return None
        return self.bank.find((block.number, nth), forward.run.clock.sigma, like)

    def _chosen(self, key: StreamKey) -> bool:
        return self.prompts == "both" or key.role == POSITIVE

    def _mixed(self, forward: Forward, own: torch.Tensor, other: torch.Tensor, dim: int) -> torch.Tensor:
        rows = forward.rows(own)
        if rows is None or other.shape[0] not in (1, rows[0].shape[0]):
            raise ValueError(
                f"RF Edit has features of {other.shape[0]} latents, and {own.shape[0]} rows of {len(forward.keys)} prompts are "
                "sampled. Invert one latent, or as many as are edited."
            )
        image, block = self.bank.images.get(forward.block.number), forward.block
        if own.shape[1:] != other.shape[1:]:
            raise ValueError(
                f"RF Edit: block {block.number} has {own.shape[dim]} tokens here and had {other.shape[dim]} in RF Invert. Use the "
                "same model, the same size of latent and prompts of the same length, and nodes that change tokens in both runs or "
                "in neither."
            )
        if None not in (forward.grid, self.bank.grid) and forward.grid != self.bank.grid:  # as many tokens, elsewhere
            raise ValueError(
                f"RF Edit: this latent has {_by(forward.grid)} tokens, and that of RF Invert had {_by(self.bank.grid)}. Use the same "
                "size of latent."
            )
        if self.tokens == "image" and image is None:
            raise ValueError("RF Edit does not know which tokens of this model are the image's. Set tokens to all.")
        place = image if self.tokens == "image" else None
        return torch.cat(
            [
                mixed(mine, other, self.strength, dim, place) if self._chosen(key) else mine
                for key, mine in zip(forward.keys, rows, strict=True)
            ]
        )

    def facts(self, state: Shared) -> dict[str, Any]:
        return {"calls": state.calls, "steps": len(state.steps), "what": self.bank.what}

    def line(self, facts: dict[str, Any]) -> str:
        if self.inactive or not facts:
            return self.inactive
        return f"{facts['what']} of the source in {facts['calls']} attention calls, in {facts['steps']} steps"


def _by(grid: tuple[int, ...] | None) -> str:
    return " x ".join(map(str, grid or ()))


def _told(sigmas, n: int) -> str:
    return f"({', '.join(f'{s:.4g}' for s in list(sigmas)[: min(n + 1, 4)])}, ..; {max(len(sigmas) - 1, 0)} steps)"
