"""FlowEdit: its formula by hand, that equal prompts and n_min 1 leave the source, and what it stands beside."""

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise
from flow_helper import Keep, digits, guider_of, half, sample, schedule, word
from nodes_helper import conds, error, facts, model_of, run_node, taylor

from tessera.methods.sampling.flow_edit import FlowEdit, span_of
from tessera.nodes.sampling.flowedit import Flowedit

EULER = comfy.samplers.sampler_object("euler")


def source(spec, batch=1):
    return torch.randn(batch, *spec.latent[1:], generator=torch.Generator().manual_seed(3))


def four(spec, same=False):
    names = ("source_positive", "source_negative", "target_positive", "target_negative")
    return dict(zip(names, (*conds(spec, 1), *conds(spec, 1 if same else 5)), strict=True))


def edited(model, spec, sigmas, same=False, latent=None, mask=None, callback=None, noise=None, **inputs):
    inputs = {"cfg_source": 2.0, "cfg_target": 2.0 if same else 4.0, **inputs}
    guider = run_node(Flowedit, model=model, **four(spec, same), **inputs)[0]
    latent = source(spec) if latent is None else latent
    return sample(guider, EULER, sigmas, latent, mask=mask, callback=callback, noise=noise)


@pytest.mark.parametrize("name", ["flux", "wan", "sd3"])
def test_equal_prompts_return_the_source(name):
    model, spec = model_of(name)
    assert error(edited(model, spec, schedule(3), same=True, n_avg=2), source(spec)) < 1e-6


def test_without_a_step_the_source_is_untouched():
    model, spec = model_of("flux")
    assert error(edited(model, spec, schedule(3), n_min=1.0), source(spec)) < 1e-6


class Given:
    seed = 7

    def generate_noise(self, latent):
        return torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(11))


def test_the_formula_by_hand():
    """From core's own guider under each pair of prompts, with the given noise at every step."""
    model, spec = model_of("flux")
    sigmas, prompts = schedule(3), four(spec)
    got = edited(model, spec, sigmas, noise=Given(), fresh_noise=False)
    x = model.model.process_latent_in(source(spec))
    noise, z = Given().generate_noise({"samples": x}), None
    for sigma, to in zip(sigmas, sigmas[1:], strict=False):
        z = x if z is None else z
        z_source = (1 - sigma) * x + sigma * noise
        v = []
        for at, side, cfg in ((z_source, "source", 2.0), (z_source + z - x, "target", 4.0)):
            one = guider_of(model, prompts[f"{side}_positive"], prompts[f"{side}_negative"], cfg)
            v.append((at - asked(one, at, sigma)) / sigma)
        z = z + (to - sigma) * (v[1] - v[0])
    assert error(got, model.model.process_latent_out(z)) < 1e-4


def asked(guider, x, sigma):
    """The clean latent that core's guider predicts from x at sigma."""

    class Once(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *rest, **more):
            self.clean = model_wrap(x, x.new_full((x.shape[0],), float(sigma)), **extra_args)
            return x

    once = Once()
    sample(guider, once, torch.tensor([float(sigma), 0.0]), torch.zeros_like(x))
    return once.clean


def test_the_tail_is_the_samplers_own_and_steps_are_told_in_order():
    model, spec = model_of("flux")
    keep = Keep()
    out = edited(model, spec, schedule(4), n_min=0.25, n_max=0.75, callback=keep)
    assert keep.steps == [1, 2, 3] and out.isfinite().all()
    assert error(out, edited(model, spec, schedule(4), n_min=0.25, n_max=1.0)) > 1e-3


def test_an_empty_edit_is_plain_sampling_from_the_noised_source():
    model, spec = model_of("flux")
    got = edited(model, spec, schedule(4), n_min=0.5, n_max=0.5, noise=Given(), fresh_noise=False)
    prompts = four(spec)
    guider = guider_of(model, prompts["target_positive"], prompts["target_negative"], 4.0)
    assert error(got, sample(guider, EULER, schedule(4)[2:], source(spec), noise=Given())) < 1e-5


def test_each_step_is_one_evaluation_of_two_streams():
    model, spec = model_of("flux")
    cached = taylor(model, interval=2, warmup=2, tail_full=1)
    out = edited(cached, spec, schedule(8))
    told = facts(cached)["decisions"]
    assert [d["step"] for d in told] == list(range(8)) and {d["kind"] for d in told} > {"full"}
    assert error(out, edited(model, spec, schedule(8))) < 0.5
    assert torch.equal(out, edited(cached, spec, schedule(8)))


def test_a_mask_holds_the_rest():
    model, spec = model_of("flux")
    mask = torch.zeros(1, 1, *spec.latent[2:])
    mask[..., :5] = 1
    for n_max in (1.0, 0.5):
        out = edited(model, spec, schedule(4), mask=mask, n_max=n_max)
        assert error(out[..., 5:], source(spec)[..., 5:]) < 1e-5
        assert error(out[..., :5], source(spec)[..., :5]) > 0.05


def test_rows_of_a_batch_do_not_know_of_each_other():
    model, spec = model_of("flux")
    two = source(spec, 2)
    given = {"fresh_noise": False}
    both = edited(model, spec, schedule(3), latent=two, noise=Rows(two), **given)
    each = [edited(model, spec, schedule(3), latent=row[None], noise=Rows(row[None]), **given) for row in two]
    assert error(both, torch.cat(each)) < 1e-5


