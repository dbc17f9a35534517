"""LTX Denoising Decode: seeded, exact in its mix, whole or in tiles, and the VAE and torch's generators as before."""

import pytest
import tiny_vae
import torch
from nodes_helper import run_node

import comfy.model_management  # isort: skip
import comfy.nested_tensor  # isort: skip
import comfy.sample  # isort: skip

from tessera.nodes.video.ltx_denoising_decode import PLAIN, LtxDenoisingDecode
from tessera.patching import ltx_decode as m

DTYPES = [torch.float32, torch.bfloat16]
KINDS = {"0.9.5": {}, "0.9.1": {"inject": True}, "0.9.0": {"conditioned": False}}


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():  # as ComfyUI runs every node; core's tiles need it
        yield


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def vae(request):
    return tiny_vae.load(request.param)


def latent(batch=1, shape=(3, 2, 4), seed=0):
    return torch.randn(batch, 128, *shape, generator=torch.Generator().manual_seed(seed))


def decoded(vae, samples, **options):
    entries = samples if isinstance(samples, dict) else {"samples": samples}
    return run_node(LtxDenoisingDecode, samples=entries, vae=vae, **options)[0]


def stock(vae, samples, timestep=0.05, scale=0.0):
    """VAE Decode with the decoder's own settings changed by hand."""
    inner = vae.first_stage_model
    before = inner.decode_noise_scale, inner.decode_timestep
    inner.decode_noise_scale, inner.decode_timestep = scale, timestep
    made = vae.decode(samples).flatten(0, 1)
    inner.decode_noise_scale, inner.decode_timestep = before
    return made


def eps(samples, seed, indices=None):
    return comfy.sample.prepare_noise(samples, seed, indices)


@pytest.mark.parametrize("kind", ["0.9.5", "0.9.1"])
def test_a_seed_is_one_clip(kind):
    vae, z = tiny_vae.load(**KINDS[kind]), latent()
    torch.manual_seed(1)
    first = decoded(vae, z, seed=5)
    assert first.shape == (17, 64, 128, 3) and first.std() > 0.05
    torch.manual_seed(2)
    assert torch.equal(decoded(vae, z, seed=5), first)
    assert not torch.equal(decoded(vae, z, seed=6), first)
    tiled = decoded(vae, z, seed=5, tile_size=64, overlap=0)
    assert torch.equal(decoded(vae, z, seed=5, tile_size=64, overlap=0), tiled)
    torch.manual_seed(1)
    one = vae.decode(z)
    assert not torch.equal(one, vae.decode(z)), "core draws anew each time; this test would prove nothing"


@pytest.mark.parametrize("timestep", [0.05, 0.333])
def test_no_noise_is_the_plain_decode(vae, timestep):
    z = latent()
    assert torch.equal(decoded(vae, z, decode_noise_scale=0.0, decode_timestep=timestep), stock(vae, z, timestep))


@pytest.mark.parametrize("noise", m.NOISES)
def test_the_mix(vae, noise):
    z, s = latent(2), 0.3
    drawn = eps(z if noise == "each_frame" else z[:, :, :1], 9)
    want = torch.cat([stock(vae, one) for one in ((1 - s) * z + s * drawn).split(1)])
    assert torch.equal(decoded(vae, z, seed=9, decode_noise_scale=s, noise=noise), want)
    linked = decoded(vae, z, seed=9, decode_timestep=s, link_scale_to_timestep=True, noise=noise)
    assert torch.equal(linked, decoded(vae, z, seed=9, decode_timestep=s, decode_noise_scale=s, noise=noise))
    assert not torch.equal(linked, decoded(vae, z, seed=9, decode_timestep=s, noise=noise))


@pytest.mark.parametrize("inject", [False, True])
def test_two_clips_are_two_single_ones(inject):
    vae, z = tiny_vae.load(inject=inject), latent(2)
    both = decoded(vae, z, seed=3, decode_noise_scale=0.2)
    assert torch.equal(both[:17], decoded(vae, z[:1], seed=3, decode_noise_scale=0.2))
    second = {"samples": z[1:], "batch_index": [1]}  # as Latent From Batch has it
    assert torch.equal(both[17:], decoded(vae, second, seed=3, decode_noise_scale=0.2))
    assert not torch.equal(both[17:], decoded(vae, z[1:], seed=3, decode_noise_scale=0.2))


def test_the_timestep_counts_where_the_decoder_takes_one(vae):
    z = latent()
    assert not torch.equal(decoded(vae, z, decode_timestep=0.05), decoded(vae, z, decode_timestep=0.4))
    old = tiny_vae.load(vae.vae_dtype, conditioned=False)
    out = run_node(LtxDenoisingDecode, samples={"samples": z}, vae=old, decode_timestep=0.4, decode_noise_scale=0.5)
    assert torch.equal(out[0], old.decode(z).flatten(0, 1))
    assert out.ui["tessera_report"][0]["lines"] == [PLAIN]
    assert run_node(LtxDenoisingDecode, samples={"samples": z}, vae=vae).ui is None


