"""Trains the LoRA of an EasyControl condition on pairs of latents, through the shared runner: the same two passes as in
sampling, with gradients, and flow matching's error of the velocity."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.model_management
import comfy.samplers
import torch

from ..methods.control.easycontrol import EasyControlWeights, Lora, fresh
from .control import to_model
from .easycontrol import EasyControlFeature
from .run import attach, features_of
from .sampling import Job, Progress, sample

NAME = "Train EasyControl"
WARM_UP, LAST_RATE = 0.05, 0.1  # share of the steps; of the learning rate, at the end
CLIP = 1.0  # norm of the gradient
MARK = "tessera_prompt"
WHOLE = {
    "area": None,
    "mask": None,
    "start_percent": 0.0,
    "end_percent": 1.0,
}  # of a prompt for all of picture and steps


@dataclass(frozen=True)
class Settings:
    """rank of the LoRA; steps of the optimizer; batch of pairs a step; learning rate; share of steps without prompt."""

    rank: int = 16
    steps: int = 300
    batch: int = 8
    rate: float = 1e-3
    prompt_dropout: float = 0.1
    seed: int = 0
    subject: bool = False


@dataclass
class Pairs:
    """targets [n, C, h, w] and conditions [n, C, h', w'] as the model sees latents; prompts: a CONDITIONING entry each."""

    targets: torch.Tensor
    conditions: torch.Tensor
    prompts: list[Any]


def pairs_of(model, targets: list[Any], conditions: list[Any], prompts: list[Any]) -> Pairs:
    """From lists of LATENT and of CONDITIONING: the pictures of the i-th latent belong to the i-th prompt, one to all of
    them or one to each. ValueError, one sentence with the numbers, where they do not fit together."""
    made, seen = ([latent["samples"] for latent in part] for part in (targets, conditions))
    for name, part in (("targets", made), ("conditions", seen)):
        if len({tuple(x.shape[1:]) for x in part}) > 1:
            raise ValueError(
                f"{NAME} needs {name} of one size, got {sorted({tuple(x.shape[1:]) for x in part})}. Resize them."
            )
    counts = [len(x) for x in made], [len(x) for x in seen]
    if not sum(counts[0]) or sum(counts[0]) != sum(counts[1]):
        raise ValueError(f"{NAME} got {sum(counts[0])} targets and {sum(counts[1])} conditions. Give one for each.")
    if len(prompts) == 1:
        prompts = prompts * len(made)
    if len(prompts) != len(made):
        raise ValueError(
            f"{NAME} got {len(prompts)} prompts for {len(made)} lists of targets. Give one for each, or one."
        )
    entries: list[Any] = []
    for prompt, count in zip(prompts, counts[0], strict=True):
        prompt = _single(prompt, count)
        if len(prompt) not in (1, count):
            raise ValueError(
                f"{NAME} got a prompt of {len(prompt)} entries for {count} targets. Give one, or one a target."
            )
        entries += [prompt[i if len(prompt) == count else 0] for i in range(count)]
    return Pairs(to_model(model, torch.cat(made), NAME), to_model(model, torch.cat(seen), NAME), entries)


def _single(prompt: list[Any], count: int) -> list[Any]:
    """A prompt whose one entry has a row for each of so many targets, as entries of one row."""
    partial = [n for n, all_of_it in WHOLE.items() for _, extra in prompt if not _is(extra.get(n), all_of_it)]
    if partial:
        raise ValueError(
            f"{NAME} takes prompts for the whole picture and all steps, and one has {partial[0]}. Connect it before that is set."
        )
    rows = {len(context) for context, _ in prompt}
    if rows <= {1}:
        return prompt
    if len(prompt) > 1 or rows != {count}:
        raise ValueError(
            f"{NAME} got a prompt of {max(rows)} rows in one entry for {count} targets. Give one, or one a target."
        )
    context, extra = prompt[0]
    return [
        [
            context[i : i + 1],
            {n: v[i : i + 1] if torch.is_tensor(v) and len(v) == count else v for n, v in extra.items()},
        ]
        for i in range(count)
    ]


def _is(value: Any, wanted: Any) -> bool:
    return value is None or (wanted is not None and value == wanted)


@dataclass
class Batch:
    """What this step trains on: the conditions [b, C, h, w] of its rows."""

    conditions: torch.Tensor


@dataclass(frozen=True, eq=False)
class TrainedFeature(EasyControlFeature):
    """The condition of whatever batch is trained on."""

    batch: Batch = field(default_factory=lambda: Batch(torch.empty(0)))

    def condition(self) -> torch.Tensor:
        return self.batch.conditions


def _check_prompts(entries: list[dict[str, Any]]) -> None:
    """ValueError where prompts cannot be rows of one call."""
    first, *others = (entry["model_conds"] for entry in entries)
    for other in others:
        if first.keys() != other.keys() or not all(first[name].can_concat(other[name]) for name in first):
            lengths = sorted({entry["model_conds"]["c_crossattn"].cond.shape[1] for entry in entries})
            told = (
                f"of {', '.join(map(str, lengths))} tokens"
                if len(lengths) > 1
                else "with unlike things beside the text"
            )
            raise ValueError(f"{NAME} got prompts {told}, which do not go into one batch. Set batch_size to 1.")


def _joined(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Processed conditions of single rows as one of so many."""
    first = entries[0]
    conds = {
        name: type(cond)(cond.concat([entry["model_conds"][name] for entry in entries[1:]]))
        for name, cond in first["model_conds"].items()
    }
    return {**first, "model_conds": conds}


