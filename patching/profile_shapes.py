"""The arithmetic of a network from shapes alone: the same class is built of tensors without memory, and is run once on
stand-ins of what ComfyUI would give it."""

from typing import Any

import comfy.model_management
import comfy.ops
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from .. import archs
from .attention import OVERRIDE
from .convention import unpack
from .profile_meter import Meter, own_bytes
from .run import current_forward
from .sizes import compute_dtype, plain_name

PLAIN = ("cond_or_uncond", "uuids", "sigmas", "sample_sigmas")  # what ComfyUI itself tells a network in its options
KIND = {"mm": "linear", "addmm": "linear", "convolution": "convolution"}  # all else that is counted: attention
SOFTMAX = (torch.ops.aten._softmax, torch.ops.aten.softmax)
COUNTED = ("linear", "convolution")  # modules whose arithmetic the meter tells itself


class Operators(TorchDispatchMode):
    """Adds to a meter the products that no module and no override tells: attention of refiners, bare matrix products. A
    batched product is attention's where a softmax follows it or gave its first factor."""

    def __init__(self, meter: Meter):
        super().__init__()
        self.meter = meter
        self.scores: tuple[int, ...] = ()  # shape of the newest attention scores
        self.product: tuple[Any, ...] = ()  # the newest batched product: its shape, cell and FLOPs

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func._overloadpacket
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        count = flop_registry.get(packet)
        if count is None and packet not in SOFTMAX:
            with self:  # in inference mode composite operators arrive whole
                made = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if made is NotImplemented else made
        out = func(*args, **kwargs)
        if count is None:
            self._softmax(tuple(args[0].shape))
        elif self.meter.stack[-1][0] not in COUNTED and not getattr(self.meter, "answered", False):
            self._product(packet.__name__, count(*args, **kwargs, out_val=out), args, out)
        return out

    def _softmax(self, shape: tuple[int, ...]) -> None:
        """The product before was of attention scores."""
        if self.product and self.product[0] == shape:
            _, block, flops = self.product
            self.meter.count("linear", block, -flops)
            self.meter.count("attention", block, flops)
            self.product = ()
        self.scores = shape

    def _product(self, name: str, flops: float, args, out) -> None:
        block, kind = self.meter.stack[-1][1], KIND.get(name, "attention")
        if name == "baddbmm":
            self.scores = tuple(out.shape)
        elif name == "bmm":
            kind = "attention" if tuple(args[0].shape) == self.scores else "linear"
            self.product = (tuple(out.shape), block, flops) if kind == "linear" else ()
        self.meter.count(kind, block, flops)


class ShapeMeter(Meter):
    """Attention is answered with an empty tensor of the right shape."""

    def answer(self, earlier, func, args, kwargs):
        q, _, v, _, pack = unpack(args, kwargs)
        return pack(q.new_empty(*q.shape[:3], v.shape[-1]))


class CountingMeter(Meter):
    """For one evaluation that is really computed: what an attention call runs inside is not counted again."""

    answered = False

    def answer(self, earlier, func, args, kwargs):
        before, self.answered = self.answered, True
        try:
            return super().answer(earlier, func, args, kwargs)
        finally:
            self.answered = before

    def apply_model(self, executor, *args, **kwargs):
        with Operators(self):
            return super().apply_model(executor, *args, **kwargs)


class Untold(Exception):
    """A network cannot be run on shapes: its course depends on values, or ComfyUI did not build it."""


class Shapes:
    """Stands in for the forward of a model's network while shapes are counted. Raises Untold."""

    def __init__(self, model: Any, arch):
        network = archs.original(model.get_model_object("diffusion_model"))
        config = dict(model.model.model_config.unet_config)
        if config.pop("disable_unet_model_creation", False):
            raise Untold("this network was not built by ComfyUI")
        config["dtype"] = compute_dtype(model)
        weights = {plain_name(name): own_bytes(module) for name, module in network.named_modules()}
        self.mode, self.meter = FakeTensorMode(allow_non_fake_inputs=True), ShapeMeter(arch, weights=weights)
        try:
            self.twin = twin(self.mode, type(network), config)
        except Exception as error:  # whatever a constructor asks for that the config does not hold
            raise Untold(_said(error)) from error

    def __call__(self, *args, **kwargs):
        """What the network is given -> zeros of the shape that it would return."""
        options = kwargs.get("transformer_options") or {}
        x = args[0] if args else kwargs["x"]
        first = x if isinstance(x, torch.Tensor) else x[0]
        self.meter.calls.append(
            {"step": self.meter.step, "roles": [*options.get("cond_or_uncond", ())], "rows": int(first.shape[0])}
        )
        if "transformer_options" in kwargs:
            kwargs = {**kwargs, "transformer_options": {key: options[key] for key in PLAIN if key in options}}
        try:
            out = shapes(self.mode, self.meter, self.twin, args, kwargs)
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as error:  # whatever a forward does that needs values
            raise Untold(_said(error)) from error
        return tree_map(lambda t: torch.zeros(t.shape, dtype=t.dtype, device=first.device), out)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def twin(mode: FakeTensorMode, kind: type, config: dict[str, Any]) -> torch.nn.Module:
    """A network of that class whose weights have shapes and no memory."""
    with mode:
        made = kind(**config, device="cpu", operations=comfy.ops.disable_weight_init)
    return made.requires_grad_(False).eval()


def shapes(mode: FakeTensorMode, meter: Meter, network: torch.nn.Module, args, kwargs):
    """Runs the twin on stand-ins of the arguments (on the CPU), and gives its stand-in of an output."""
    args, kwargs = tree_map(lambda t: _stand_in(mode, t), (args, kwargs))
    options = {**(kwargs.get("transformer_options") or {}), OVERRIDE: meter.attention(None)}
    kwargs = {**kwargs, "transformer_options": options}
    token = current_forward.set(None)  # hooks of ours that share its modules' classes stay out
    try:
        meter.watch(network)
        with torch.inference_mode(), mode, Operators(meter):
            return network(*args, **kwargs)
    finally:
        current_forward.reset(token)
        meter.remove()


def _stand_in(mode: FakeTensorMode, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    with mode:
        return torch.empty(value.shape, dtype=value.dtype, device="cpu")
