"""RelaCtrl on a small PixArt-alpha: what it computes is the official forward, and where it is off nothing at all."""

from types import SimpleNamespace

import comfy.samplers
import pytest
import torch
from nodes_helper import error, facts, model_of, run_node, watching
from relactrl_helper import CONTROL, DEPTH, GOLDEN, LATENT, SPEC, WIDTH, Official, controlled, job, pixart, tensors
from tiny_models import conds

from tessera.methods.control.relactrl_keys import read
from tessera.nodes.control.apply_relactrl import ApplyRelactrl
from tessera.patching.run import FEATURES, Run

NAME = "Apply RelaCtrl"


def official(model, seed=0, latent=LATENT, control=True, each=lambda call: 0, **settings):
    """The MODEL with the official forward in the place of its own."""
    prefix = "diffusion_model."
    weights = {k.removeprefix(prefix): v.float() for k, v in model.model.state_dict().items() if k.startswith(prefix)}
    condition = model.model.process_latent_in(latent)
    before = lambda call: torch.manual_seed(seed + each(call))  # noqa: E731
    clone = model.clone()
    port = Official(weights, tensors() if control else None, condition, before, **settings)
    clone.add_object_patch("diffusion_model.forward", port)
    return clone


def test_the_port_is_this_pixart():
    model = pixart()
    assert error(job()(model), job()(official(model, control=False))) < 1e-5


@pytest.mark.parametrize(
    ("inputs", "settings", "each"),
    [
        ({}, {}, lambda call: 0),
        ({"permutation": "per_call", "perm_seed": 5}, {"seed": 5}, lambda call: call),
        (
            {"strength": 0.6, "repeat_skip": False, "perm_seed": 9},
            {"strength": 0.6, "repeat": False, "seed": 9},
            lambda call: 0,
        ),
    ],
    ids=["fixed", "per call", "fresh residuals alone"],
)
def test_it_computes_the_official_forward(inputs, settings, each):
    """Guidance, two pictures with a condition each, not square, fp32."""
    model = pixart()
    want = job(batch=2)(official(model, each=each, **settings))
    patched = controlled(model, **inputs)
    assert error(job(batch=2)(patched), want) < 1e-5
    assert error(want, job(batch=2)(model)) > 0.05
    told = facts(patched, NAME)
    added = 21 if settings.get("repeat", True) else 11
    assert (told["calls"], told["control_blocks"], told["residuals"]) == (2, 22, 2 * added)


def test_a_step_of_two_evaluations_keeps_its_permutation():
    model = pixart()
    heun = job(steps=2, sampler="heun")  # evaluates 2 + 1 times
    want = heun(official(model, latent=LATENT[:1], each=[0, 0, 1].__getitem__))
    patched = controlled(model, LATENT[:1], permutation="per_step")
    assert error(heun(patched), want) < 1e-5 and facts(patched, NAME)["permutations"] == 2
    each = controlled(model, LATENT[:1], permutation="per_call")
    assert error(heun(each), heun(official(model, latent=LATENT[:1], each=lambda call: call))) < 1e-5
    assert facts(each, NAME)["permutations"] == 3


@pytest.mark.parametrize("permutation", ["fixed", "per_call"])
def test_conditions_apart_are_the_conditions_together(permutation):
    """Prompts of other lengths cannot share a call; they share the evaluation's permutations all the same."""
    model = pixart()
    positive, negative = conds(SPEC)
    longer = [[torch.cat([positive[0][0]] * 2, 1), positive[0][1]]]  # the same keys twice: the same attention
    patched = controlled(model, permutation=permutation)
    together = job()(patched)
    apart = job(positive=longer)(patched)
    assert facts(patched, NAME)["calls"] == 4 and facts(patched, NAME)["permutations"] == (
        1 if permutation == "fixed" else 2
    )
    assert error(apart, together) < 1e-5


def test_one_condition_serves_a_batch():
    model = pixart()
    both = torch.cat([LATENT[:1]] * 2)
    want = job(batch=2)(controlled(model, both))
    assert error(job(batch=2)(controlled(model, LATENT[:1])), want) < 1e-5
    assert error(job(batch=2)(controlled(model)), want) > 1e-3


def test_bf16_is_near():
    exact, plain = job()(controlled(pixart())), job()(pixart())
    low, low_plain = job()(controlled(pixart("bf16"))), job()(pixart("bf16"))
    assert error(low, exact) < max(2 * error(low_plain, plain), 1e-2)


@pytest.mark.parametrize(
    "off", [{"strength": 0.0}, {"start_percent": 0.5, "end_percent": 0.5}, {"start_percent": 1.0}], ids=str
)
def test_off_is_the_plain_model_bit_for_bit(off):
    model = pixart()
    patched = controlled(model, **off)
    with watching(model) as watch:
        assert torch.equal(job()(patched), job()(model))
    assert watch.each == [4] * DEPTH and facts(patched, NAME)["calls"] == 0
    assert patched.model_options["transformer_options"][FEATURES], "the hooks are in place"


def test_part_of_the_schedule():
    """It ends after half of it: the first steps are the controlled ones, the others those of the plain model."""
    model = pixart()
    patched = controlled(model, end_percent=0.6)
    job(steps=6)(patched)
    calls = facts(patched, NAME)["calls"]
    assert 0 < calls < 6
    sigmas = [float(model.get_model_object("model_sampling").percent_to_sigma(p)) for p in (0.6, 0.0)]
    plan = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 6)[:-1]
    assert calls == sum(sigmas[0] < float(s) <= sigmas[1] for s in plan)


