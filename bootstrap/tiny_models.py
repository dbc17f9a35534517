"""The stock loader's tiny models: random weights, real classes, about a second each on a CPU.

`python bootstrap/tiny_models.py --out FOLDER [--only wan,flux]` writes those that load from a file as
tiny_NAME.safetensors. Tests use `tiny(name)`, which builds each model once per process, and `sample`."""

import argparse
import atexit
import functools
import importlib
import json
import tempfile
from pathlib import Path

import torch
from pack import use_comfyui
from tiny_specs import SPECS, Spec

use_comfyui()

import comfy.model_management
import comfy.model_patcher
import comfy.nested_tensor
import comfy.ops
import comfy.sample
import comfy.sd
import comfy.supported_models
import safetensors.torch
from comfy.model_patcher import ModelPatcher

LOADABLE = tuple(name for name, spec in SPECS.items() if spec.direct is None)


def construct(spec: Spec) -> torch.nn.Module:
    """The bare diffusion model on the CPU in fp32, its weights not set."""
    module, name = spec.model.split(":")
    build = getattr(importlib.import_module(f"comfy.ldm.{module}"), name)
    return build(**spec.arguments, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)


def state_dict(spec: Spec, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Weights that keep activations near unit size: matrices N(0, 1 / fan-in), norms 1, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for key, value in construct(spec).state_dict().items():
        if not torch.is_floating_point(value):
            out[key] = value.clone()
            continue
        if value.ndim >= 2:
            weight = torch.randn(value.shape, generator=generator) / max(1, value[0].numel()) ** 0.5
        else:
            weight = torch.zeros(value.shape) if key.endswith("bias") else torch.ones(value.shape)
        out[key] = weight.to(dtype).contiguous()
    return out


def write_checkpoint(spec: Spec, path: Path | str, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> int:
    """Writes a safetensors file that Load Diffusion Model takes, and returns its number of parameters.

    ValueError for a spec whose width the loader would not detect."""
    if spec.direct:
        raise ValueError(f"Model detection fixes the size of {spec.direct}, so a tiny file of it cannot be loaded.")
    weights = state_dict(spec, seed, dtype)
    metadata = {"config": json.dumps({"transformer": dict(spec.metadata)})} if spec.metadata else None
    safetensors.torch.save_file(weights, str(path), metadata=metadata)
    return sum(w.numel() for w in weights.values())


def load(path: Path | str) -> ModelPatcher:
    """What Load Diffusion Model does."""
    return comfy.sd.load_diffusion_model(str(path))


def build_direct(spec: Spec, seed: int = 0) -> ModelPatcher:
    """The same kind of ModelPatcher without model detection, in fp32."""
    config = getattr(comfy.supported_models, spec.direct or "")(dict(spec.arguments))
    config.unet_config.update(spec.arguments)  # the constructor adds its own defaults
    config.set_inference_dtype(torch.float32, None)
    weights = state_dict(spec, seed, torch.float32)
    model = config.get_model(weights, "")
    model.load_model_weights(weights, "")
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def build(name: str, seed: int = 0) -> ModelPatcher:
    """A new model of that spec; through a file and the stock loader where those can."""
    spec = SPECS[name]
    if spec.direct:
        return build_direct(spec, seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"tiny_{name}.safetensors"
        write_checkpoint(spec, path, seed)
        return load(path)


@functools.cache
def cached(name: str) -> ModelPatcher:
    """The model of that spec, built once per process. Clone it before patching."""
    return build(name)


atexit.register(cached.cache_clear)  # ComfyUI's ModelPatcher cannot be collected after its modules


def tiny(name: str) -> tuple[ModelPatcher, Spec]:
    """A clone of the cached model, free to patch, and its spec."""
    return cached(name).clone(), SPECS[name]


def conds(spec: Spec, seed: int = 1) -> tuple[list, list]:
    """Random positive and negative conditioning."""
    generator = torch.Generator().manual_seed(seed)

    def one() -> list:
        extra = {k: torch.ones(shape, dtype=torch.long) for k, shape in spec.ones.items()}
        extra.update({k: torch.randn(shape, generator=generator) for k, shape in spec.randoms.items()})
        if spec.pooled:
            extra["pooled_output"] = torch.randn(spec.pooled, generator=generator)
        return [[torch.randn(spec.context, generator=generator), extra]]

    return one(), one()


def empty_latent(spec: Spec):
    """Zeros of the latent's shape; a NestedTensor for video and audio."""
    if isinstance(spec.latent, list):
        return comfy.nested_tensor.NestedTensor([torch.zeros(shape) for shape in spec.latent])
    return torch.zeros(spec.latent)


def sample(model: ModelPatcher, spec: Spec, steps=2, cfg=3.0, sampler="euler", scheduler="simple", seed=7, latent=None):
    """What KSampler does from an empty latent: [1, C, (T,) H, W] in latent space (a NestedTensor with audio)."""
    latent = empty_latent(spec) if latent is None else latent
    noise = comfy.sample.prepare_noise(latent, seed)
    positive, negative = conds(spec)
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, scheduler, positive, negative, latent, disable_pbar=True, seed=seed
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", type=lambda s: s.split(","), default=LOADABLE, help="comma-separated names")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        path = args.out / f"tiny_{name}.safetensors"
        print(f"{path}: {write_checkpoint(SPECS[name], path) / 1e6:.2f} M parameters")


if __name__ == "__main__":
    main()
