"""What a block sampler keeps of finished blocks, whatever its kind: keys and values, running sums, or the frames alone."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch

CURRENT = "tessera_block"  # of transformer_options: the Block whose frames the network is given
Slot = tuple[int, int]  # role (0 positive, 1 negative, as in cond_or_uncond) and number of the condition in it


@dataclass
class Block:
    """What the network is asked for."""

    number: int
    first: int  # frame
    last: int  # not included
    frames: int  # of the whole clip
    boundaries: list[int]
    commit: bool = False  # the pass over the finished block, whose state is to be kept
    slots: dict[tuple[int, Any], Slot] = field(default_factory=dict)  # by role and uuid of a condition
    prefix: list[int] = field(default_factory=list)  # finished frames that stand in the sequence, before the block's

    def rows(self, options: dict[str, Any]) -> list[Slot]:
        """Whose rows a call of the network carries, one slot for each equal chunk of its batch. The slot of a prompt is
        its place among the prompts, so that another prompt in a later block goes on with its state."""
        roles = options.get("cond_or_uncond") or [0]
        uuids = options.get("uuids") or [None] * len(roles)
        return [self.slots.get((role, uuid), (role, 0)) for role, uuid in zip(roles, uuids, strict=True)]


class BlockMemory(ABC):
    """The state of one run.

    commits: whether a finished block is passed through the network once more, at the noise level of the context, for its
    state; the memory stores in that pass (Block.commit) and reads in all others."""

    commits: bool = True
    lead: int = 0  # frames that the first block has more than the others

    def prefix(self, boundaries: list[int], first: int) -> list[int]:
        """Finished frames that stay in the sequence before a block that starts at `first`; most memories need none."""
        return []

    @abstractmethod
    def open(self, options: dict[str, Any], block: Block) -> None:
        """Before the first evaluation of a block, and before its commit pass: prepares the run's own transformer_options,
        in which CURRENT is that Block. What it sets must serve every evaluation until the next call."""

    @abstractmethod
    def finished(self, block: Block) -> None:
        """After a block's commit pass: the place to drop what the next block does not look back on."""

    @abstractmethod
    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What continuing needs: copies on the CPU, and facts for JSON by which `restore` knows them."""

    @abstractmethod
    def restore(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any], device: torch.device) -> None:
        """Takes over a state. ValueError, one sentence, where it is another model's or another setting's."""

    @abstractmethod
    def held_bytes(self) -> int:
        """Bytes held now."""
