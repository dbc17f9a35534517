"""First Block Cache (ParaAttention, WaveSpeed) and DBCache (cache-dit): what the first blocks add tells what all will add.

r is the output of the first blocks minus their input. Where it differs from that of the last computed evaluation by less
than the threshold, relative in L1, the rest of the stack is skipped.
"""

import torch

from ...kernels.cache.relative_l1 import relative_l1
from .gate import Gate, Seen


class FirstBlocks(Gate):
    def __init__(self, threshold: float):
        self.threshold = threshold
        self._computed: torch.Tensor | None = None  # r of the last computed evaluation

    def computes(self, seen: Seen, forced: bool) -> bool:
        assert seen.before is not None and seen.now is not None
        if seen.before.shape != seen.now.shape:
            raise ValueError(
                f"The first blocks turn {[*seen.before.shape]} into {[*seen.now.shape]}, so what they add cannot be told. "
                "Use policy TeaCache, MagCache, EasyCache or FORA."
            )
        added, last = seen.now - seen.before, self._computed
        full = forced
        if last is None or last.shape != added.shape or last.dtype != added.dtype:
            full = True
        else:
            self.error = float(relative_l1(added, last))
            full = full or not self.error < self.threshold
        if full:
            self._computed = added
        return full
