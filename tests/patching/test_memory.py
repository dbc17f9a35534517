"""What a cache will hold is part of what core reserves before it loads the weights."""

import comfy.model_management
import pytest
import torch
from nodes_helper import Job, facts, model_of, taylor


@pytest.fixture
def asked(monkeypatch):
    """The bytes that core reserves, one entry a run."""
    found = []
    load = comfy.model_management.load_models_gpu

    def load_models_gpu(models, memory_required=0, **rest):
        found.append(memory_required)
        return load(models, memory_required=memory_required, **rest)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load_models_gpu)
    return found


@pytest.mark.parametrize("level", ["last_block", "output"])
@pytest.mark.parametrize("name", ["flux", "wan_meta", "sd3", "ltxv_meta", "lumina2", "qwen_image", "hunyuan_video"])
def test_held_bytes_are_reserved(asked, name, level):
    model, spec = model_of(name)
    Job(spec)(model)
    patched = taylor(model, level=level, order=2)
    Job(spec)(patched)
    plain, cached = asked
    held = facts(patched)["peak_bytes"]
    assert held <= cached - plain <= 2 * held


def test_latents_packed_into_one_row_are_counted_as_tokens_not_as_numbers(asked):
    """LTX-2: video and sound; their numbers would be a hundred times more."""
    model, spec = model_of("ltxav_meta")
    Job(spec)(model)
    patched = taylor(model, order=2)
    Job(spec)(patched)
    held = facts(patched)["peak_bytes"]
    assert held / 3 <= asked[1] - asked[0] <= 3 * held


@pytest.mark.parametrize("settings", [{"interval": 1}, {"cache_device": "cpu"}])
def test_nothing_is_reserved_that_is_not_held_there(asked, settings):
    model, spec = model_of("flux")
    Job(spec)(model)
    Job(spec)(taylor(model, **settings))
    assert asked[0] == asked[1]


def test_the_conditions_come_back_as_they_were(asked):
    """The stand-in that carries the number is gone before sampling."""
    model, spec = model_of("flux")
    patched, seen = taylor(model), []

    def spy(executor, *args, **kwargs):
        seen.append(set(executor.class_obj.conds))
        return executor(*args, **kwargs)

    patched.add_wrapper_with_key("predict_noise", "spy", spy)
    assert torch.isfinite(Job(spec, steps=2)(patched)).all()
    assert all(found == {"positive", "negative"} for found in seen) and seen
