"""DynamiCtrl's transformer in diffusers' classes, with its added norms written out: a tiny one, its file, and its forward."""

import atexit
import functools
import json
import tempfile
from pathlib import Path

import comfy.samplers
import safetensors.torch
import torch
from comfy.patcher_extension import WrappersMP
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox_image2video import get_resize_crop_region_for_grid
from nodes_helper import run_node
from tiny_specs import Spec

from tessera.nodes.control.apply_pose_control import ApplyPoseControl
from tessera.patching.dynamictrl import load

SAMPLE = (8, 12)  # latent height and width that the tiny ones were trained at
KINDS = {
    "1.0": {},
    "learned": {"use_learned_positional_embeddings": True, "sample_frames": 9},
    "1.5": {"patch_size_t": 2, "ofs_embed_dim": 16, "patch_bias": True},
}
FRAMES = {"1.0": 3, "learned": 3, "1.5": 4}

SIGMAS = torch.tensor([2.0, 1.5, 1.0, 0.6, 0.3, 0.1, 0.0])  # where the latent is no larger than the pose
KEPT: list = []  # a MODEL that dies while it is loaded costs core a full collection
atexit.register(KEPT.clear)


class AddedNorm(torch.nn.Module):
    """PoseAdaptiveLN of the release."""

    def __init__(self, time, dim):
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(time, 3 * dim), torch.nn.LayerNorm(dim, eps=1e-5)

    def forward(self, c, temb):
        shift, scale, gate = self.linear(torch.nn.functional.silu(temb)).chunk(3, dim=1)
        return self.norm(c) * (1 + scale)[:, None] + shift[:, None], gate[:, None]


class Official(torch.nn.Module):
    def __init__(self, kind="1.0", layers=2, heads=2, time=32, text=96, seed=0, **config):
        super().__init__()
        torch.manual_seed(seed or 0)
        time = 16 if kind == "1.5" else time  # ofs is added to the timestep's embedding
        told = {"sample_height": SAMPLE[0], "sample_width": SAMPLE[1]} | KINDS[kind] | config
        self.model = CogVideoXTransformer3DModel(
            num_attention_heads=heads, in_channels=32, time_embed_dim=time, text_embed_dim=text, num_layers=layers,
            use_rotary_positional_embeddings=True, **told,
        ).eval()  # fmt: skip
        self.norms = torch.nn.ModuleList(AddedNorm(time, 64 * heads) for _ in range(layers)).eval()
        if seed is not None:
            for p in [*self.model.parameters(), *self.norms.parameters()]:
                torch.nn.init.normal_(p, std=0.3 if p.ndim == 1 else 1.5 / p[0].numel() ** 0.5)

    def tensors(self):
        made = dict(self.model.state_dict())
        for i, norm in enumerate(self.norms):
            made |= {f"transformer_blocks.{i}.control_norm1.{key}": value for key, value in norm.state_dict().items()}
        return {key: value.contiguous() for key, value in made.items()}

    def rotary(self, frames, height, width):
        config = self.model.config
        grid, base = (height // 2, width // 2), (config.sample_height // 2, config.sample_width // 2)
        if config.patch_size_t is None:
            crop = get_resize_crop_region_for_grid(grid, base[1], base[0])
            return get_3d_rotary_pos_embed(64, crop, grid, frames)
        size = max(base[0], grid[0]), max(base[1], grid[1])
        return get_3d_rotary_pos_embed(64, None, grid, (frames + 1) // 2, grid_type="slice", max_size=size)

    @torch.no_grad()
    def forward(self, x, text, timestep, pose=None, ofs=None, strength=1.0):
        """x [B, 32, T, H, W], text [B, L, text], timestep [B], pose [B, 16, T, H, W] -> [B, 16, T, H, W]."""
        m, x = self.model, x.movedim(2, 1)
        emb = m.time_embedding(m.time_proj(timestep))
        if m.ofs_embedding is not None:
            emb = emb + m.ofs_embedding(m.ofs_proj(ofs))
        h, length = m.patch_embed(text, x), text.shape[1]
        e, h = h[:, :length], h[:, length:]
        if pose is not None:
            c = m.patch_embed(text, torch.cat((pose, pose), 1).movedim(2, 1))[:, length:]
        rope = self.rotary(x.shape[1], *x.shape[-2:])
        for block, added in zip(m.transformer_blocks, self.norms, strict=True):
            nh, ne, gate, gate_e = block.norm1(h, e, emb)
            if pose is not None:
                y, g = added(c, emb)
                nh, c = nh + strength * y, y + g * y
            ah, ae = block.attn1(hidden_states=nh, encoder_hidden_states=ne, image_rotary_emb=rope)
            h, e = h + gate * ah, e + gate_e * ae
            nh, ne, gate, gate_e = block.norm2(h, e, emb)
            ff = block.ff(torch.cat((ne, nh), 1))
            h, e = h + gate * ff[:, length:], e + gate_e * ff[:, :length]
        h = m.proj_out(m.norm_out(m.norm_final(h), temb=emb))
        b, t, _, height, width = x.shape
        if m.config.patch_size_t is None:
            out = h.reshape(b, t, height // 2, width // 2, 16, 2, 2).permute(0, 4, 1, 2, 5, 3, 6)
        else:
            out = h.reshape(b, t // 2, height // 2, width // 2, 16, 2, 2, 2).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return out.reshape(b, 16, t, height, width)


def write(official, folder, tensors=None, config=True, name="diffusion_pytorch_model.safetensors"):
    """The folder of a release; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(official.tensors() if tensors is None else tensors, str(folder / name))
    if config:
        told = {"_class_name": "DynamiCtrlTransformerModel", **dict(official.model.config)}
        (folder / "config.json").write_text(json.dumps(told, default=str))
    return folder


def spec(kind="1.0", text=10):
    return Spec(
        "cogvideo.model:CogVideoXTransformer3DModel", {}, latent=(1, 16, FRAMES[kind], *SAMPLE), context=(1, text, 96)
    )


@functools.cache
def loaded(kind="1.0"):
    """(MODEL, Official), each made once. Clone the MODEL before patching."""
    official = Official(kind)
    with tempfile.TemporaryDirectory() as folder:
        return load(str(write(official, Path(folder) / "transformer"))), official


atexit.register(loaded.cache_clear)


def pose(kind="1.0", batch=1, size=None, seed=3):
    shape = (batch, 16, *(size or (FRAMES[kind], *SAMPLE)))
    return {"samples": torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3}


def posed(model, latent=None, **inputs):
    return run_node(ApplyPoseControl, model=model, latent=pose() if latent is None else latent, **inputs)[0]


def called(model, job):
    """[(what the diffusion model was given, what it gave)] of a run."""
    seen, spy = [], model.clone()

    def wrapper(executor, x, timestep, context, ofs, options, **kwargs):
        out = executor(x, timestep, context, ofs, options, **kwargs)
        seen.append(((x.clone(), timestep.clone(), context.clone(), ofs), out.clone()))
        return out

    KEPT.append(spy)
    spy.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "spy", wrapper)
    job(spy)
    return seen


def apart(model):
    """The MODEL with cond and uncond in calls of their own."""
    patched = model.clone()
    KEPT.append(patched)

    def alone(args):
        model, each, x, t, options = (args[k] for k in ("model", "conds", "input", "sigma", "model_options"))
        return [comfy.samplers.calc_cond_batch(model, [c], x, t, options)[0] for c in each]

    patched.set_model_sampler_calc_cond_batch_function(alone)
    return patched