class Trainer(comfy.samplers.Sampler):
    """Stands in for a sampler: where that would denoise, this one learns."""

    def __init__(self, pairs: Pairs, batch: Batch, parameters: list[torch.Tensor], settings: Settings, on_step):
        self.pairs, self.batch, self.parameters, self.settings = pairs, batch, parameters, settings
        self.on_step = on_step
        self.losses: list[float] = []
        self.generator = torch.Generator().manual_seed(settings.seed)

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):  # fmt: skip
        entries = {entry[MARK]: entry for entry in model_wrap.conds["positive"]}
        if self.settings.batch > 1:
            _check_prompts([entry for number, entry in entries.items() if number >= 0])
        optimizer = torch.optim.AdamW(self.parameters, lr=self.settings.rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        for _ in range(self.settings.steps):
            optimizer.zero_grad(set_to_none=True)
            with torch.autograd.graph.allow_mutation_on_saved_tensors():  # the stock FLUX writes into its streams
                loss = self.loss(model_wrap, entries, extra_args, noise.device)
                loss.backward()
            if not torch.isfinite(loss):
                raise ValueError(
                    f"The error of {NAME} is not finite after {len(self.losses)} steps; lower learning_rate."
                )
            torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
            optimizer.step()
            schedule.step()
            self.losses.append(float(loss.detach()))
            self.on_step()
        return latent_image

    def rate(self, step: int) -> float:
        """Of the learning rate: rises, then falls along half a cosine."""
        rising = max(1, round(WARM_UP * self.settings.steps))
        if step < rising:
            return (step + 1) / rising
        part = (step - rising) / max(1, self.settings.steps - rising)
        return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * part))

    def loss(self, model_wrap, entries: dict[int, Any], extra_args: dict[str, Any], device) -> torch.Tensor:
        """Mean squared error of the velocity for one batch. For a flow it is that of the clean latent over sigma^2."""
        chosen = torch.randperm(len(self.pairs.targets), generator=self.generator)[: self.settings.batch]
        silent = torch.rand(1, generator=self.generator) < self.settings.prompt_dropout
        numbers = [-1 if silent and -1 in entries else int(i) for i in chosen]
        model_wrap.conds["positive"] = [_joined([entries[i] for i in numbers])]
        clean = self.pairs.targets[chosen].to(device)
        self.batch.conditions = self.pairs.conditions[chosen]
        sampling = model_wrap.inner_model.model_sampling
        percents = torch.rand(len(chosen), generator=self.generator).tolist()
        sigma = torch.tensor([float(sampling.percent_to_sigma(p)) for p in percents], device=device)
        noise = torch.randn(clean.shape, generator=self.generator).to(device)
        noisy = sampling.noise_scaling(sigma, noise, clean, False)
        found = model_wrap(noisy, sigma, **extra_args)
        spread = sigma.reshape(-1, *[1] * (clean.ndim - 1))
        return ((found.float() - clean) / spread).square().mean()


