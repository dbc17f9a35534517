"""Train EasyControl: its gradient is that of the one masked sequence, the MODEL stays as it was, the file loads."""

import atexit
from pathlib import Path

import pytest
import torch
from easycontrol_helper import Condition, forward
from nodes_helper import Job, run_node, taylor
from tiny_models import conds, load, write_checkpoint
from tiny_specs import SPECS

import comfy.model_management  # isort: skip
import folder_paths  # isort: skip

from tessera.methods.control.easycontrol import expected, fresh
from tessera.methods.weight_files import read_weights
from tessera.nodes.control.apply_easycontrol import ApplyEasycontrol
from tessera.nodes.control.load_easycontrol import LoadEasycontrol
from tessera.nodes.control.train_easycontrol import TrainEasycontrol
from tessera.patching import train_easycontrol as module

SIZES = (2, 2, 128)
KEPT: list = []
atexit.register(KEPT.clear)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "controlnet", ([str(tmp_path / "own")], {".safetensors"}))
    (tmp_path / "own").mkdir()
    return tmp_path / "own"


def model_of(name):
    """As Load Diffusion Model gives it, from a file that stays: training loads it again."""
    path = Path(folder_paths.get_folder_paths("controlnet")[0]).parent / "models" / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    write_checkpoint(SPECS[name], path)
    model = load(path)
    KEPT.append(model)  # a MODEL that dies while it is loaded costs core a full collection
    return model, SPECS[name]


def latents(count, seed, h=8, w=8):
    return {"samples": torch.randn(count, 16, h, w, generator=torch.Generator().manual_seed(seed))}


def prompt(tokens, rows=1, seed=1, **extra):
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(rows, 64, generator=generator)
    return [torch.randn(rows, tokens, 96, generator=generator), {"pooled_output": pooled, **extra}]


def trained(model, spec, **inputs):
    given = {"targets": [latents(3, 1)], "conditions": [latents(3, 2, 4, 4)], "positive": [conds(spec)[0]], "rank": [4]}
    given |= {"steps": [1], "batch_size": [2], "learning_rate": [1e-3], "prompt_dropout": [0.0], "seed": [3]}
    given |= {"mode": ["spatial"], "filename": ["mine"]} | inputs
    return run_node(TrainEasycontrol, model=[model], **given)


def test_the_first_step_goes_against_the_gradient_of_the_masked_sequence(folder, monkeypatch):
    """AdamW's first step is the learning rate against the sign of the gradient, here with up not at zero."""
    model, spec = model_of("flux")
    start = fresh(*SIZES, 4, torch.Generator().manual_seed(0))
    for block in (*start.double, *start.single):
        for lora in block.values():
            lora.up.normal_(generator=torch.Generator().manual_seed(9)).mul_(0.05)
    monkeypatch.setattr(module, "fresh", lambda *args: start)
    before = {key: t.clone() for key, t in start.tensors().items()}
    steps = []
    kept = module.Trainer.loss

    def loss(self, wrap, entries, extra, device):
        hook = wrap.inner_model.diffusion_model.register_forward_pre_hook(
            lambda m, args, kwargs: steps.append({**dict(zip(("x", "timestep"), args, strict=False)), **kwargs}), with_kwargs=True
        )  # fmt: skip
        try:
            return kept(self, wrap, entries, extra, device)
        finally:
            hook.remove()
            steps.append(self.batch.conditions)

    monkeypatch.setattr(module.Trainer, "loss", loss)
    monkeypatch.setattr(module, "_plain", lambda weights: module._each(weights, lambda t: t.detach().clone()))
    rate = 1e-3
    monkeypatch.setattr(module.Trainer, "rate", lambda self, step: 1.0)
    weights = trained(model, spec, learning_rate=[rate])[0]
    call, cond = next(s for s in steps if isinstance(s, dict) and s["context"].shape[1] > 1), steps[-1]
    chosen = torch.randperm(3, generator=torch.Generator().manual_seed(3))[:2]
    with torch.inference_mode(False), torch.enable_grad():
        leaves = {key: t.clone().requires_grad_() for key, t in before.items()}
        network = model.model.diffusion_model
        given = [call[n].clone() for n in ("x", "timestep", "context", "y", "guidance")]
        velocity = forward(network, *given, [Condition(cond.clone(), leaves)])
        clean = model.model.process_latent_in(latents(3, 1)["samples"])[chosen].clone()
        sigma = given[1].reshape(-1, 1, 1, 1)
        noise = (given[0] - (1 - sigma) * clean) / sigma
        (velocity - (noise - clean)).square().mean().backward()
    for key, t in weights.tensors().items():
        went, slope = t - before[key], leaves[key].grad
        clear = slope.abs() > 1e-2 * slope.abs().max()
        if "single_transformer_blocks.1" in key and ".q_loras" in key:
            continue  # the last block's queries of the condition reach nothing
        assert clear.any() and torch.equal(went[clear].sign(), -slope[clear].sign()), key
        assert torch.allclose(went[clear].abs(), torch.full_like(went[clear], rate), rtol=0.1)


