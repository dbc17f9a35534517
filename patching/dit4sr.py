"""DiT4SR on a MODEL: at every block's entry the tokens of the low-resolution picture are put behind the picture's own, at
its exit they are taken off again. Between blocks the streams are the model's, so caches, ControlNets and other packs see
what they know. Inside a block the adapter's layers act in the forwards of four kinds of modules; nothing of the model's own
forward is repeated."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch

from .. import archs
from ..methods.control.dit4sr import Dit4sr, build
from .attention_around import KeyFeature
from .blocks import BlockFeature, BlockPosition, Streams, block_path, positions
from .cache_blocks import StackCache
from .control import ControlFeature, encode, rgb, spread
from .dit4sr_inside import Call, Inside, acts
from .dynamic_grain import DynamicGrain
from .dynamic_tokens import DynamicTokens
from .forward import Forward
from .memory import shown
from .region import RegionFeature
from .run import Feature, Run, attach

MODELS = "tessera_dit4sr"  # key of the additional model
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@dataclass(frozen=True, eq=False)
class Adapter:
    """A loaded file: its layers as one model, which core loads, counts and unloads beside the MODEL that uses it."""

    content: Dit4sr
    blocks: torch.nn.ModuleList
    patcher: Any

    @classmethod
    def of(cls, content: Dit4sr) -> "Adapter":
        device = comfy.model_management.get_torch_device()
        stored = next(iter(content.tensors.values())).dtype
        count = sum(tensor.numel() for tensor in content.tensors.values())
        dtype = comfy.model_management.unet_dtype(device, count, DTYPES, stored)
        blocks = build(content, comfy.ops.manual_cast, dtype)
        offload = comfy.model_management.unet_offload_device()
        return cls(replace(content, tensors={}), blocks, comfy.model_patcher.ModelPatcher(blocks, device, offload))


@dataclass
class Restoring:
    """One run."""

    latents: dict[Any, torch.Tensor] = field(default_factory=dict)  # the picture by device and dtype
    entered: dict[Any, torch.Tensor] = field(default_factory=dict)  # by stream: tokens before the first of the blocks
    #   that a cache always computes behind those that it skips
    calls: int = 0
    acted: int = 0
    tokens: int = 0


@dataclass(frozen=True, eq=False)
class Dit4srFeature(ControlFeature, BlockFeature, KeyFeature):
    """Settings of Apply DiT4SR. latent [b, C, h, w] as the diffusion model sees it, fp32; legacy: keys as in v1."""

    inner: ClassVar[bool] = True
    parts: ClassVar[bool] = True
    name: str = "Apply DiT4SR"
    adapter: Adapter | None = None
    latent: torch.Tensor | None = None
    conv_scale: float = 1.2
    legacy: bool = False

    def begin(self, run: Run) -> Restoring:
        return Restoring()

    def conflicts(self, other: Feature) -> str | None:
        if isinstance(other, Dit4srFeature):
            return "Apply DiT4SR is on this MODEL already, and restores one picture. Remove one of the two."
        if isinstance(other, RegionFeature | DynamicGrain | DynamicTokens):
            return (
                f"Apply DiT4SR needs every token of the picture beside the low-resolution one, and {other.name} leaves some "
                "out. Remove one of them; Taylor Cache, Step Cache and the attention nodes work beside it."
            )
        return None

    def check_arch(self, arch, class_name: str) -> None:
        if arch is None or arch.name != "Stable Diffusion 3":
            kind = class_name if arch is None else arch.name
            raise ValueError(f"DiT4SR is for Stable Diffusion 3.5 medium, and this MODEL is {kind}. Load sd3.5_medium.")

    def check_model(self, arch, diffusion_model: Any) -> None:
        blocks = [block.x_block for block in diffusion_model.joint_blocks]
        dual = frozenset(i for i, block in enumerate(blocks) if block.x_block_self_attn)
        have, want = (len(blocks), dual, diffusion_model.hidden_size), self.adapter.content.sizes
        if have != (want.blocks, want.dual, want.width):
            raise ValueError(
                f"{self.adapter.content.name} is for a Stable Diffusion 3.5 of {want}, and this MODEL has {have[0]} blocks of "
                f"width {have[2]}, {len(dual)} of them with a second attention. Load sd3.5_medium."
            )
        for block in blocks:
            act = block.mlp.act
            if not isinstance(act, torch.nn.GELU) or act.approximate != "tanh":
                raise ValueError(f"DiT4SR's convolution follows a GELU (tanh), and this MODEL has {act} there.")

    def attached(self, model: Any) -> None:
        """Object patches, which ComfyUI restores on unload; the layers as an additional model."""
        diffusion_model = model.model.diffusion_model
        for block in positions(archs.find(diffusion_model), diffusion_model):
            top = f"{block_path(diffusion_model, block.spec, block.index)}.x_block"
            control = self.adapter.blocks[block.index]
            for path, act in acts(control, self.conv_scale * self.strength, self.legacy):
                at = f"{top}.{path}.forward"
                model.add_object_patch(at, Inside(model.get_model_object(at), self, block.number, act))
        model.set_additional_models(MODELS, [self.adapter.patcher])

    def held_bytes(self, run: Run, noise_shape: tuple[int, ...], conds: dict[str, Any]) -> int:
        """Activations of as many tokens again."""
        if self.strength == 0:
            return 0
        rows = noise_shape[0] * max(1, sum(map(len, conds.values())))
        return int(run.model.memory_required([rows, *shown(run, noise_shape)[1:]]))

    def around_block(self, state: Restoring, forward: Forward, block: BlockPosition, streams: Streams, proceed):
        if block.number == 0:
            state.calls += 1
        if not self.acts(forward.run):
            return proceed(streams)
        call = self._call(state, forward, block, streams[0])
        if call is None:
            return proceed(streams)
        n, x = call.tokens, streams[0]
        before, forward.appended, call.inside = forward.appended, n, block.number
        try:
            out = proceed((torch.cat((x, call.rows), 1), *streams[1:]))
        finally:
            forward.appended, call.inside = before, None
            call.residuals.clear()
        if out[0].shape[1] != 2 * n:
            raise ValueError(
                f"Apply DiT4SR gave block {block.number} {2 * n} tokens and got {out[0].shape[1]} back: another node has put "
                "something else in its place. Remove that node."
            )
        call.rows, call.last = out[0][:, n:], block.number
        return (out[0][:, :n], *out[1:])

    def _call(self, state: Restoring, forward: Forward, block: BlockPosition, x: torch.Tensor) -> Call | None:
        """With the tokens that enter this block; None where blocks were skipped before it and nothing is known of them."""
        call = forward.held.get(self)
        if block.number == 0:
            call = forward.held[self] = self._opened(state, forward, x)
            state.acted += 1
        count = next((f.last_blocks for f in forward.run.acting if isinstance(f, StackCache) and f.last_blocks), None)
        behind = count is not None and block.number == block.count - count
        if call is not None and call.last == block.number - 1:
            if behind:  # core writes into what a block returns, but not into this half of it
                state.entered |= dict(zip(forward.keys, call.rows.chunk(len(forward.keys)), strict=True))
            return call
        if not behind or any(key not in state.entered for key in forward.keys):
            return None
        rows = torch.cat([state.entered[key] for key in forward.keys])
        forward.held[self] = Call(rows, self._grid(forward), block.number - 1)
        return forward.held[self]

    def _opened(self, state: Restoring, forward: Forward, x: torch.Tensor) -> Call:
        """The low-resolution tokens of this call, as the model makes tokens of its own input. x [B, N, D]."""
        model, part, key = forward.diffusion_model, forward.part, (x.device, x.dtype)
        have, want = forward.x.shape[-2:] if part is None else part.sides, self.latent.shape[-2:]
        if tuple(have) != tuple(want):
            raise ValueError(
                f"Apply DiT4SR has a picture of {want[0]} x {want[1]} in latent space, and the model is asked for {have[0]} x "
                f"{have[1]}. Sample from the LATENT that Apply DiT4SR gives, without prompts for a part of the picture."
            )
        if key not in state.latents:
            state.latents[key] = self.latent.to(x)
        latent = state.latents[key] if part is None else part.of(state.latents[key])
        own = spread(latent, x.shape[0], len(forward.keys))
        places = model.cropped_pos_embed(own.shape[-2:], device=x.device)
        rows = model.x_embedder(own) + comfy.ops.cast_to_input(places, x)
        state.tokens = max(state.tokens, rows.shape[1])
        return Call(rows, self._grid(forward))

    def _grid(self, forward: Forward) -> list[int]:
        return [-(-side // forward.diffusion_model.patch_size) for side in forward.x.shape[-2:]]

    def around_keys(self, state: Restoring, forward: Forward, q, k, v, mask) -> tuple[Any, Any, Any] | None:
        """log(strength) on the logits of the low-resolution keys, which stand last."""
        if not forward.appended or self.strength == 1 or forward.held.get(self) is None:
            return None
        bias = q.new_zeros(1, 1, 1, k.shape[2])
        bias[..., -forward.appended :] = math.log(self.strength)
        if mask is None:
            return k, v, bias
        return k, v, torch.where(mask, bias, -math.inf) if mask.dtype == torch.bool else mask + bias

    def facts(self, state: Restoring) -> dict[str, Any]:
        variant = "v1" if self.legacy else "r1"
        return {"calls": state.calls, "acted": state.acted, "tokens": state.tokens, "keys": variant}

    def line(self, facts: dict[str, Any]) -> str:
        if not facts or not facts["acted"]:
            return f"did not act in any of {facts['calls']} calls of the model" if facts else ""
        beside = f"{facts['tokens']:,} low-resolution tokens beside the picture"
        return f"{beside} in {facts['acted']} of {facts['calls']} calls of the model, keys {facts['keys']}"


def enlarged(image: torch.Tensor, upscale: float, step: int) -> torch.Tensor:
    """image [B, H, W, C] 0..1 -> bicubic, `upscale` times as large, sides cut down to multiples of `step`."""
    height, width = (max(step, int(side * upscale + 1e-6) // step * step) for side in image.shape[1:3])
    channels = rgb(image).movedim(-1, 1).float()
    large = torch.nn.functional.interpolate(channels, (height, width), mode="bicubic", antialias=True)
    return large.clamp(0, 1).movedim(1, -1)


def apply(model, adapter: Adapter, image: torch.Tensor, vae, upscale: float, key_mode: str, **settings):
    """(MODEL, latent [B, C, h, w] of zeros to sample from). settings: fields of the feature."""
    legacy = (adapter.content.variant if key_mode == "auto" else key_mode.rpartition("_")[2]) == "v1"
    feature, diffusion_model = Dit4srFeature(adapter=adapter, legacy=legacy, **settings), model.model.diffusion_model
    arch = archs.find(diffusion_model)
    feature.check_arch(arch, archs.class_name(diffusion_model))
    feature.check_model(arch, diffusion_model)
    large = enlarged(image, upscale, model.get_model_object("latent_format").spacial_downscale_ratio)
    latent = encode(model, vae, large, feature.name)
    return attach(model, replace(feature, latent=latent)), torch.zeros_like(latent)
