"""SAMPLER functions of flows, called by core's KSAMPLER as it calls its own."""

import comfy.samplers
import torch
from comfy.utils import model_trange

from ..methods.sampling.flow import omega_scale, scaled_about_mean, solve, velocity


def _parts(model, x, sigmas, extra_args, callback):
    """(field, sigmas as floats, told): told gives core's callback what the whole step predicts."""
    extra, points = extra_args or {}, [float(s) for s in sigmas]

    def told(i, x, slope):
        if callback is not None:
            clean = x - points[i] * slope
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": clean})

    return velocity(lambda x, sigma: model(x, x.new_full((x.shape[0],), sigma), **extra)), points, told


@torch.no_grad()
def sample_rf_solver(
    model, x, sigmas, extra_args=None, callback=None, disable=None, solver="rf_solver", euler_last=False
):
    """methods/sampling/flow.py: solve."""
    field, points, told = _parts(model, x, sigmas, extra_args, callback)
    return solve(field, x, points, solver, told, model_trange(len(points) - 1, disable=disable), euler_last)


@torch.no_grad()
def sample_omega_euler(model, x, sigmas, extra_args=None, callback=None, disable=None, omega=10.0):
    """Euler steps whose deviation from their mean is scaled (ACE-Step, arXiv 2506.00045). Under an inpainting mask only what
    is painted is: the rest has to arrive at its latent."""
    field, points, told = _parts(model, x, sigmas, extra_args, callback)
    factor, mask = omega_scale(omega), (extra_args or {}).get("denoise_mask")
    for i in model_trange(len(points) - 1, disable=disable):
        slope = field(x, points[i])
        told(i, x, slope)
        x = x + scaled_about_mean(float(sigmas[i + 1] - sigmas[i]) * slope, factor, mask)
    return x


def rf_solver(solver: str, euler_last: bool):
    return comfy.samplers.KSAMPLER(sample_rf_solver, {"solver": solver, "euler_last": euler_last})


def omega_euler(omega: float):
    return comfy.samplers.KSAMPLER(sample_omega_euler, {"omega": omega})
