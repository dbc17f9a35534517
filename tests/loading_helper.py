"""Quantized files of tiny models in other programs' formats, each with the dense weights that it stands for, decoded by
somebody else's code: GGUF by the package gguf, nunchaku by the description in nunchaku_helper."""

from dataclasses import replace

import gguf
import numpy as np
import nunchaku_helper as packing
import torch
from comfy_kitchen.backends.eager import awq, svdquant
from safetensors.torch import save_file
from tiny_models import build_direct, state_dict
from tiny_specs import SPECS

import comfy.sd  # isort: skip

from tessera.methods.files import nunchaku_keys as keys

KINDS = ("Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
NAMES = {"flux": "flux", "wan": "wan", "sd3": "sd3"}  # general.architecture
SHIFT = 0.171875  # before unsigned activations


def _wider(name: str, **arguments):
    return replace(SPECS[name], arguments=dict(SPECS[name].arguments, **arguments))


EMBEDDER = {"target": "torch.nn.Linear", "params": {"in_features": 96, "out_features": 256}}
WIDE = {  # inputs in multiples of 256, as the k-quants need
    "flux": _wider("flux", hidden_size=256, num_heads=2, depth=1, depth_single_blocks=1),
    "wan": _wider("wan", dim=256, ffn_dim=256, num_heads=2),
    "sd3": _wider("sd3", depth=4, context_embedder_config=EMBEDDER),
}


def blocks(kind: str, weight: torch.Tensor) -> np.ndarray:
    """Bytes of a [N, K] weight; for the k-quants, which gguf only decodes, random codes of its standard deviation."""
    n, k = weight.shape
    enum = gguf.GGMLQuantizationType[kind]
    if kind in ("Q4_0", "Q8_0"):
        return gguf.quantize(weight.float().numpy(), enum)
    rng = np.random.default_rng(k + n)
    size = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}[kind]
    made = rng.integers(0, 256, (n * k // 256, size), dtype=np.uint8)
    half = lambda value: np.float16(value).reshape(1).view(np.uint8)  # noqa: E731
    std = float(weight.float().std())
    if kind == "Q6_K":
        made[:, 208:210] = half(std / (74 * 18))
    else:
        steps = 15 if kind == "Q4_K" else 31
        made[:, 0:2] = half(std / (32 * steps / 3))
        made[:, 2:4] = half(std / (32 * steps / 3) * steps / 2)
    return made.reshape(n, -1)


def write_gguf(path, name: str, kinds=("Q8_0",), plain=("F32",), prefix: str = "") -> dict[str, torch.Tensor]:
    """The file, with its weights [N, K] in these kinds one after the other, other tensors in the plain ones; returns what
    gguf decodes of it."""
    spec = WIDE[name]
    writer, dense = gguf.GGUFWriter(str(path), NAMES[name]), {}
    packed = others = 0
    for key, tensor in state_dict(spec).items():
        if tensor.ndim == 2 and tensor.shape[1] % 256 == 0 and key.endswith("weight"):
            kind = kinds[packed % len(kinds)]
            packed += 1
            data, enum = blocks(kind, tensor), gguf.GGMLQuantizationType[kind]
            writer.add_tensor(prefix + key, data, raw_dtype=enum)
            dense[key] = torch.from_numpy(gguf.dequantize(data, enum).copy()).view(tensor.shape)
            continue
        kind = plain[others % len(plain)]
        others += 1
        dense[key] = tensor.float()
        if kind == "BF16":
            raw = tensor.contiguous().view(torch.uint16).numpy().view(np.uint8).reshape(*tensor.shape[:-1], -1)
            writer.add_tensor(prefix + key, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            if kind == "F16":
                dense[key] = tensor.half().float()
            writer.add_tensor(prefix + key, (tensor.half() if kind == "F16" else tensor.float()).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense


def dense_model(weights: dict[str, torch.Tensor]):
    """What the stock loader makes of dense weights."""
    return comfy.sd.load_diffusion_model_state_dict({k: v.clone() for k, v in weights.items()})


class NunchakuFile:
    """A tiny FLUX or Qwen-Image with random int4 layers. tensors: as the release has them; dense: ComfyUI's keys, fp32;
    parts: Linear of ComfyUI: (axis, [(layer in natural order, unsigned)])."""

    def __init__(self, name: str):
        self.spec, self.name = SPECS[name], name
        self.tensors, self.dense, self.parts = {}, state_dict(self.spec, dtype=torch.float32), {}
        for block in range(2):
            self._flux(block) if name == "flux" else self._qwen(block)
        table = keys.FLUX_PLAIN if name == "flux" else {key: key for key in keys.QWEN_PLAIN}
        for theirs, here in table.items():
            for end in ("weight", "bias"):
                found = self.dense[f"{here}.{end}"].to(torch.bfloat16)
                self.dense[f"{here}.{end}"] = found.float()
                halves = found.chunk(2)[::-1] if here == keys.SWAPPED else (found,)
                self.tensors[f"{theirs}.{end}"] = torch.cat(halves)
        if name != "flux":
            self.tensors["txt_norm.weight"] = self.dense["txt_norm.weight"].to(torch.bfloat16)

    def write(self, path):
        save_file({k: t.contiguous() for k, t in self.tensors.items()}, str(path))

    def _svd(self, module: str, n: int, k: int, old: bool, smooth=None) -> dict:
        found = packing.svd_parts(n, k) | ({} if smooth is None else {"smooth": smooth})
        found["scale"] = 2.0 ** torch.randint(-7, -4, (k // 64, n)).to(torch.bfloat16) * found["smooth"].mean()
        names = {new: was for was, new in keys.RENAMED.items()} if old else {}
        for key, tensor in packing.svd_packed(found).items():
            self.tensors[f"{module}.{names.get(key, key)}"] = tensor
        return found

    def _linear(self, here: str, axis: str, found: list[tuple[dict, bool]]) -> None:
        self.parts[here] = axis, found
        weights = [packing.svd_dense(p).float() for p, _ in found]
        biases = []
        for p, unsigned in found:
            residual = packing.svd_dense(p | {"up": p["up"] * 0}).float()
            biases.append(p["bias"].float() + (residual.sum(1) * SHIFT if unsigned else 0))
        self.dense[f"{here}.weight"] = torch.cat(weights, dim=0 if axis == "rows" else 1)
        self.dense[f"{here}.bias"] = torch.cat(biases) if axis == "rows" else sum(biases)

    def _awq(self, module: str, here: str, splits: int) -> None:
        found = packing.awq_parts(splits * 128, 128)
        for key, tensor in packing.awq_packed(found, splits).items():
            self.tensors[f"{module}.{key}"] = tensor
        self.parts[here] = "awq", found
        self.dense[f"{here}.weight"] = packing.awq_dense(found).float()
        self.dense[f"{here}.bias"] = found["bias"].float()

    def _norms(self, here: str, theirs: str, table) -> None:
        for norm, names in table.items():
            self.tensors[f"{theirs}.{names[0]}.weight"] = self.dense[f"{here}.{norm}.weight"].to(torch.bfloat16)

    def _flux(self, i: int) -> None:
        for stem, name, table, norms in (
            ("transformer_blocks", "double_blocks", keys.FLUX_DOUBLE, keys.FLUX_NORMS),
            ("single_transformer_blocks", "single_blocks", keys.FLUX_SINGLE, keys.FLUX_SINGLE_NORMS),
        ):
            theirs, here = f"{stem}.{i}", f"{name}.{i}"
            for linear, (axis, sources) in table.items():
                n, k = self.dense[f"{here}.{linear}.weight"].shape
                sizes = {"linear1": [(384, 128), (512, 128)], "linear2": [(128, 128), (128, 512)]}.get(linear, [(n, k)])
                found, smooth = [], None
                for (names, unsigned), size in zip(sources, sizes, strict=True):
                    found.append((self._svd(f"{theirs}.{names[0]}", *size, True, smooth), unsigned))
                    smooth = found[0][0]["smooth"] if axis == "rows" else None
                self._linear(f"{here}.{linear}", axis, found)
            self._norms(here, theirs, norms)
        for stem, name, table in (
            ("transformer_blocks", "double_blocks", keys.FLUX_MODULATION),
            ("single_transformer_blocks", "single_blocks", {"modulation.lin": ("norm.linear", 3)}),
        ):
            for linear, (module, splits) in table.items():
                self._awq(f"{stem}.{i}.{module}", f"{name}.{i}.{linear}", splits)

    def _qwen(self, i: int) -> None:
        block = f"transformer_blocks.{i}."
        for module, names in keys.QWEN_SPLIT.items():
            found = self._svd(block + module, 384, 128, False)
            for part, name in enumerate(names):
                rows = slice(128 * part, 128 * part + 128)
                own = {**found, "codes": found["codes"][rows], "scale": found["scale"][:, rows]}
                own |= {"up": found["up"][rows], "bias": found["bias"][rows]}
                self._linear(block + name, "rows", [(own, False)])
        for name, unsigned in keys.QWEN_LINEAR.items():
            found = self._svd(block + name, *self.dense[f"{block}{name}.weight"].shape, False)
            self._linear(block + name, "rows", [(found, unsigned)])
        for module, splits in keys.QWEN_MODULATION.items():
            self._awq(block + module, block + module, splits)
        for norm in keys.QWEN_NORMS:
            self.tensors[f"{block}{norm}.weight"] = self.dense[f"{block}{norm}.weight"].to(torch.bfloat16)

    def dense_model(self):
        if self.name == "flux":
            return dense_model(self.dense)
        made = build_direct(self.spec)
        made.model.diffusion_model.load_state_dict(self.dense)
        return made

    def eager_model(self):
        """The dense model with each layer computed by comfy_kitchen's functions, activations in int4."""
        made = self.dense_model()
        for name, (axis, found) in self.parts.items():
            module = made.model.diffusion_model.get_submodule(name)
            module.forward = _eager_awq(found) if axis == "awq" else _eager_svd(axis, found)
        return made


def _codes(codes: torch.Tensor) -> torch.Tensor:
    return ((codes[:, 0::2] & 15) | (codes[:, 1::2] & 15) << 4).to(torch.uint8).view(torch.int8)


def _eager_awq(part: dict):
    def forward(x):
        scale = part["scale"].to(x)
        zeros = (part["zeros"].float() + 8 * part["scale"].float()).to(part["scale"].dtype).to(x)
        return awq.gemv_awq_w4a16(x, _codes(part["codes"]), scale, zeros, part["bias"].to(x))

    return forward


def _eager_svd(axis: str, found: list[tuple[dict, bool]]):
    def one(x, part, unsigned):
        rows = x.reshape(-1, x.shape[-1])
        smooth, down = part["smooth"].to(x), part["down"].to(x)
        shifted = rows + SHIFT if unsigned else rows
        q, scales, low = svdquant.quantize_svdquant_w4a4(shifted, smooth, down, act_unsigned=unsigned, lora_x=rows)
        y = svdquant.scaled_mm_svdquant_w4a4(
            q, _codes(part["codes"]), scales, part["scale"].to(x), low, part["up"].to(x), None, unsigned
        )
        return y[: len(rows)].view(*x.shape[:-1], -1)

    def forward(x):
        biases = [part["bias"].to(x) for part, _ in found]
        if axis == "rows":
            return torch.cat([one(x, part, unsigned) for part, unsigned in found], dim=-1) + torch.cat(biases)
        parts = x.split([len(part["smooth"]) for part, _ in found], dim=-1)
        return sum(one(xs, part, unsigned) for xs, (part, unsigned) in zip(parts, found, strict=True)) + sum(biases)

    return forward