@pytest.mark.parametrize("permutation", ["fixed", "per_step", "per_call"])
def test_runs_are_equal_and_policies_differ(permutation):
    model = pixart()
    patched = controlled(model, permutation=permutation)
    first = job()(patched)
    assert torch.equal(job()(patched), first)
    assert torch.equal(job()(controlled(model, permutation=permutation)), first), "another application, the same seed"
    assert not torch.equal(job()(controlled(model, permutation=permutation, perm_seed=1)), first)
    assert (error(first, job()(controlled(model))) == 0) == (permutation == "fixed")


def counters(model):
    """The MODEL with blocks that change nothing and note what they are given, and that list."""
    seen, clone = [], model.clone()

    def counter(number):
        def forward(x, y, t, mask=None, HW=None, **kwargs):
            seen.append((number, x.clone()))
            return x

        return forward

    for i in range(DEPTH):
        clone.add_object_patch(f"diffusion_model.blocks.{i}.forward", counter(i))
    return clone, seen


@pytest.mark.parametrize("repeat", [True, False])
def test_each_block_gets_the_residual_of_the_last_control_block(repeat):
    """Control block n gives n + 1 everywhere. Blocks of the base that none precedes get the last one again, or nothing."""
    weights = tensors()
    for key, value in weights.items():
        if "after_proj" in key:
            value.fill_((int(key.split(".")[1]) + 1) if key.endswith("bias") else 0)
    model, seen = counters(pixart())
    patched = run_node(ApplyRelactrl, model=model, control=read(weights, "tiny"), latent={"samples": LATENT[:1]},
                       repeat_skip=repeat)[0]  # fmt: skip
    job(steps=1)(patched)
    assert [n for n, _ in seen] == list(range(DEPTH))
    steps = [(b - a).mean().item() for (_, a), (_, b) in zip(seen, seen[1:], strict=False)]
    places = GOLDEN["places"]
    want = [sum(p < k for p in places) * (repeat or k - 1 in places) for k in range(1, DEPTH)]
    assert steps == pytest.approx(want, abs=1e-4)


class Vae:
    """Cells of 8 x 8 pixels; the mean of each colour and of their sum."""

    def __init__(self, channels=4):
        self.channels, self.sizes = channels, []

    def spacial_compression_encode(self):
        return 8

    def encode(self, pixels):
        self.sizes.append((*pixels.shape[1:],))
        cells = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return torch.cat([cells, cells.sum(1, keepdim=True)], 1)[:, : self.channels]


@pytest.mark.parametrize("size", [(256, 320), (512, 640), (600, 400), (64, 64)], ids=str)
def test_an_image_is_brought_to_the_picture_s_size(size):
    image, vae, model = torch.rand(1, *size, 4), Vae(), pixart()
    patched = run_node(ApplyRelactrl, model=model, control=CONTROL, image=image, vae=vae)[0]
    got = job()(patched)
    assert vae.sizes == [(256, 320, 3)], "encoded once a run, without its alpha"
    if size == (256, 320):
        assert torch.equal(got, job()(controlled(model, Vae().encode(image[..., :3]))))
    assert torch.isfinite(got).all() and error(got, job()(model)) > 0.05


def refused(pattern, model=None, **inputs):
    with pytest.raises(ValueError, match=pattern):
        run_node(ApplyRelactrl, model=pixart() if model is None else model, control=CONTROL, **inputs)


def test_what_does_not_fit_is_refused_at_the_node():
    samples = {"samples": LATENT}
    refused("an image with its VAE or a latent, and got neither")
    refused("and got both", image=torch.rand(1, 64, 64, 3), vae=Vae(), latent=samples)
    refused("needs a VAE", image=torch.rand(1, 64, 64, 3))
    refused(r"latents have 4 channels", latent={"samples": torch.zeros(1, 16, 32, 40)})
    refused("not finite", latent={"samples": torch.full((1, 4, 32, 40), float("nan"))})
    refused("RelaCtrl controls PixArt, and this MODEL is Flux", model_of("flux")[0], latent=samples)
    refused(
        f"width {WIDTH} with at least 21 blocks, and this one has width 1152 and 1 blocks",
        model_of("pixart")[0],
        latent=samples,
    )
    refused("start_percent 0.8 must not lie after end_percent 0.2", latent=samples, start_percent=0.8, end_percent=0.2)


def test_what_does_not_fit_is_refused_in_the_run():
    model = pixart()
    with pytest.raises(ValueError, match="a latent of 32 x 32 cells, and the noise has 40 x 32"):
        job()(controlled(model, torch.zeros(1, 4, 32, 32)))
    with pytest.raises(
        ValueError, match="21 x 17 = 357 tokens, no multiple of 4. Take a width and a height that 32 divides"
    ):
        job(latent=torch.zeros(1, 4, 34, 42))(controlled(model, torch.zeros(1, 4, 34, 42)))
    wrong = run_node(ApplyRelactrl, model=model, control=CONTROL, image=torch.rand(1, 64, 64, 3), vae=Vae(3))[0]
    with pytest.raises(ValueError, match="latents have 4 channels"):
        job()(wrong)
    positive, negative = conds(SPEC)
    corner = [[positive[0][0], {**positive[0][1], "area": (40, 40, 0, 8)}]]
    large = torch.zeros(1, 4, 40, 48)
    with pytest.raises(ValueError, match="480 tokens of its condition, and this prompt is computed on 400"):
        job(positive=corner, latent=large)(controlled(model, large))


def test_a_model_with_another_latent_space_is_told():
    model = pixart()
    feature = controlled(model).model_options["transformer_options"][FEATURES][-1]
    for kind, noted in (("SD15", 0), ("SDXL", 1)):
        patcher = SimpleNamespace(get_model_object={"latent_format": type(kind, (), {})()}.get)
        notes = feature.begin(Run((feature,), None, None, {}, None, patcher=patcher)).notes
        assert len(notes) == noted and all("this MODEL's is SDXL" in note for note in notes)
