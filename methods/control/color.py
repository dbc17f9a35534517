"""Colours of one picture given to another: AdaIN (arXiv 1703.06868), and the wavelets of StableSR (arXiv 2305.07015)."""

import torch
from torch.nn.functional import conv2d, interpolate, pad

EPS = 1e-5  # of a variance
LEVELS = 5
BINOMIAL = (0.25, 0.5, 0.25)


def adain(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """image [B, C, H, W] with the mean and the standard deviation of each channel of reference [B or 1, C, h, w]."""
    (mean, deviation), (wanted_mean, wanted) = _moments(image), _moments(reference)
    return (image - mean) / deviation * wanted + wanted_mean


def wavelet(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """image [B, C, H, W] with the coarse colours of reference [B or 1, C, h, w], brought to its size."""
    if reference.shape[-2:] != image.shape[-2:]:
        reference = interpolate(reference, image.shape[-2:], mode="bicubic", antialias=True)
    return image - _coarse(image) + _coarse(reference)


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation [B, C, 1, 1], the variance unbiased as the authors have it."""
    correction = int(x.shape[-2:].numel() > 1)
    mean = x.mean((-2, -1), keepdim=True)
    return mean, (x.var((-2, -1), correction=correction, keepdim=True) + EPS).sqrt()


def _coarse(x: torch.Tensor) -> torch.Tensor:
    """x [B, C, H, W] blurred by binomial kernels with 1, 2, 4 ... places between their taps; edges repeat."""
    taps = torch.tensor(BINOMIAL, dtype=x.dtype, device=x.device)
    kernel = (taps[:, None] * taps).expand(x.shape[1], 1, 3, 3)
    for level in range(LEVELS):
        reach = 2**level
        x = conv2d(pad(x, [reach] * 4, mode="replicate"), kernel, groups=x.shape[1], dilation=reach)
    return x


METHODS = {"adain": adain, "wavelet": wavelet}


def fixed(image: torch.Tensor, reference: torch.Tensor, method: str) -> torch.Tensor:
    """image [B, H, W, C] 0..1 in the colours of reference [b, h, w, C'], fp32, 0..1; channels from the fourth on are left
    as they are. ValueError where the pictures do not fit."""
    for name, picture in (("image", image), ("reference", reference)):
        if picture.ndim != 4 or picture.shape[-1] < 3 or not picture.numel():
            raise ValueError(f"{name} is {[*picture.shape]}, needed are colour pictures [B, H, W, 3 or more].")
        if not torch.isfinite(picture).all():
            raise ValueError(f"{name} {[*picture.shape]} is not finite. Check the VAE that decoded it.")
    if len(reference) not in (1, len(image)):
        raise ValueError(
            f"There are {len(image)} pictures and {len(reference)} references. Give one reference for all, or one for each."
        )
    colours, wanted = (t[..., :3].movedim(-1, 1).float() for t in (image, reference.to(image.device)))
    made = METHODS[method](colours, wanted).clamp(0, 1).movedim(1, -1)
    return torch.cat((made, image[..., 3:].float()), -1)
