"""LinFusion (arXiv 2409.02097): the self-attention of a Stable Diffusion UNet with linear cost, trained by distillation.

    q = to_q(x + f_q(x))    k = to_k(c + f_k(c))    v = to_v(c)    f = Linear, LayerNorm, LeakyReLU, Linear
    out = to_out(phi(q) S / (phi(q) z + 1e-4)),  S = mean_j phi(k_j)^T v_j,  z = mean_j phi(k_j),  phi = elu + 1

The official files are a config.json with `modules_list`, of module_name, dim_n, heads and projection_mid_dim (null: dim_n;
-1: f is the identity, which doubles x), and a safetensors file with keys INDEX.to_q.weight, INDEX.to_q_.0.weight and so on, INDEX that of the module
in the list; module_name is the path in diffusers' UNet.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch

from ...kernels.linear.linear_attention import linear_attention

EPS = 1e-4
SLOPE = 0.01
FIELDS = ("module_name", "dim_n", "heads", "projection_mid_dim")


@dataclass(frozen=True)
class Module:
    """One entry of modules_list."""

    module_name: str
    dim_n: int
    heads: int
    projection_mid_dim: int | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{key after the index: shape}."""
        c, mid = self.dim_n, self.projection_mid_dim or self.dim_n
        found: dict[str, tuple[int, ...]] = {f"to_{name}.weight": (c, c) for name in "qkv"}
        found |= {"to_out.0.weight": (c, c), "to_out.0.bias": (c,)}
        if mid == -1:
            return found
        for name in ("to_q_", "to_k_"):
            found |= {f"{name}.0.weight": (mid, c), f"{name}.3.weight": (c, mid), f"{name}.3.bias": (c,)}
            found |= {f"{name}.{part}": (mid,) for part in ("0.bias", "1.weight", "1.bias")}
        return found


def modules_of(config: str) -> list[Module]:
    """The modules_list of a config.json. ValueError in one sentence where it is none."""
    try:
        entries = json.loads(config)["modules_list"]
        modules = [Module(**{name: entry[name] for name in FIELDS}) for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"This config.json is none of LinFusion's: it needs a modules_list of {FIELDS}.") from error
    for m in modules:
        if type(m.dim_n) is not int or type(m.heads) is not int or m.heads < 1 or m.dim_n < 1 or m.dim_n % m.heads:
            raise ValueError(f"{m.module_name}: {m.dim_n} channels do not split into {m.heads} heads.")
        mid = m.projection_mid_dim
        if not (mid is None or (type(mid) is int and (mid == -1 or mid > 0))):
            raise ValueError(f"{m.module_name}: projection_mid_dim {mid!r} must be null, -1 or a width.")
    if not modules:
        raise ValueError("This config.json lists no modules.")
    return modules


def check(modules: list[Module], weights: dict[str, torch.Tensor]) -> None:
    """ValueError naming the first key that is missing, left over or of another shape."""
    wanted = {f"{i}.{key}": shape for i, module in enumerate(modules) for key, shape in module.shapes().items()}
    for key, shape in wanted.items():
        if key not in weights:
            raise ValueError(f"This LinFusion file lacks {key} {[*shape]}, which its config.json asks for.")
        if tuple(weights[key].shape) != shape:
            raise ValueError(
                f"{key} is {[*weights[key].shape]} in this LinFusion file, its config.json asks for {[*shape]}."
            )
    extra = sorted(set(weights) - set(wanted))
    if extra:
        raise ValueError(f"This LinFusion file holds {extra[0]}, which its config.json does not name.")


class LinearSelfAttention(torch.nn.Module):
    """One module; `operations` makes its layers (ComfyUI's cast weights where they are used)."""

    def __init__(self, module: Module, operations: Any = torch.nn, dtype: torch.dtype | None = None):
        super().__init__()
        self.heads, c, mid = module.heads, module.dim_n, module.projection_mid_dim or module.dim_n
        at = {"dtype": dtype, "device": "cpu"}
        self.to_q, self.to_k, self.to_v = (operations.Linear(c, c, bias=False, **at) for _ in range(3))
        self.to_out = torch.nn.ModuleList([operations.Linear(c, c, **at)])

        def added() -> torch.nn.Module:
            if mid == -1:
                return torch.nn.Identity()
            ends = operations.Linear(c, mid, **at), operations.LayerNorm(mid, **at), operations.Linear(mid, c, **at)
            return torch.nn.Sequential(ends[0], ends[1], torch.nn.LeakyReLU(SLOPE), ends[2])

        self.to_q_, self.to_k_ = added(), added()

    def forward(self, x: torch.Tensor, context: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """x [B, N, C], context and value [B, M, C] -> [B, N, C]."""
        q = self.to_q(x + self.to_q_(x))
        k = self.to_k(context + self.to_k_(context))
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, self.to_v(value)))
        out = linear_attention(q, k, v, None, None, "elu1", "mean", EPS)[0]
        return self.to_out[0](out.transpose(1, 2).flatten(2))


def build(modules: list[Module], weights: dict[str, torch.Tensor], operations: Any = torch.nn) -> torch.nn.ModuleList:
    """All modules of a file, in its own precision, on the CPU. ValueError for keys or shapes that do not fit."""
    check(modules, weights)
    dtype = weights["0.to_q.weight"].dtype
    built = torch.nn.ModuleList(LinearSelfAttention(module, operations, dtype) for module in modules)
    built.load_state_dict(weights)
    return built