def test_learns_and_leaves_the_model_alone(folder):
    model, spec = model_of("flux")
    plain = Job(spec, steps=2)(model)
    made = trained(model, spec, steps=[40], batch_size=[3], learning_rate=[2e-2], negative=[conds(spec)[1]])
    losses = made[2]["losses"]
    assert len(losses) == 40 and sum(losses[-10:]) < 0.95 * sum(losses[:10])
    assert torch.equal(Job(spec, steps=2)(model), plain)
    assert not comfy.model_management.in_training
    path = Path(made[1])
    tensors, metadata = read_weights(path, "")
    assert {key: tuple(t.shape) for key, t in tensors.items()} == expected(*SIZES, 4)
    loaded = run_node(LoadEasycontrol, file=path.name)[0]
    assert loaded.subject is False and metadata["tessera_mode"] == "spatial"
    both = [
        Job(spec, steps=2)(run_node(ApplyEasycontrol, model=model, easycontrol=w, latent=latents(1, 5, 4, 4))[0])
        for w in (made[0], loaded)
    ]
    assert torch.equal(*both) and not torch.equal(both[0], plain)


def test_an_interrupt_leaves_nothing_behind(folder, monkeypatch):
    model, spec = model_of("flux")
    plain = Job(spec, steps=2)(model)
    monkeypatch.setattr(module.Progress, "step", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained(model, spec, steps=[5])
    assert not comfy.model_management.in_training and not list(folder.iterdir())
    assert torch.equal(Job(spec, steps=2)(model), plain)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"conditions": [latents(2, 2)]}, "3 targets and 2 conditions"),
        ({"targets": [latents(2, 1), latents(1, 1, 6, 6)]}, "one size"),
        ({"conditions": [{"samples": torch.zeros(3, 4, 4, 4)}]}, "16 channels"),
        ({"filename": ["../mine"]}, "without a folder"),
        ({"targets": [latents(0, 1)], "conditions": [latents(0, 2)]}, "0 targets and 0 conditions"),
        ({"positive": [[prompt(10), prompt(14), prompt(10)]]}, "prompts of 10, 14 tokens.* Set batch_size to 1"),
        (
            {
                "positive": [
                    [prompt(10), prompt(10, guidance=2.0, reference_latents=[latents(1, 3)["samples"]]), prompt(10)]
                ]
            },
            "unlike",
        ),
        ({"positive": [[prompt(10, rows=2)]]}, "2 rows in one entry for 3 targets"),
        ({"positive": [[prompt(10, start_percent=0.5)]]}, "all steps, and one has start_percent"),
    ],
)
def test_what_does_not_fit_is_told(folder, inputs, words):
    model, spec = model_of("flux")
    with pytest.raises(ValueError, match=words):
        trained(model, spec, **inputs)


def test_a_patched_model_is_refused(folder):
    model, spec = model_of("flux")
    with pytest.raises(ValueError, match="plain MODEL, and this one has Taylor Cache"):
        trained(taylor(model), spec)


def test_rows_of_one_prompt_belong_to_the_targets(folder):
    model, spec = model_of("flux")
    context, extra = prompt(10, rows=3)
    rows = [[context[i : i + 1], {"pooled_output": extra["pooled_output"][i : i + 1]}] for i in range(3)]
    made = [trained(model, spec, positive=[p], steps=[2])[2]["losses"] for p in ([[context, extra]], rows, rows[:1])]
    assert made[0] == made[1] != made[2]
