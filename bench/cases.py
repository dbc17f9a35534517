"""What is measured: every kernel with an example(), and the operators that make a promise about speed."""

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attention_methods
import operators
import papers
import quantized
import rivals
import torch
from case import Case
from pack import load_pack

TOLERANCE = operators.TOLERANCE
TOKENS = {"cpu": (1024, 4096), "cuda": (4608, 16896, 32760)}


def kernels() -> Iterator[tuple[str, Any]]:
    """(stem, module) of every kernel file that has an example."""
    pack = load_pack()
    folder = str(Path(pack.__path__[0]) / "kernels")
    for found in pkgutil.walk_packages([folder], "tessera.kernels."):
        module = importlib.import_module(found.name)
        if hasattr(module, "example"):
            yield found.name.rsplit(".", 1)[1], module


def kernel_cases(device: str) -> Iterator[Case]:
    """On a CPU only those with a rival: there the reference is the kernel."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for stem, module in kernels():
        op = getattr(module, stem)
        if device == "cpu" and not rivals.known(stem, device):
            continue
        for tokens in TOKENS[device]:
            inputs = module.example(tokens, device, dtype)
            own = rivals.of(stem, inputs, device)
            yield Case(
                stem,
                f"{tokens} tokens, {str(dtype)[6:]}",
                lambda op=op, inputs=inputs: op(*inputs),
                own.truth or (lambda module=module, inputs=inputs: module.reference(*inputs)),
                TOLERANCE[dtype],
                own.runs or {"reference": lambda module=module, inputs=inputs: module.reference(*inputs)},
                flush=own.memory_bound,
                facts=own.facts,
                same=own.same,
                left_out=own.left_out,
            )


def all_cases(device: str) -> Iterator[Case]:
    yield from kernel_cases(device)
    yield from operators.operator_cases(device)
    yield from papers.cases(device)
    yield from quantized.cases(device)
    yield from operators.method_cases(device)
    yield from attention_methods.cases(device)
