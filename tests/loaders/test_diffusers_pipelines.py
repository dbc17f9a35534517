"""The bridge against the pipelines of diffusers themselves: same weights, noise, prompt embeddings and noise levels, and the
latent that each pipeline returns before its autoencoder."""

from types import SimpleNamespace

import diffusers
import diffusers_helper as tiny
import pytest
import torch

from tessera.patching.diffusers_load import load

GUIDANCE = 3.0


class Autoencoder(torch.nn.Module):
    """What pipelines ask of one before they decode: sizes. decode gives the latent back."""

    dtype, device = torch.float32, torch.device("cpu")
    temporal_compression_ratio, spatial_compression_ratio = 8, 32

    def __init__(self, **config):
        super().__init__()
        self.config = SimpleNamespace(
            scaling_factor=1.0, block_out_channels=(1, 1, 1, 1), latent_channels=16, shift_factor=0.0, **config
        )

    def decode(self, latent, **_):
        self.latent = latent
        return SimpleNamespace(sample=latent)


def made(kind: str, name: str, **parts):
    """A pipeline around the tiny class, without the parts that it does not need for a latent."""
    empty = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    schedule = {"scheduler": tiny.scheduler(name)}
    pipeline = getattr(diffusers, kind)(**{**empty, **schedule, **parts}, transformer=tiny.plain(name))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def texts(name: str, negative: str = "negative_prompt_embeds") -> dict[str, torch.Tensor]:
    """Embeddings of a prompt and of a negative one."""
    yes, no = tiny.conditions(name), tiny.conditions(name, seed=5)
    given = {"prompt_embeds": yes["cross_attn"], negative: no["cross_attn"]}
    if "pooled_output" in yes:
        given |= {"pooled_prompt_embeds": yes["pooled_output"], "negative_pooled_prompt_embeds": no["pooled_output"]}
    if "attention_mask" in yes:
        given |= {
            "prompt_attention_mask": yes["attention_mask"],
            "negative_prompt_attention_mask": no["attention_mask"],
        }
    return given


def dit():
    """Labels, and noise from a generator; the latent is what comes to its autoencoder."""
    name = "DiTTransformer2DModel"
    pipeline = diffusers.DiTPipeline(tiny.plain(name), Autoencoder(), tiny.scheduler(name))
    pipeline.set_progress_bar_config(disable=True)
    seeded = torch.Generator().manual_seed(4)
    pipeline([tiny.POSITIVE], guidance_scale=GUIDANCE, generator=seeded, num_inference_steps=4, output_type="np")
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    return start, pipeline.vae.latent, pipeline


def pixart():
    name = "PixArtTransformer2DModel"
    start = tiny.noise(name)
    pipeline = made("PixArtAlphaPipeline", name)
    out = pipeline(
        **texts(name), prompt=None, negative_prompt=None, latents=start, guidance_scale=GUIDANCE, num_inference_steps=4,
        height=64, width=96, use_resolution_binning=False, output_type="latent",
    ).images  # fmt: skip
    return start, out, pipeline


def sana():
    name = "SanaTransformer2DModel"
    start = tiny.noise(name)
    pipeline = made("SanaPipeline", name)
    out = pipeline(
        **texts(name), latents=start, guidance_scale=GUIDANCE, sigmas=tiny.SIGMAS, num_inference_steps=4, height=192, width=128,
        negative_prompt=None, use_resolution_binning=False, output_type="latent", complex_human_instruction=None,
    ).images  # fmt: skip
    return start, out, pipeline


def sana_video():
    name = "SanaVideoTransformer3DModel"
    start = torch.randn(1, 16, 3, 4, 8)
    pipeline = made("SanaVideoPipeline", name)
    out = pipeline(
        **texts(name), latents=start, guidance_scale=GUIDANCE, sigmas=tiny.SIGMAS, num_inference_steps=4, height=32, width=64,
        frames=9, negative_prompt=None, use_resolution_binning=False, output_type="latent", complex_human_instruction=None,
    ).frames  # fmt: skip
    return start, out, pipeline