def trainable(model):
    """A copy of the MODEL with weights that autograd takes: those of ComfyUI's loaders do not."""
    if features_of(model.model_options):
        names = ", ".join(dict.fromkeys(f.name for f in features_of(model.model_options)))
        raise ValueError(f"{NAME} needs a plain MODEL, and this one has {names} on it. Connect the loader itself.")
    try:
        copy = model.clone(force_deepcopy=True)
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{NAME} has to load a second copy of the MODEL, and its file cannot be opened again ({error}). Load it with "
            "core's Load Diffusion Model."
        ) from error
    copy.model.requires_grad_(False)
    return copy


def train(
    model, node: str | None, targets: list[Any], conditions: list[Any], prompts: list[Any], negative: Any, settings
) -> tuple[EasyControlWeights, list[float]]:
    """(weights on the CPU as a file holds them, loss of every step)."""
    pairs = pairs_of(model, targets, conditions, prompts)
    with torch.inference_mode(False), torch.enable_grad():
        copy = trainable(model)
        network = copy.model.diffusion_model
        sizes = len(network.double_blocks), len(network.single_blocks), network.hidden_size
        weights = fresh(*sizes, settings.rank, torch.Generator().manual_seed(settings.seed))
        leaves = _leaves(weights, copy.load_device)
        size = min(settings.batch, len(pairs.targets))
        batch = Batch(pairs.conditions[:size].clone())
        feature = TrainedFeature(node, NAME, weights=leaves, subject=settings.subject, cache="recompute", batch=batch)
        parameters = list(leaves.tensors().values())
        progress = Progress(settings.steps)
        settings = replace(settings, batch=size)
        pairs = Pairs(pairs.targets.clone(), pairs.conditions.clone(), pairs.prompts)
        trainer = Trainer(pairs, batch, parameters, settings, progress.step)
        before, comfy.model_management.in_training = comfy.model_management.in_training, True
        try:
            sample(attach(copy, feature), _job(trainer, pairs, size, negative))
        finally:
            comfy.model_management.in_training = before
    made = _plain(leaves)
    return made, trainer.losses


def _leaves(weights: EasyControlWeights, device: torch.device) -> EasyControlWeights:
    return _each(weights, lambda t: t.clone().to(device).requires_grad_())


def _plain(weights: EasyControlWeights) -> EasyControlWeights:
    return _each(weights, lambda t: t.detach().cpu().bfloat16())


def _each(weights: EasyControlWeights, change) -> EasyControlWeights:
    """The same LoRA with every tensor changed."""
    blocks = (
        tuple({part: Lora(change(lora.down), change(lora.up)) for part, lora in block.items()} for block in part)
        for part in (weights.double, weights.single)
    )
    return EasyControlWeights(*blocks, weights.name, weights.subject)


def _job(trainer: Trainer, pairs: Pairs, size: int, negative: Any) -> Job:
    """A run of the trainer as a sampler: prompts marked with the numbers of their pairs, -1 for the empty one."""
    prompts = [[c.clone(), {**extra, MARK: i}] for i, (c, extra) in enumerate(pairs.prompts)]
    if negative:
        prompts.append([negative[0][0].clone(), {**negative[0][1], MARK: -1}])
    latent = {"samples": torch.zeros(size, *pairs.targets.shape[1:])}
    return Job(prompts, [], latent, trainer, torch.tensor([1.0, 0.0]), _Silence(), 1.0)


class _Silence:
    """NOISE of a run that draws its own."""

    seed = 0

    def generate_noise(self, latent: dict[str, Any]) -> torch.Tensor:
        return torch.zeros_like(latent["samples"])