class Rows:
    seed = 7

    def __init__(self, like):
        self.noise = like.flip(-1)

    def generate_noise(self, latent):
        return self.noise


def test_bfloat16_runs_near_full_precision():
    empty, made = torch.zeros(1, 16, 16, 16), []
    three = {"target_positive": word("three"), "target_negative": word("")}
    for m in (half(), digits()):
        guider = run_node(Flowedit, model=m, source_positive=word("seven"), source_negative=word(""), cfg_source=1.0,
                          cfg_target=2.0, **three)[0]  # fmt: skip
        made.append(sample(guider, EULER, schedule(4), empty))
    assert 0 < error(*made) < 0.05


def test_an_interrupt_leaves_nothing_behind():
    model, spec = model_of("flux")
    want = edited(model, spec, schedule(3))

    def stop(step, *rest):
        if step == 1:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        edited(model, spec, schedule(3), callback=stop)
    assert torch.equal(edited(model, spec, schedule(3)), want)


def test_a_seven_becomes_another_digit():
    empty, sigmas = torch.zeros(1, 16, 16, 16), schedule(8)
    seven = sample(guider_of(digits(), word("seven"), word(""), 2.0), EULER, sigmas, empty)
    three = {"target_positive": word("three"), "target_negative": word("")}
    guider = run_node(Flowedit, model=digits(), source_positive=word("seven"), source_negative=word(""), cfg_source=1.0,
                      cfg_target=2.0, **three)[0]  # fmt: skip
    assert error(sample(guider, EULER, sigmas, seven), seven) > 0.2


def test_what_cannot_be_edited_is_refused():
    model, spec = model_of("flux")
    with pytest.raises(ValueError, match=r"n_max 0.2 lies before n_min 0.5"):
        edited(model, spec, schedule(3), n_min=0.5, n_max=0.2)
    with pytest.raises(ValueError, match="FlowEdit needs sigmas that fall"):
        edited(model, spec, torch.tensor([1.0, 0.5]))
    model.add_object_patch("model_sampling", comfy.samplers.comfy.model_sampling.EPS())
    with pytest.raises(ValueError, match="Use a flow model"):
        edited(model, spec, schedule(3))


def test_spans():
    assert [span_of(10, a, b) for a, b in ((0, 1), (0.3, 0.7), (1, 1), (0.7, 0.2))] == [
        (0, 10),
        (3, 7),
        (10, 10),
        (7, 7),
    ]


def test_the_exact_edit_between_two_gaussians():
    """Of N(a, 1) and N(b, 1) the difference of the velocities is a - b everywhere the paths agree: z ends at x + b - a."""
    x, mean = torch.randn(4, 6, dtype=torch.float64), {"source": -1.0, "target": 2.0}
    edit = FlowEdit(x, lambda: torch.randn_like(x), 3)

    def predict(pairs, sigma):
        def clean(z, side):
            variance = (1 - sigma) ** 2 + sigma**2
            return mean[side] + (1 - sigma) / variance * (z - (1 - sigma) * mean[side])

        return [(clean(s, "source"), clean(t, "target")) for s, t in pairs]

    sigmas = [1 - i / 400 for i in range(401)]
    edit.run(predict, sigmas, range(400), lambda *told: None)
    assert (edit.z - (x + 3.0)).abs().max() < 0.02


def test_a_soft_mask_weakens_the_edit_and_not_what_the_model_sees():
    model, spec = model_of("flux")
    settings = {"noise": Given(), "fresh_noise": False, "cfg_source": 1.0, "cfg_target": 1.0}
    seen, spied = [], model.clone()

    def spy(apply, given):
        seen.append(given["input"].clone())
        return apply(given["input"], given["timestep"], **given["c"])

    spied.set_model_unet_function_wrapper(spy)
    edited(spied, spec, schedule(2, 0.8), mask=torch.full((1, 1, *spec.latent[2:]), 0.5), **settings)
    moved = seen[3] - seen[2]  # z - x after the first step
    seen.clear()
    edited(spied, spec, schedule(2, 0.8), **settings)
    assert error(moved, (seen[3] - seen[2]) / 2) < 1e-5


def test_given_frames_are_shown_as_core_shows_them():
    """LTX is told that they are clean: there the pairs hold the source itself, and not its noised form."""
    model, spec = model_of("ltxv_meta")
    mask = torch.ones(1, 1, *spec.latent[2:])
    mask[:, :, 0] = 0
    seen, spied = [], model.clone()

    def spy(apply, given):
        seen.append(given["input"].clone())
        return apply(given["input"], given["timestep"], **given["c"])

    spied.set_model_unet_function_wrapper(spy)
    out = edited(spied, spec, schedule(2, 0.8), mask=mask, cfg_source=1.0, cfg_target=1.0)
    clean = model.model.process_latent_in(source(spec))
    assert len(seen) == 4 and all(error(x[:, :, 0], clean[:, :, 0]) < 1e-6 for x in seen)
    assert all(error(x[:, :, 1:], clean[:, :, 1:]) > 0.1 for x in seen)
    assert error(out[:, :, 0], source(spec)[:, :, 0]) < 1e-6 and error(out, source(spec)) > 1e-3


def test_the_largest_seed():
    model, spec = model_of("flux")
    assert edited(model, spec, schedule(2), noise=Noise_RandomNoise(2**64 - 1)).isfinite().all()
