"""Samples a video block by block: each block is denoised, then passed through the network once more, so that the memory of
the blocks to come holds it clean. The memory is exchangeable (block_memory.py), and so is what denoises a block."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import torch

from .. import archs
from ..methods.video import blocks as plan
from . import block_stop
from .block_memory import CURRENT, Block, BlockMemory
from .block_window import FRAMES, BlockWindow
from .cache import EASYCACHE
from .run import RUN
from .video_state import Snapshot, VideoState

MakeMemory = Callable[[Any, dict[str, Any]], BlockMemory]  # of the guider and the run's transformer_options


@dataclass
class BlockSampler(comfy.samplers.Sampler):
    """SAMPLER. inner: what denoises a block; None: to the clean latent and noised anew at each step, as block-causal models
    are distilled to. prompts: (number of the block from which it stands for the guider's positive, CONDITIONING)."""

    name: str  # of the node, for its errors
    per_block: int  # frames
    memory: MakeMemory
    inner: Any = None
    context_noise: float = 0.0
    prompts: list[tuple[int, Any]] = field(default_factory=list)
    resume: Snapshot | None = None
    keep: VideoState | None = None  # where the state goes when the run ends
    node: str | None = None  # its id in the graph

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        """noise, latent_image [B, C, T, H, W] -> the finished frames [B, C, T or fewer, H, W]."""
        self._check(noise, sigmas, extra_args["model_options"])
        if self.keep is not None:
            self.keep.snapshot = None
        with block_stop.watch(self.node) as watched:
            loop = _Loop(self, model_wrap, sigmas, extra_args, callback, noise, latent_image, denoise_mask)
            return loop.run(watched)

    def _check(self, noise: torch.Tensor, sigmas: torch.Tensor, model_options: dict[str, Any]) -> None:
        if noise.ndim != 5:
            raise ValueError(
                f"{self.name} needs a video latent [B, C, T, H, W], got {[*noise.shape]}; connect an empty video latent."
            )
        if len(sigmas) < 2 or float(sigmas[-1]) != 0 or not (sigmas[:-1] > 0).all():
            raise ValueError(
                f"{self.name} needs sigmas above 0 that end at 0, because a finished block is what the next one goes on from; got "
                f"{[round(float(s), 4) for s in sigmas]}."
            )
        if model_options.get("context_handler") is not None:
            raise ValueError(
                f"{self.name} and core's context windows both cut the clip into parts; take one of them off."
            )
        if EASYCACHE in model_options.get("transformer_options", {}):
            raise ValueError(
                f"{self.name}: core's EasyCache and LazyCache compare a block with the one before. Use Taylor Cache or Step Cache in "
                "their place."
            )

    def fits(self, snapshot: Snapshot, shape: tuple[int, ...], model: str, memory: str) -> None:
        """ValueError where the state is not of this clip."""
        kept = tuple(snapshot.latent.shape)
        if snapshot.model != model:
            raise ValueError(
                f"{self.name} got a video state of {snapshot.model}, and this MODEL is {model}. Load that model."
            )
        if snapshot.memory != memory:
            raise ValueError(
                f"{self.name} got a video state kept by {snapshot.memory}, and this sampler keeps {memory}. Use the sampler and "
                "the memory that it was made with."
            )
        if kept[:2] + kept[3:] != shape[:2] + shape[3:]:
            raise ValueError(
                f"{self.name} got a video state of a latent {[*kept]}, which does not continue in one of {[*shape]}; batch, "
                "channels, height and width must be the same."
            )
        if shape[FRAMES] <= kept[FRAMES]:
            raise ValueError(
                f"{self.name}: the state holds {kept[FRAMES]} finished frames, and the latent has {shape[FRAMES]}. Give it a "
                "latent of the whole new length."
            )


class _Loop:
    """One run."""

    def __init__(self, sampler: BlockSampler, guider, sigmas, extra_args, callback, noise, latent_image, mask):
        self.sampler, self.guider, self.sigmas, self.callback = sampler, guider, sigmas, callback
        self.noise, self.latent, self.mask = noise, latent_image, mask
        self.seed = extra_args.get("seed") or 0
        self.options = comfy.model_patcher.create_model_options_clone(extra_args["model_options"])
        self.transformer = self.options.setdefault("transformer_options", {})
        self.memory = sampler.memory(guider, self.transformer)
        self.window = self.options["context_handler"] = BlockWindow(tuple(noise.shape))
        self.out = torch.zeros_like(noise)
        self.start = self._start()
        self.boundaries = self._begin()
        self.prompts = self._encoded()

    def _start(self) -> torch.Tensor | None:
        """Frames of core's AR Video I2V node, which are a block of their own before the first one that is made."""
        given = self.transformer.get("ar_config", {}).get("initial_latent")
        if given is None:
            return None
        given = self.guider.inner_model.process_latent_in(given).to(self.noise)
        if given.shape[3:] != self.noise.shape[3:] or given.shape[FRAMES] >= self.noise.shape[FRAMES]:
            raise ValueError(
                f"{self.sampler.name}: the start image's latent {[*given.shape]} does not begin a clip {[*self.noise.shape]}; give both "
                "one size, and the clip more frames."
            )
        return given.expand(self.noise.shape[0], -1, -1, -1, -1)

    def _begin(self) -> list[int]:
        """The blocks of this run; the finished ones of a state are put in place."""
        resume, frames, per_block = self.sampler.resume, self.noise.shape[FRAMES], self.sampler.per_block
        if resume is None:
            if self.start is None:
                return plan.split(frames, per_block, self.memory.lead)
            given = self.start.shape[FRAMES]
            self.out[:, :, :given] = self.start
            return [0, *(given + at for at in plan.split(frames - given, per_block))]
        self.sampler.fits(resume, tuple(self.noise.shape), self._model(), type(self.memory).__name__)
        self.memory.restore(resume.tensors, resume.facts, self.noise.device)
        self.out[:, :, : resume.frames] = resume.latent.to(self.out)
        return plan.continued(frames, per_block, resume.boundaries, self.memory.lead)

    def _model(self) -> str:
        return archs.class_name(self.guider.inner_model.diffusion_model)

    def _encoded(self) -> list[tuple[int, list[dict]]]:
        """The further prompts as the model takes them."""
        found, own = [], len(self.guider.conds.get("positive") or ())
        for start, conditioning in self.sampler.prompts:
            conds = comfy.sampler_helpers.convert_cond(conditioning)
            what = f"{self.sampler.name}: the prompt from block {start}"
            if len(conds) != own:
                raise ValueError(f"{what} has {len(conds)} conditions and the guider's has {own}; give them as many.")
            if any(name in cond for cond in conds for name in ("control", "hooks")):
                raise ValueError(f"{what} carries a ControlNet or hooks; only the guider's own prompt can bring these.")
            made = comfy.samplers.process_conds(
                self.guider.inner_model,
                self.noise,
                {"positive": conds},
                self.noise.device,
                self.latent,
                self.mask,
                self.seed,
            )
            found.append((start, made["positive"]))
        return sorted(found, key=lambda entry: entry[0])

    def run(self, watched: block_stop.Watched) -> torch.Tensor:
        blocks = plan.pairs(self.boundaries)
        begun = 0 if self.sampler.resume is None else len(self.sampler.resume.boundaries) - 1
        done = begun
        for number in range(begun, len(blocks)):
            comfy.model_management.throw_exception_if_processing_interrupted()
            watched.tell(number, len(blocks))
            block = Block(number, *blocks[number], self.noise.shape[FRAMES], self.boundaries)
            self._block(block, len(blocks) - begun, number - begun)
            done = number + 1
            ends = done == len(blocks) or watched.asked
            self._tell(block, len(blocks) - begun, number - begun, ends)
            if self.memory.commits and not (ends and self.sampler.keep is None):
                self._commit(block)
            self.memory.finished(block)
            if watched.asked and not ends:  # asked for in that evaluation: no further block is begun
                ends = True
                self._tell(block, len(blocks) - begun, number - begun, ends)
            if ends:
                break
        if self.sampler.keep is not None:
            self._keep(self.boundaries[: done + 1])
        return self.out[:, :, : self.boundaries[done]]

    def _show(self, block: Block) -> None:
        """The network's next evaluations are of this block."""
        block.prefix = self.memory.prefix(self.boundaries, block.first)
        clean = self.out[:, :, block.prefix] if block.prefix else None
        began = [made for start, made in self.prompts if start <= block.number]
        self.window.show(block, clean, (self.guider.conds.get("positive"), began[-1]) if began else None)
        self.transformer[CURRENT] = block
        if (run := self.transformer.get(RUN)) is not None:
            run.whole = block.commit  # no cache may answer where the memory stores
        self.memory.open(self.transformer, block)

    def _block(self, block: Block, blocks: int, nth: int) -> None:
        """Denoises one block into its place."""
        at = slice(block.first, block.last)
        noise, latent, steps = self.noise[:, :, at], self._part(self.latent, at), len(self.sigmas) - 1
        mask = None if self.mask is None else self._part(self.mask, at)

        def told(step, x0, x, total):
            if self.callback is not None and step < steps - 1:
                self.callback(nth * steps + step, x0, x, blocks * steps)

        if block.number == 0 and self.start is not None:
            pass  # in place already
        elif mask is not None and latent is not None and not mask.any():
            self.out[:, :, at] = latent  # frames that are given
        else:
            self._show(block)
            inner = self.sampler.inner or comfy.samplers.KSAMPLER(renoising)
            arguments = {"model_options": self.options, "seed": self._seed(block)}
            self.out[:, :, at] = inner.sample(
                self.guider, self.sigmas.clone(), arguments, told, noise, latent, mask, True
            )

    def _tell(self, block: Block, blocks: int, nth: int, ends: bool) -> None:
        """The preview of a finished block: core's shows the first frame that it is given. What comes last is the clip."""
        if self.callback is not None:
            steps, made = len(self.sigmas) - 1, self.out[:, :, 0 if ends else block.first : block.last]
            self.callback((nth + 1) * steps - 1, made, made, blocks * steps)

    def _seed(self, block: Block) -> int:
        return plan.seed_of(self.seed, max(block.number - (self.start is not None), 0))

    def _part(self, tensor: torch.Tensor | None, at: slice) -> torch.Tensor | None:
        """A block's frames of what has all of them."""
        whole = tensor is not None and tensor.shape[FRAMES] == self.noise.shape[FRAMES]
        return tensor[:, :, at] if whole and tensor is not None else tensor

    def _commit(self, block: Block) -> None:
        """One evaluation of the finished block, in which the memory stores."""
        block.commit = True
        self._show(block)
        x, level = self.out[:, :, block.first : block.last], self.sampler.context_noise
        if level:
            x = plan.renoise(x, level, self._seed(block), 0, len(self.sigmas) - 1)
        sigma = self.sigmas.new_full((x.shape[0],), level)
        self.guider(x, sigma, model_options=self.options, seed=self._seed(block))
        block.commit = False

    def _keep(self, boundaries: list[int]) -> None:
        tensors, facts = self.memory.state()
        latent = self.out[:, :, : boundaries[-1]].float().cpu().clone()
        assert self.sampler.keep is not None
        name = type(self.memory).__name__
        self.sampler.keep.snapshot = Snapshot(latent, boundaries, self._model(), name, tensors, facts)


def renoising(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """At each step to the clean latent, then back to the next noise level with fresh noise."""
    extra_args = extra_args or {}
    ones, seed = x.new_ones([x.shape[0]]), extra_args.get("seed") or 0
    sampling = model.inner_model.inner_model.model_sampling
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * ones, **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        if sigmas[i + 1] == 0:
            x = denoised
        elif isinstance(sampling, comfy.model_sampling.CONST):
            x = plan.renoise(denoised, sigmas[i + 1], seed, 0, i)
        else:
            x = sampling.noise_scaling(sigmas[i + 1], plan.noise_like(denoised, seed, 0, i), denoised)
    return x
