"""A cache in place of the whole model: its prediction is stored and filled in, on any architecture."""

import math
from dataclasses import replace
from typing import Any

import torch

from ..methods.cache.gate import Seen
from .blocks import positions
from .cache import CacheFeature
from .cache_state import CacheState
from .forward import Forward, ModelFeature
from .run import Run


class OutputCache(ModelFeature, CacheFeature):
    """Level output: fills in the model's prediction (velocity or noise, (x - x0) / sigma)."""

    def held_bytes(self, run: Run, noise_shape: tuple[int, ...], conds: dict[str, Any]) -> int:
        return self.held(run, math.prod(noise_shape) * sum(map(len, conds.values())))

    def around_model(self, state: CacheState, forward: Forward, x: torch.Tensor, sigma: torch.Tensor, proceed):
        run = forward.run
        level = sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        owners = list(forward.keys)
        blocks = len(positions(run.arch, forward.diffusion_model)) if run.arch is not None else 1
        rows = x.shape[0] // len(owners)
        asked: list[Seen] = []

        def look(seen: Seen) -> Seen:
            asked.append(replace(seen, before=x[:rows], now=x[:rows]))
            return asked[0]

        full = state.computes(forward, look) | self.held_back(state, forward)
        if not full and state.ready(run, owners):
            state.mark(True)
            state.blocks_skipped += blocks
            velocity = torch.cat([state.predict(run, key) for key in owners])
            return x - level * (velocity + x if self.residual else velocity)
        denoised = proceed()
        state.blocks_computed += blocks
        state.mark(False)
        if not self.off and bool((sigma > 0).all()):
            velocity = (x - denoised) / level
            if asked:
                state.tell(forward, velocity[:rows])
            stored = velocity - x if self.residual else velocity
            for key, part in zip(owners, stored.chunk(len(owners)), strict=True):
                state.store(run, key, part)
        return denoised