def cogvideox():
    name = "CogVideoXTransformer3DModel"
    start = tiny.noise(name)
    pipeline = made("CogVideoXPipeline", name)
    out = pipeline(
        **texts(name), latents=start.transpose(1, 2), guidance_scale=GUIDANCE, num_inference_steps=4, num_frames=9, height=32,
        width=48, output_type="latent",
    ).frames  # fmt: skip
    return start, out.transpose(1, 2), pipeline


def latte():
    name = "LatteTransformer3DModel"
    start = tiny.noise(name)
    pipeline = made("LattePipeline", name)
    out = pipeline(
        **texts(name), latents=start, guidance_scale=GUIDANCE, num_inference_steps=4, video_length=3, height=64, width=32,
        negative_prompt=None, output_type="latent", mask_feature=False,
    ).frames  # fmt: skip
    return start, out, pipeline


def ltx():
    name = "LTXVideoTransformer3DModel"
    start = tiny.noise(name)
    packed = start.flatten(2).transpose(1, 2)
    pipeline = made("LTXPipeline", name)
    out = pipeline(
        **texts(name), latents=packed, guidance_scale=GUIDANCE, num_inference_steps=4, num_frames=17, height=128,
        width=192, frame_rate=30, output_type="latent",
    ).frames  # fmt: skip
    return start, out.transpose(1, 2).reshape(start.shape), pipeline


def flux():
    name = "FluxTransformer2DModel"
    start, yes = tiny.noise(name), tiny.conditions(name)
    pipeline = made("FluxPipeline", name, tokenizer_2=None, text_encoder_2=None)
    out = pipeline(
        prompt_embeds=yes["cross_attn"], pooled_prompt_embeds=yes["pooled_output"], guidance_scale=2.5, height=64, width=96,
        latents=pipeline._pack_latents(start, 1, 16, 8, 12), sigmas=tiny.SIGMAS, num_inference_steps=4, output_type="latent",
    ).images  # fmt: skip
    return start, pipeline._unpack_latents(out, 64, 96, 8), pipeline


def sd3():
    name = "SD3Transformer2DModel"
    start = tiny.noise(name)
    parts = dict.fromkeys(("tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3"))
    pipeline = made("StableDiffusion3Pipeline", name, **parts)
    out = pipeline(
        **texts(name), latents=start, guidance_scale=GUIDANCE, sigmas=tiny.SIGMAS, num_inference_steps=4, height=64, width=96,
        output_type="latent",
    ).images  # fmt: skip
    return start, out, pipeline


def wan():
    name = "WanTransformer3DModel"
    start = tiny.noise(name)
    given = {k: torch.nn.functional.pad(v, (0, 0, 0, 512 - v.shape[1])) for k, v in texts(name).items()}
    pipeline = made("WanPipeline", name)
    out = pipeline(
        **given, latents=start, guidance_scale=GUIDANCE, num_inference_steps=4, num_frames=9, height=32, width=48,
        output_type="latent",
    ).frames  # fmt: skip
    return start, out, pipeline


PIPELINES = {
    "DiTTransformer2DModel": dit, "PixArtTransformer2DModel": pixart, "SanaTransformer2DModel": sana,
    "SanaVideoTransformer3DModel": sana_video, "CogVideoXTransformer3DModel": cogvideox, "LatteTransformer3DModel": latte,
    "LTXVideoTransformer3DModel": ltx, "FluxTransformer2DModel": flux, "SD3Transformer2DModel": sd3,
    "WanTransformer3DModel": wan,
}  # fmt: skip


@pytest.mark.parametrize("name", PIPELINES)
def test_as_the_pipeline(name, tmp_path):
    with torch.inference_mode():
        start, want, pipeline = PIPELINES[name]()
    model, schedule = load(str(tiny.save(name, tmp_path))), pipeline.scheduler
    if tiny.TINY[name].kind == tiny.FLOW:
        levels = schedule.sigmas
    else:
        own = model.get_model_object("model_sampling").sigmas
        levels = torch.cat((own[schedule.timesteps.long()], torch.zeros(1)))
    got = tiny.sampled(model, name, cfg=1.0 if name.startswith("Flux") else GUIDANCE, start=start, levels=levels)
    assert got.shape == want.shape and len(levels) == 5
    assert ((got - want).abs().max() / want.abs().max().clamp_min(1)).item() < 1e-4
