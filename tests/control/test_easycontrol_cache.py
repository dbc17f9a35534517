"""What EasyControl holds for a run stays right where weights, inputs or the pictures of a call change within it."""

import comfy.context_windows as windows
import comfy.hooks
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from easycontrol_nodes import NAME, applied, latent
from nodes_helper import Job, error, facts, model_of
from tiny_models import conds


def scheduled(positive):
    """The prompt under a LoRA hook whose strength changes in the middle of the run."""
    generator = torch.Generator().manual_seed(2)
    names = {"double_blocks.0.img_attn.qkv": 384, "single_blocks.0.linear1": 896}
    lora = {
        f"diffusion_model.{n}.lora_up.weight": torch.randn(o, 4, generator=generator) * 0.2 for n, o in names.items()
    }
    lora |= {f"diffusion_model.{n}.lora_down.weight": torch.randn(4, 128, generator=generator) * 0.2 for n in names}
    hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=1.0, strength_clip=0.0)
    frames = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((1.0, 0.0), (0.2, 0.5)):
        frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hooks.set_keyframes_on_hooks(frames)
    return comfy.hooks.set_hooks_for_conditioning(positive, hooks)


def test_a_scheduled_lora_hook_renews_the_keys():
    model, spec = model_of("flux")
    job = Job(spec, steps=6, positive=scheduled(conds(spec)[0]))
    kept, again = applied(model), applied(model, cache="recompute")
    assert torch.equal(job(kept), job(again))
    assert facts(kept, NAME)["passes"] == 3 and facts(again, NAME)["passes"] == 12


def test_guidance_that_another_pack_moves_renews_the_keys():
    model, spec = model_of("flux")
    seen = []

    def theirs(executor, *args, **kwargs):
        seen.append(kwargs["guidance"])
        return executor(*args, **{**kwargs, "guidance": kwargs["guidance"] * (2 if len(seen) > 2 else 1)})

    def run(**inputs):
        seen.clear()
        patched = applied(model, **inputs)
        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "theirs", theirs)
        return Job(spec, steps=4, cfg=1.0)(patched), facts(patched, NAME)

    (got, told), (want, _) = run(), run(cache="recompute")
    assert torch.equal(got, want) and told["passes"] == 2


@pytest.mark.parametrize("overlap", [0, 1])
def test_windows_over_the_batch_get_the_conditions_of_their_pictures(overlap):
    model, spec = model_of("flux")
    schedule, fuse = (
        windows.get_matching_context_schedule("standard_static"),
        windows.get_matching_fuse_method("pyramid"),
    )
    cut = applied(model, samples=latent(batch=4))
    cut.model_options["context_handler"] = windows.IndexListContextHandler(schedule, fuse, 2, overlap)
    job = Job(
        spec, steps=2, batch=4, noise=torch.randn(4, *spec.latent[1:], generator=torch.Generator().manual_seed(3))
    )
    assert error(job(cut), job(applied(model, samples=latent(batch=4)))) < 1e-5
