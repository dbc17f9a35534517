"""FlowEdit as a GUIDER: it knows four prompts, and puts its own steps in front of those of the SAMPLER that it is run with."""

from dataclasses import dataclass

import comfy.samplers
import torch
from comfy.utils import model_trange

from ..methods.sampling.flow_edit import FlowEdit, Shown, span_of
from .rf_invert import flow_sampling, schedule

NAME = "FlowEdit"
PAIRS = "tessera_flow_edit"  # in the model options of a call: its rows are those of the source, then of the target


@dataclass(frozen=True)
class Settings:
    """n_min, n_max: shares of the steps, 0..1, from which and up to which the source is edited; then target alone."""

    cfg_source: float = 1.5
    cfg_target: float = 5.5
    n_min: float = 0.0
    n_max: float = 1.0
    n_avg: int = 1
    fresh_noise: bool = True


class FlowEditGuider(comfy.samplers.CFGGuider):
    """Every evaluation is one of both prompts' pairs, so that caches count it once and keep a history for each."""

    def __init__(self, model, settings: Settings):
        super().__init__(model)
        flow_sampling(model, NAME)
        self.settings = settings
        self.set_cfg(settings.cfg_target)

    def set_four(self, source_positive, source_negative, target_positive, target_negative) -> None:
        self.inner_set_conds(
            {
                "positive": target_positive,
                "negative": target_negative,
                "source_positive": source_positive,
                "source_negative": source_negative,
            }
        )

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        """x [B, ...] under the target prompts; [2 n B, ...] of n pairs where the sampler says so."""
        options = model_options or {}
        count = options.get(PAIRS)
        if count is None:
            return super().predict_noise(x, timestep, options, seed)
        options = {key: value for key, value in options.items() if key != PAIRS}
        sides = (("source_", self.settings.cfg_source), ("", self.settings.cfg_target))
        made = []
        for n, (rows, sigma) in enumerate(zip(x.chunk(2 * count), timestep.chunk(2 * count), strict=True)):
            side, cfg = sides[n % 2]
            negative, positive = self.conds[f"{side}negative"], self.conds[f"{side}positive"]
            made.append(
                comfy.samplers.sampling_function(
                    self.inner_model, rows, sigma, negative, positive, cfg, model_options=options, seed=seed
                )
            )
        return torch.cat(made)

    def sample(self, noise, latent_image, sampler, sigmas, *args, **kwargs):
        if latent_image.is_nested:
            raise ValueError(
                f"{NAME} takes one latent, and this one holds several (video and sound). Separate them first."
            )
        schedule(sigmas, NAME)
        return super().sample(noise, latent_image, EditSampler(sampler, self.settings), sigmas, *args, **kwargs)


class EditSampler(comfy.samplers.Sampler):
    """FlowEdit's steps, then the given SAMPLER's from where they lead."""

    def __init__(self, then, settings: Settings):
        self.then, self.settings = then, settings

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        points, settings = [float(s) for s in sigmas], self.settings
        total = len(points) - 1
        first, end = span_of(total, settings.n_min, settings.n_max)
        options = {**extra_args["model_options"], PAIRS: settings.n_avg}
        scale = float(getattr(model_wrap.inner_model.model_sampling, "noise_scale", 1.0))
        draws = self._draws(noise * scale, extra_args.get("seed"))
        shown = _shown(model_wrap.inner_model, latent_image, denoise_mask, scale)
        edit = FlowEdit(latent_image, draws, settings.n_avg, denoise_mask, shown)

        def predict(pairs, sigma):
            x = torch.cat([side for pair in pairs for side in pair])
            out = model_wrap(x, x.new_full((x.shape[0],), sigma), model_options=options, seed=extra_args.get("seed"))
            made = out.chunk(2 * len(pairs))
            return list(zip(made[::2], made[1::2], strict=True))

        def told(i, z, clean):
            if callback is not None:
                callback(i, clean, z, total)

        bar = model_trange(end - first, disable=disable_pbar)
        edit.run(predict, points, (first + i for i in bar), told)
        if end == total:
            return edit.z
        edit.noise, sigma = edit.draw(), points[end]
        start = edit.pair(sigma)[1]
        rest = (start - (1 - sigma) * latent_image) / (sigma * scale)  # core's noise_scaling gives `start` again
        later = None if callback is None else lambda i, clean, x, _: callback(end + i, clean, x, total)
        return self.then.sample(
            model_wrap, sigmas[end:], extra_args, later, rest, latent_image, denoise_mask, disable_pbar
        )

    def _draws(self, given: torch.Tensor, seed: int | None):
        """Noise on the CPU, the same on every device; or the given one each time."""
        if not self.settings.fresh_noise:
            return lambda: given
        generator = torch.Generator().manual_seed(((seed or 0) + 1) % (1 << 64))
        return lambda: torch.randn(given.shape, generator=generator).to(given)


def _shown(model, latent, mask, scale: float) -> Shown | None:
    """As in core's inpainting: what is given goes to LTX, Wan 2.2 5B and others clean."""
    if mask is None:
        return None

    def shown(x, sigma, noise):
        kept = model.scale_latent_inpaint(
            x=x, sigma=x.new_full((x.shape[0],), sigma), noise=noise / scale, latent_image=latent
        )
        noised = (1 - sigma) * latent + sigma * noise
        return x + (kept - noised) * (1 - mask)  # under a soft mask the edit so far stays as it is

    return shown
