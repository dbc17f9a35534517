"""Apply EasyControl on a tiny FLUX, and what its network was given meanwhile."""

import contextlib

import torch
from easycontrol_helper import Condition, loras
from nodes_helper import run_node

from tessera.methods.control.easycontrol import read
from tessera.nodes.control.apply_easycontrol import ApplyEasycontrol

NAME = "Apply EasyControl"
SIZES = (2, 2, 128)


def control(seed=1, rank=5):
    return read(loras(*SIZES, rank, seed), "canny.safetensors", {})


def latent(seed=5, h=6, w=8, batch=1):
    return torch.randn(batch, 16, h, w, generator=torch.Generator().manual_seed(seed))


def applied(model, seed=1, samples=None, **inputs):
    samples = latent() if samples is None else samples
    return run_node(ApplyEasycontrol, model=model, easycontrol=control(seed), latent={"samples": samples}, **inputs)[0]


@contextlib.contextmanager
def network_calls(model):
    """Inputs and outputs of the picture's calls of the network; calls without rows of conditions are the pre-pass."""
    calls, alone = [], []

    def hook(module, args, kwargs, out):
        given = {**dict(zip(("x", "timestep", "context"), args, strict=False)), **kwargs}
        if "cond_or_uncond" in given["transformer_options"]:
            values = [given[n] for n in ("x", "timestep", "context", "y", "guidance")]
            calls.append([v.clone().float() for v in (*values, out)])
        else:
            alone.append(given["x"].shape)

    handle = model.model.diffusion_model.register_forward_hook(hook, with_kwargs=True)
    try:
        yield calls, alone
    finally:
        handle.remove()


def conditions(model, *parts):
    process = model.model.process_latent_in
    return [Condition(process(p.pop("samples")), loras(*SIZES, 5, p.pop("seed")), **p) for p in parts]
