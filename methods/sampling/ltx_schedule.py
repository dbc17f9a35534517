"""Schedules of LTX-Video (arXiv 2501.00103): those of its distilled models in two passes, and that of its full model,
whose shift grows with the number of tokens and whose last sigma above 0 is stretched to a set value."""

import math

import torch

DISTILLED = {  # of ltxv 0.9.8 distilled: at 2/3 of the size, and after the latent upscaler
    "distilled_pass1": (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.0),
    "distilled_pass2": (0.909375, 0.725, 0.421875, 0.0),
}
PRESETS = (*DISTILLED, "dev40")
FEW, MANY = (1024, 0.95), (4096, 2.05)  # tokens, and the logarithm of the shift there
TOKENS = 4096  # where no latent says how many


def log_shift(tokens: int) -> float:
    """Linear in the tokens, through FEW and MANY."""
    slope = (MANY[1] - FEW[1]) / (MANY[0] - FEW[0])
    return tokens * slope + FEW[1] - slope * FEW[0]


def shifted(steps: int, tokens: int, terminal: float) -> torch.Tensor:
    """steps + 1 sigmas from 1 to 0, the last one above 0 being `terminal`."""
    even = torch.linspace(1.0, 0.0, steps + 1)[:-1]
    grown = math.exp(log_shift(tokens))
    sigmas = grown / (grown + (1 / even - 1))
    if terminal > 0 and steps > 1:  # a single sigma is 1, which no stretch moves
        sigmas = 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def schedule(preset: str, steps: int, tokens: int, terminal: float) -> torch.Tensor:
    """steps, tokens and terminal count with dev40 only."""
    if preset in DISTILLED:
        return torch.FloatTensor(DISTILLED[preset])
    return shifted(steps, tokens, terminal)
