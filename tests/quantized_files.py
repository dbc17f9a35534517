"""Quantized files of a tiny FLUX of each kind, for tests that only read them."""

import pytest
import torch
from calibration_helper import job_of
from loading_helper import NunchakuFile, write_gguf
from nodes_helper import model_of, run_node
from quantized_helper import quantized

import folder_paths  # isort: skip

from tessera.nodes.loaders.calibrate_quantization import CalibrateQuantization
from tessera.patching.quant_load import load

FORMATS = ("tlq4", "svdquant", "gguf", "nunchaku", "fp8")  # fp8: in ComfyUI's own layout
SOME = r"^(?!double_blocks\.0\.img_(attn\.(qkv|proj)|mlp))"  # exclude: all but the layers that are patched here
_made: list = []


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """One file of each kind, of a tiny FLUX, made once in a process."""
    if _made:
        return _made[0]
    folder = tmp_path_factory.mktemp("models")
    known = dict(folder_paths.folder_names_and_paths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            folder_paths, "folder_names_and_paths", known | {"diffusion_models": ([str(folder)], {".safetensors"})}
        )
        patch.setattr(folder_paths, "get_output_directory", lambda: str(folder / "output"))
        model, spec = model_of("flux")
        run = run_node(CalibrateQuantization, **job_of(model, spec, steps=2), model=model, rows=32, filename="c")
        quantized("flux", "tlq4", rotation="hadamard_random", exclude=SOME)
        (folder / "flux.safetensors").rename(folder / "tlq4.safetensors")
        quantized("flux", "fp8_e4m3", exclude=SOME)
        (folder / "flux.safetensors").rename(folder / "fp8.safetensors")
        how = {"rotation": "zigzag_hadamard", "calibration": run[0], "exclude": SOME}
        quantized("flux", "svdquant_int4", **how)
        (folder / "flux.safetensors").rename(folder / "svdquant.safetensors")
    write_gguf(folder / "gguf.gguf", "flux", ("Q4_K", "Q6_K"))
    torch.manual_seed(0)
    NunchakuFile("flux").write(folder / "nunchaku.safetensors")
    _made.append(folder)
    return folder


def opened(files, kind: str):
    found = [path for path in files.iterdir() if path.stem == kind]
    return load(str(found[0]))