@pytest.mark.parametrize("across", [True, False], ids=["across", "in time"])
def test_tiles_are_the_whole_away_from_their_borders(across):
    """Of 32 latent places in tiles of 24 that share 6: what lies 8 or more from the ends of its tile sees that alone."""
    vae, z = tiny_vae.load(), latent(shape=(1, 2, 32) if across else (32, 2, 2))
    asked = {"decode_noise_scale": 0.2, "seed": 4}
    whole = decoded(vae, z, **asked)
    if across:
        parts = decoded(vae, z, tile_size=24 * 32, overlap=6 * 32, **asked)
        off = (whole - parts).abs().amax((0, 1, 3)).unflatten(0, (32, 32)).amax(1)
    else:
        parts = decoded(vae, z, temporal_tile=24 * 8, temporal_overlap=6 * 8, **asked)
        off = (whole - parts).abs().amax((1, 2, 3))[1:].unflatten(0, (31, 8)).amax(1)
    assert parts.shape == whole.shape and off[:16].max() < 1e-5 and off[26:].max() < 1e-5
    assert off[17:25].max() > 1e-3, "nothing was tiled"


def test_tiles_in_latent_places(vae):
    def plan(*sizes):
        return m.tiles(vae, torch.Size((1, 128, 13, 16, 24)), m.Asked(0.05, 0.025, 0, "each_frame", *sizes))

    assert plan(0, 64, 0, 16) is None
    assert plan(256, 64, 0, 16) == {"tile_x": 8, "tile_y": 8, "overlap": 2, "tile_t": 13, "overlap_t": 2}
    assert plan(32, 512, 0, 8) == {"tile_x": 2, "tile_y": 2, "overlap": 0, "tile_t": 13, "overlap_t": 1}
    assert plan(0, 0, 32, 64) == {"tile_x": 24, "tile_y": 24, "overlap": 0, "tile_t": 4, "overlap_t": 2}


def settings(vae):
    inner = vae.first_stage_model
    return inner.decode_noise_scale, inner.decode_timestep, inner.timestep_conditioning, torch.get_rng_state().tolist()


@pytest.mark.parametrize("error", [RuntimeError, comfy.model_management.InterruptProcessingException])
@pytest.mark.parametrize("tile_size", [0, 64])
def test_everything_is_as_before(vae, monkeypatch, error, tile_size):
    vae.first_stage_model.decode_noise_scale = 0.0375  # as a file may say
    before = settings(vae)
    decoded(vae, latent(), tile_size=tile_size, decode_timestep=0.5)
    assert settings(vae) == before
    seen = []

    def fail(x, **_):
        seen.append((vae.first_stage_model.decode_noise_scale, vae.first_stage_model.decode_timestep))
        torch.randn(3)
        raise error("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(vae.first_stage_model, "decode", fail)
        with pytest.raises(error):
            decoded(vae, latent(), tile_size=tile_size, decode_timestep=0.5)
    assert seen == [(0.0, 0.5)] and settings(vae) == before


def test_an_interrupt_stops_between_clips(vae, monkeypatch):
    calls, before = [], settings(vae)
    real = vae.first_stage_model.decode
    monkeypatch.setattr(vae.first_stage_model, "decode", lambda *a, **k: calls.append(1) or real(*a, **k))
    stop = comfy.model_management.InterruptProcessingException
    monkeypatch.setattr(
        comfy.model_management, "throw_exception_if_processing_interrupted", lambda: (_ for _ in ()).throw(stop())
    )
    with pytest.raises(stop):
        decoded(vae, latent(3))
    assert len(calls) == 1 and settings(vae) == before


def test_what_was_given_gets_no_noise(vae):
    z, s = latent(2), 0.4
    mask = torch.ones(2, 1, 3, 1, 1)  # as LTXVImgToVideo has it
    mask[0, :, :1], mask[1, :, :1] = 0, 0.5
    want = (1 - s * mask) * z + s * mask * eps(z, 1)
    got = decoded(vae, {"samples": z, "noise_mask": mask}, seed=1, decode_noise_scale=s)
    assert torch.equal(got, torch.cat([stock(vae, one) for one in want.split(1)]))
    frames = torch.tensor([0.0, 1.0, 1.0])[:, None, None].expand(3, 2, 4)  # one mask a latent frame
    got = decoded(vae, {"samples": z, "noise_mask": frames}, seed=1, decode_noise_scale=s)
    want = (1 - s * frames) * z + s * frames * eps(z, 1)
    assert torch.equal(got, torch.cat([stock(vae, one) for one in want.split(1)]))
    none = decoded(vae, {"samples": z, "noise_mask": torch.zeros(1, 2, 4)}, seed=1, decode_noise_scale=s)
    assert torch.equal(none, decoded(vae, z, decode_noise_scale=0.0))


def test_of_video_with_sound_the_video(vae):
    z, sound = latent(), torch.randn(1, 8, 12, 16)
    mask = torch.zeros(1, 1, 3, 1, 1)
    both = comfy.nested_tensor.NestedTensor([z, sound])
    assert torch.equal(decoded(vae, both, seed=2), decoded(vae, z, seed=2))
    masks = comfy.nested_tensor.NestedTensor([mask, torch.ones(1, 1, 12, 16)])
    assert torch.equal(
        decoded(vae, {"samples": both, "noise_mask": masks}), decoded(vae, {"samples": z, "noise_mask": mask})
    )


def test_others_are_refused(vae):
    class Vae:
        first_stage_model = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match="needs the VAE of LTX-Video, got Linear; decode this latent with VAE Decode"):
        decoded(Vae(), latent())
    for wrong in (torch.zeros(1, 128, 4, 4), torch.zeros(1, 16, 3, 4, 4)):
        with pytest.raises(ValueError, match=r"needs a latent \[B, 128, T, H, W\], got"):
            decoded(vae, wrong)
