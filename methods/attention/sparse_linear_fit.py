"""The projection of Sparse-Linear Attention in closed form, per transformer block:

    W, b = argmin sum |O_dense - O_s - O_l W^T - b|^2 + ridge |W|^2

over the image rows of captured calls. Only the normal equations are kept, fp64: (D + 1)^2 + (D + 1) D numbers a block,
however many rows went in. On them the error is never above that of W = 0."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from .call import Answer, AttentionCall, Decline
from .sparse_linear import SparseLinear, State, ordered, select

ROWS = 1 << 15  # captured rows turned into fp64 at once


@dataclass
class Normal:
    """The normal equations of one block, fp64 on the CPU; X = [O_l, 1], R = O_dense - O_s."""

    gram: torch.Tensor  # [D + 1, D + 1], X^T X
    cross: torch.Tensor  # [D + 1, D], X^T R
    left: float = 0.0  # sum R^2
    dense: float = 0.0  # sum O_dense^2
    rows: int = 0
    calls: int = 0

    @classmethod
    def empty(cls, d: int) -> "Normal":
        return cls(torch.zeros(d + 1, d + 1, dtype=torch.float64), torch.zeros(d + 1, d, dtype=torch.float64))

    def add(self, linear: torch.Tensor, sparse: torch.Tensor, dense: torch.Tensor) -> None:
        """One call, each [B, H, N, D]; in fp64 on its device, on the CPU where the device has none."""
        d = linear.shape[-1]
        gram, cross = torch.zeros_like(self.gram), torch.zeros_like(self.cross)
        sums = torch.zeros(2, dtype=torch.float64)
        at = torch.device("cpu") if linear.device.type == "mps" else linear.device
        gram, cross, sums = (x.to(at) for x in (gram, cross, sums))
        rows = [x.reshape(-1, d) for x in (linear, sparse, dense)]
        for start in range(0, len(rows[0]), ROWS):
            x, s, o = (t[start : start + ROWS].to(at).double() for t in rows)
            x, r = F.pad(x, (0, 1), value=1.0), o - s
            gram += x.T @ x
            cross += x.T @ r
            sums += torch.stack([r.square().sum(), o.square().sum()])
        self.gram += gram.cpu()
        self.cross += cross.cpu()
        left, whole = sums.tolist()
        self.left, self.dense = self.left + left, self.dense + whole
        self.rows, self.calls = self.rows + len(rows[0]), self.calls + 1

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(W [D, D], b [D]) fp64. ridge: relative to the mean square of O_l's features; the bias is free."""
        d = self.cross.shape[1]
        scale = self.gram.diagonal()[:d].mean().clamp_min(1e-300)
        penalty = torch.full((d + 1,), float(ridge * scale), dtype=torch.float64)
        penalty[d] = 0.0
        found = torch.linalg.lstsq(self.gram + penalty.diag(), self.cross, driver="gelsd").solution
        return found[:d].T.contiguous(), found[d].contiguous()

    def error(self, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None) -> float:
        """|O_dense - O| / |O_dense| over the captured rows, without a projection and with one."""
        left = self.left
        if weight is not None and bias is not None:
            w = torch.cat([weight.T, bias[None]]).double()
            left += float((w * (self.gram @ w)).sum() - 2 * (w * self.cross).sum())
        return (max(left, 0.0) / self.dense) ** 0.5 if self.dense else 0.0


@dataclass(frozen=True, eq=False)
class Recorder:
    """A method that answers with dense attention, and adds what Sparse-Linear Attention would have given to `kept`.
    steps: captured steps of the run; None: all."""

    method: SparseLinear
    steps: frozenset[int] | None = None
    kept: dict[int, Normal] = field(default_factory=dict)  # by block number; belongs to one calibration
    spatial = SparseLinear.spatial

    def begin(self) -> State:
        self.kept.clear()
        return self.method.begin()

    def attend(self, state: State, call: AttentionCall) -> Answer:
        run = call.forward.run
        if self.steps is not None and run.clock.step not in self.steps:
            raise Decline("not a captured step")
        plan, method = self.method.plan(state, call), self.method
        bias = call.served_bias()
        mask = None if bias is None else bias[:, None, None, :].to(call.q.dtype)
        grouped = call.q.shape[1] != call.k.shape[1]
        out = F.scaled_dot_product_attention(call.q, call.k, call.v, mask, scale=call.scale, enable_gqa=grouped)
        rows = ordered(plan, call, bias)
        blocks = select(plan, rows.q, rows.k, method.keep_own, method.asks)
        sparse, linear = method.sparse(plan, rows, blocks, call.scale), method.linear(plan, rows, blocks)
        dense = out[:, :, : plan.image] if plan.order is None else out.index_select(2, plan.order[: plan.image])
        number = call.block.number
        if number not in self.kept:
            self.kept[number] = Normal.empty(call.q.shape[3])
        elif len(self.kept[number].cross) != call.q.shape[3] + 1:
            raise Decline("this block's calls have heads of several sizes")
        self.kept[number].add(linear, sparse, dense)
        pairs = float(call.q.shape[0] * call.q.shape[1] * plan.layout.total**2)
        return Answer(out, pairs, pairs)

    def fitted(self, ridge: float) -> tuple[dict[int, tuple[torch.Tensor, torch.Tensor]], list[dict[str, Any]]]:
        """Projections by block number, and per block the relative errors of the attention output."""
        blocks, told = {}, []
        for number in sorted(self.kept):
            normal = self.kept[number]
            weight, bias = blocks[number] = normal.solve(ridge)
            before, after = normal.error(), normal.error(weight, bias)
            told.append({"block": number, "calls": normal.calls, "rows": normal.rows,
                         "before": round(before, 6), "after": round(after, 6)})  # fmt: skip
        return blocks, told
