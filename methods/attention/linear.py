"""Linear attention in the place of softmax: LiT (arXiv 2501.12976), SANA-Video's dual track (arXiv 2509.24695, section
3.1), LinFusion's normaliser (arXiv 2409.02097), NormAttention (arXiv 2210.10340), Hedgehog features as in LinVideo (arXiv
2510.08318). The operator is kernels/linear/linear_attention.py; none of these gives a stock model's picture without
training, so its weights, if any, come from a graft file (graft.py).

    out = phi(q) S / (phi(q) z + eps) * gamma + DWConv(v)        S = sum w_j phi(k_j)^T v_j, z = sum w_j phi(k_j)

w = e^bias of a padding mask. Queries and keys arrive after RoPE: `rotated` takes them so, `dual` turns them back by the
model's own table, and rotates the features again for the numerator alone.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ...kernels.conv.depthwise_conv import depthwise_conv
from ...kernels.linear._reference import features
from ...kernels.linear.linear_attention import linear_attention, projected
from .call import Answer, AttentionCall, Decline
from .graft import Graft

FEATURE_MAPS = ("relu", "elu1", "softmax", "hedgehog", "identity")
NORMALIZERS = ("sum", "mean", "rms", "rms_width", "none")
RMS_EPS = 1e-6


@dataclass(frozen=True)
class LinearAttention:
    """heads: attention heads that the features are split into, 0: the model's. text: whether tokens that are not of the
    image keep softmax (`dense`) or not (`linear`). trained: a graft, whose blocks alone are served."""

    feature_map: str = "relu"
    normalizer: str = "sum"
    eps: float = 1e-6
    heads: int = 0
    rope: str = "rotated"
    text: str = "dense"
    allow_untrained: bool = False
    trained: Graft | None = None
    spatial: ClassVar[bool] = False

    def __post_init__(self):
        for name, options in (("feature_map", FEATURE_MAPS), ("normalizer", NORMALIZERS),
                              ("rope", ("rotated", "dual")), ("text", ("dense", "linear"))):  # fmt: skip
            if getattr(self, name) not in options:
                raise ValueError(f"Unknown {name} {getattr(self, name)!r}. Use one of {', '.join(options)}.")
        if self.rope == "dual" and self.feature_map in ("hedgehog", "softmax"):
            raise ValueError(
                f"{self.feature_map} features are shares of a head and cannot be rotated: use rope rotated, or relu."
            )

    @property
    def wants_rotation(self) -> bool:
        return self.rope == "dual"

    def begin(self) -> dict[Any, torch.Tensor]:
        """Weights on the device of the calls, by block and name."""
        return {}

    def check(self, arch: Any, stack: list[Any], chosen: set[int]) -> None:
        """ValueError where an untrained operator would replace all of a stock model's attention, or a graft is another
        model's."""
        if self.trained is None:
            if not self.allow_untrained and len(chosen) == len(stack):
                raise ValueError(
                    f"Linear Attention in all {len(stack)} blocks of a stock {arch.name} gives noise: limit `blocks`, "
                    "load a trained graft, or turn allow_untrained on."
                )
            return
        if self.trained.arch != arch.name:
            raise ValueError(
                f"This graft was trained for {self.trained.arch or 'no named model'}, not for {arch.name}."
            )
        there = {(block.spec.path, block.index) for block in stack}
        beyond = sorted(set(self.trained.blocks) - there)
        if beyond:
            raise ValueError(f"This graft has weights for {beyond[0][0]}.{beyond[0][1]}, which this {arch.name} lacks.")

    def attend(self, state: dict[Any, torch.Tensor], call: AttentionCall) -> Answer:
        q, k, v, layout = call.q, call.k, call.v, call.places()
        weights = self._weights(state, call)
        if self.rope == "dual" and not _fits(getattr(call.forward, "rotation", None), q):
            raise Decline("this model does not tell its RoPE, which dual needs")
        if self.heads and q.shape[1] % self.heads:
            raise Decline(f"{q.shape[1]} heads cannot be joined into {self.heads}")
        bias = call.served_bias()
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        out = self._linear(q, k, v, bias, getattr(call.forward, "rotation", None), weights)
        out = self._convolved(out, v, layout, weights)
        others, work = 0, q.shape[3] * (2 if self.feature_map == "hedgehog" else 1)
        if self.text == "dense" and layout.others:
            out, others = self._text(out, call, k, v, bias), layout.others
        rows = q.shape[0] * q.shape[1]
        work *= q.shape[1] // self.heads if self.heads else 1
        # its work in units of a query-key pair: F products a token for the state, F to apply it, against 2 a pair
        return Answer(out, rows * layout.total * (work + others), rows * layout.total**2)

    def _weights(self, state: dict[Any, torch.Tensor], call: AttentionCall) -> dict[str, torch.Tensor]:
        """The block's parameters on this device, in this dtype."""
        if self.trained is None:
            return {}
        place = call.block.spec.path, call.block.index
        if place not in self.trained.blocks:
            raise Decline("the graft has no weights for this block")
        found = {}
        heads, width = call.q.shape[1], call.q.shape[3]
        for name, value in self.trained.blocks[place].items():
            have = tuple(value.shape)
            if name.startswith("dwc"):
                fits = have[0] in (width, heads * width)
            else:
                fits = have[0] == heads and (name == "gamma" or have[1] == width)
            if not fits:
                raise ValueError(
                    f"The graft's {name} {[*have]} for {place[0]}.{place[1]} does not fit attention of {heads} heads of "
                    f"{width} features. Take the graft that was trained for this model."
                )
            key = *place, name, call.q.device, call.q.dtype
            if key not in state:
                state[key] = value.to(call.q.device, call.q.dtype)
            found[name] = state[key]
        return found

    def _linear(self, q, k, v, bias, rotation, weights) -> torch.Tensor:
        """phi(q) S over its normaliser, [B, H, N, D]."""
        for name in ("proj_q.weight", "proj_k.weight"):
            if name in weights:
                q, k = (projected(q, weights[name]), k) if name[5] == "q" else (q, projected(k, weights[name]))
        heads, q_rot, k_rot, feature_map = q.shape[1], None, None, self.feature_map
        v = self._joined(v)
        if self.rope == "dual":
            q, k = (features(turned(x, rotation, back=True), feature_map) for x in (q, k))
            q_rot, k_rot = (self._joined(turned(x, rotation)) for x in (q, k))
            feature_map = "identity"
        q, k = self._joined(q), self._joined(k)
        if bias is not None:
            weight = bias.exp()[:, None, :, None].to(k.dtype)  # of a key's feature: it counts so often
            q, k, feature_map = features(q, feature_map), features(k, feature_map) * weight, "identity"
            k_rot = None if k_rot is None else k_rot * weight
        normalizer = "none" if self.normalizer == "rms_width" else self.normalizer
        out = linear_attention(q, k, v, q_rot, k_rot, feature_map, normalizer, self.eps)[0]
        if self.heads:
            out = out.unflatten(3, (heads // self.heads, -1)).transpose(2, 3).flatten(1, 2)
        if self.normalizer == "rms_width":
            wide = out.float()
            out = (wide * (wide.square().mean((1, 3), keepdim=True) + RMS_EPS).rsqrt()).to(out.dtype)
        return out * weights["gamma"][:, None, None] if "gamma" in weights else out

    def _joined(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, N, D] -> [B, heads, N, H D / heads]."""
        if not self.heads or x.shape[1] == self.heads:
            return x
        return x.unflatten(1, (self.heads, -1)).transpose(2, 3).flatten(3)

    def _convolved(self, out, v, layout, weights) -> torch.Tensor:
        """Adds the depthwise convolution of the image's values over their grid, frame by frame."""
        if "dwc.weight" not in weights:
            return out
        (b, h, _, d), (t, *grid) = v.shape, layout.grid
        weight, bias = weights["dwc.weight"][:, 0], weights.get("dwc.bias")
        if len(weight) == d != h * d:  # one filter for all heads
            weight, bias = weight.repeat(h, 1, 1), None if bias is None else bias.repeat(h)
        image = v[:, :, layout.image].transpose(1, 2).reshape(b * t, grid[0] * grid[1], h * d)
        added = depthwise_conv(image, weight, bias, grid).reshape(b, -1, h, d).transpose(1, 2)
        out = out.clone()
        out[:, :, layout.image] += added
        return out

    def _text(self, out, call: AttentionCall, k, v, bias) -> torch.Tensor:
        """Softmax for the rows that are not of the image."""
        image = call.layout.image  # type: ignore[union-attr]
        bias = None if bias is None else bias[:, None, None].to(k.dtype)
        out = out.clone()
        for part in (slice(0, image.start), slice(image.stop, call.q.shape[2])):
            if part.start < part.stop:
                rows = call.q[:, :, part]
                out[:, :, part] = F.scaled_dot_product_attention(rows, k, v, bias, scale=call.scale)
        return out


def from_graft(settings: LinearAttention, graft: Graft) -> LinearAttention:
    """The settings with what the graft says of itself."""
    return replace(settings, trained=graft, **graft.hparams)


def _fits(rotation: Any, q: torch.Tensor) -> bool:
    shape = (q.shape[2], q.shape[3] // 2, 2, 2)
    return isinstance(rotation, torch.Tensor) and rotation.ndim == 6 and rotation.shape[2:] == shape


def turned(x: torch.Tensor, rotation: torch.Tensor, back: bool = False) -> torch.Tensor:
    """x [B, H, N, D], its pairs of neighbouring channels turned by rotation [B or 1, 1, N, D / 2, 2, 2], or back."""
    m = rotation.float()
    if back:  # the inverse, for a table may also stretch
        a, b, c, d = m[..., 0, 0], m[..., 0, 1], m[..., 1, 0], m[..., 1, 1]
        m = torch.stack([d, -b, -c, a], -1).unflatten(-1, (2, 2)) / (a * d - b * c)[..., None, None]
    pairs = x.float().unflatten(-1, (-1, 1, 2))
    return (m * pairs).sum(-1).flatten(-2).to(x.dtype)
