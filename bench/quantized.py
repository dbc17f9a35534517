"""Quantized linear layers at the sizes of FLUX's MLP against the same layer in 16 bits, everything that a model would pay
in the timed region: decoding, rotation, quantization of the activations."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from case import Case
from pack import load_pack
from torch.nn.functional import linear

load_pack()

from tessera.kernels.quant import packed
from tessera.kernels.quant.packed_linear import AUTO, FUSED, SCRATCH, packed_linear
from tessera.kernels.quant.quantize_rows import quantize_rows
from tessera.kernels.quant.rotate import rotate
from tessera.kernels.quant.scaled_linear import scaled_linear

Run = Callable[[], Any]
MLP = ((12288, 3072), (3072, 12288))  # rows and columns of the weights
HALVES = {"q4_k": (0, 2), "q6_k": (208,), "q8_0": (0,)}  # places of the fp16 scales in a block
FEW = {"16-bit linear": 2.0}  # what is promised on a GPU: times faster than the 16-bit layer
MANY = {FUSED: {"16-bit linear": 0.6}, SCRATCH: {"16-bit linear": 0.85}}
EIGHT_BITS = {"16-bit linear": 1.4}
ON_CPU = {"decode, then linear": 0.8}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
EIGHT_BIT_ERROR = {"int8": 0.02, "fp8_e4m3": 0.05}


def weight(codec: str, rows: int, columns: int, device: str) -> packed.Packed:
    """Random codes in groups of 64, of about the size that weights have."""
    data = torch.randint(0, 256, (rows, packed.row_bytes(codec, columns)), dtype=torch.uint8, device=device)
    if codec in packed.GGUF_BLOCKS:
        blocks = data.view(-1, packed.GGUF_BLOCKS[codec][1])
        for at in HALVES[codec]:
            blocks[:, at : at + 2] = torch.tensor([0.001], device=device).half().view(torch.uint8)
        return packed.Packed(codec, columns, data)
    scale = 0.02 * torch.rand(rows, columns // 64, device=device).to(torch.bfloat16) + 0.01
    table = torch.linspace(-1, 1, 16, device=device) if codec == "table4" else None
    return packed.Packed(codec, columns, data, scale, table, 64)


def replayed(run: Run) -> Run:
    """The kernels of one call without the time that Python takes to launch them."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay():
        graph.replay()
        return out

    return replay


def packed_cases(device: str) -> Iterator[Case]:
    """Each kind of codec; few rows and many, fused and with scratch memory."""
    gpu = device == "cuda"
    dtypes = (torch.bfloat16,) if gpu else (torch.float32, torch.bfloat16)
    shapes = MLP if gpu else ((3072, 3072),)
    cases = [("table4", 1, AUTO), ("table4", 16, AUTO), ("table4", 4608, FUSED), ("table4", 4608, SCRATCH)]
    cases += [(codec, rows, mode) for codec in HALVES for rows, mode in ((1, AUTO), (4608, FUSED), (4608, SCRATCH))]
    if not gpu:
        cases = [(codec, rows, AUTO) for codec in ("table4", "q4_k") for rows in (1, 1024)]
    for n, k in shapes:
        for dtype in dtypes:
            for codec, rows, mode in cases:
                yield packed_case(weight(codec, n, k, device), rows, mode, dtype, gpu)


def packed_case(held: packed.Packed, rows: int, mode: int, dtype: torch.dtype, gpu: bool) -> Case:
    x = torch.randn(rows, held.columns, device=held.data.device).to(dtype)
    plain = packed.decode(held, dtype)
    parts = (held.data, held.scale, held.table, None, held.codec, held.columns, held.group, mode)
    runs: dict[str, Run] = {
        "ours": lambda: packed_linear(x, *parts),
        "16-bit linear" if dtype != torch.float32 else "fp32 linear": lambda: linear(x, plain),
        "decode, then linear": lambda: linear(x, packed.decode(held, dtype)),
    }
    bars, few = ON_CPU, gpu and rows <= 16
    if gpu:
        bars = {} if held.codec != "table4" else FEW if few else MANY[mode]
    words = ("", ", fused", ", scratch memory")[mode] + (", CUDA graph" if few else "")
    title = f"{held.codec} {held.columns} -> {len(held.data)}, {rows} rows{words}, {str(dtype)[6:]}"
    if few:
        runs = {name: replayed(run) for name, run in runs.items()}
    ours = runs.pop("ours")
    return Case(
        "packed_layer", title, ours, lambda: linear(x.float(), plain.float()), TOLERANCE[dtype], runs, bars, flush=few
    )


def eight_bit_case(x: torch.Tensor, w: torch.Tensor, format: str) -> Case:
    """The activations are rotated and quantized on the way, the weight beforehand."""
    (n, k), block = w.shape, 256
    codes, scale = quantize_rows(rotate(w, None, block), format)
    plain = w.to(x.dtype)

    def ours():
        return scaled_linear(*quantize_rows(x, format, block=block), codes, scale, None, x.dtype)

    def truth():
        return linear(rotate(x.float(), None, block), codes.float() * scale[:, None])

    title = f"{format} {k} -> {n}, {len(x)} rows, regular rotation of {block}, {str(x.dtype)[6:]}"
    runs: dict[str, Run] = {"16-bit linear": lambda: linear(x, plain)}
    case = Case("eight_bit_layer", title, ours, truth, EIGHT_BIT_ERROR[format], runs, EIGHT_BITS)
    _vendors(case, x, codes, scale, block)
    return case


def _vendors(case: Case, x, codes, scale, block: int) -> None:
    """The same layer by others, where they run."""

    def kitchen():
        import comfy_kitchen

        return comfy_kitchen.int8_linear(x, codes, scale, None, x.dtype, True, block)

    def by_torch():
        q, s = quantize_rows(x, "int8", block=block)
        return (torch._int_mm(q, codes.t()) * s[:, None] * scale).to(x.dtype)

    def by_torch_fp8():
        q, s = quantize_rows(x, "fp8_e4m3", block=block)
        return torch._scaled_mm(q, codes.t(), s[:, None], scale[None], out_dtype=x.dtype)

    if codes.dtype == torch.int8:
        case.add("comfy_kitchen", kitchen, case.truth)
        case.add("torch._int_mm", by_torch, case.truth)
    else:
        case.add("torch._scaled_mm", by_torch_fp8, case.truth)


def cases(device: str) -> Iterator[Case]:
    yield from packed_cases(device)
    for n, k in MLP if device == "cuda" else ():
        x = torch.randn(4608, k, device=device, dtype=torch.bfloat16)
        w = torch.randn(n, k, device=device) * k**-0.5
        for format in EIGHT_BIT_ERROR:
            yield eight_bit_case(x, w, format)
