"""What tests of nodes in this process share: running a node as ComfyUI would, sampling a tiny model, and counting from
outside which blocks really ran."""

import contextlib
import functools
import gc
from collections import Counter
from dataclasses import dataclass

import torch
from pack import use_comfyui

use_comfyui()

import comfy.sample
import comfy.samplers
from comfy_api.latest import io
from tiny_models import conds, empty_latent, tiny
from tiny_specs import Spec

from tessera import archs
from tessera.nodes.cache.taylor_cache import TaylorCache
from tessera.patching.report import latest_record

gc.freeze()  # Compare and the leak tests collect often: not again what importing ComfyUI made
NODE_ID = "7"
_outputs: list = []  # kept like ComfyUI's output cache: a MODEL that dies while it is loaded costs core a full collection


def run_node(node, **inputs):
    """The node's outputs: schema defaults filled in, executed on a prepared clone of its class."""
    given = {}
    for widget in node.GET_SCHEMA().inputs:
        if widget.id in inputs:
            given[widget.id] = inputs.pop(widget.id)
        elif not widget.optional:
            options = getattr(widget, "options", None)
            given[widget.id] = options[0] if widget.default is None and options else widget.default
    assert not inputs, f"{node.__name__} has no input {sorted(inputs)}"
    prepared = node.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: NODE_ID}})
    out = prepared.EXECUTE_NORMALIZED(**given)
    _outputs.append(out)
    return out


def taylor(model, **inputs):
    """The MODEL after a Taylor Cache node that really skips within 8 steps."""
    inputs = {"interval": 3, "warmup": 2, "tail_full": 1, **inputs}
    return run_node(TaylorCache, model=model, **inputs)[0]


def facts(model, name: str = "Taylor Cache") -> dict:
    """What the newest run on this MODEL reported for that feature."""
    return next(f for f in latest_record(model)["features"] if f["name"] == name)["facts"]


def kinds(model, name: str = "Taylor Cache") -> str:
    """The decisions of the newest run, one letter an evaluation: f full, p forecast."""
    return "".join({"full": "f", "forecast": "p", "reuse": "p"}[d["kind"]] for d in facts(model, name)["decisions"])


def model_of(name: str, dtype: str = "fp32"):
    """(patchable clone, its spec); bf16 computes in bfloat16 from the same weights."""
    model, spec = tiny(name)
    if dtype == "bf16":
        model.set_model_compute_dtype(torch.bfloat16)
    _outputs.append(model)
    return model, spec


@dataclass
class Job:
    """One sampling run, as KSampler would do it."""

    spec: Spec
    steps: int = 8
    cfg: float = 3.0
    sampler: str = "euler"
    scheduler: str = "simple"
    denoise: float = 1.0
    seed: int = 7
    batch: int = 1
    sigmas: torch.Tensor | None = None
    latent: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    positive: list | None = None
    negative: list | None = None
    on_step: object = None  # called with the index of each finished step

    def __call__(self, model):
        """The sampled latent [B, C, (T,) H, W]."""
        positive, negative = conds(self.spec)
        latent = empty_latent(self.spec) if self.latent is None else self.latent
        if self.batch > 1:
            latent = torch.cat([latent] * self.batch)
        noise = comfy.sample.prepare_noise(latent, self.seed) if self.noise is None else self.noise
        return comfy.sample.sample(
            model, noise, self.steps, self.cfg, self.sampler, self.scheduler,
            positive if self.positive is None else self.positive, negative if self.negative is None else self.negative,
            latent, denoise=self.denoise, sigmas=self.sigmas, noise_mask=self.mask, disable_pbar=True, seed=self.seed,
            callback=lambda step, x0, x, total: self.on_step(step) if self.on_step else None,
        )  # fmt: skip


def error(got, want) -> float:
    """|got - want| / |want|, of tensors or nested tensors."""
    got, want = (torch.cat([p.flatten() for p in t.unbind()]) if t.is_nested else t for t in (got, want))
    return ((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-12)).item()


class Watch:
    """What forward hooks saw inside the blocks of the residual stack, whatever the nodes say."""

    def __init__(self, stack: int):
        self.calls = [Counter() for _ in range(stack)]  # by block: calls of each module in it

    @property
    def each(self) -> list[int]:
        """How often each block was computed. A hook on the block itself would also fire where a wrapped forward skips,
        so this counts the modules inside, of which some run once whenever the block does."""
        return [min(calls.values(), default=0) for calls in self.calls]

    @property
    def blocks(self) -> int:
        return sum(self.each)


@contextlib.contextmanager
def watching(model):
    """Counts the blocks of this MODEL that are computed meanwhile."""
    diffusion_model = model.model.diffusion_model
    stack = [spec for spec in archs.find(diffusion_model).blocks if spec.stack]
    modules = [block for spec in stack for _, block in archs.block_modules(diffusion_model, spec)]
    watch, handles = Watch(len(modules)), []
    for calls, block in zip(watch.calls, modules, strict=True):
        for name, module in block.named_modules():
            if name:
                handles.append(module.register_forward_hook(functools.partial(_count, calls, name)))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _count(calls: Counter, name: str, *_) -> None:
    calls[name] += 1
