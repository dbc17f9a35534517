"""python bench/control_cache.py [--width 512] [--blocks 2 4] [--rounds 5] [--device cpu]: time of a step of a stock FLUX with an
EasyControl condition in every step over one that finds its keys, beside the ratio of their FLOPs. Random weights of the stock
class; one condition of 512 x 512 for 1024 x 1024, and two for 512 x 512. Exits 1 where the time gains less than 0.9 of what
the FLOPs allow."""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bootstrap"))

import torch
from pack import load_pack, use_comfyui
from timing import machine

use_comfyui()
load_pack()

import comfy.ldm.flux.model
import comfy.ops

from tessera.methods.control.easycontrol import fresh
from tessera.patching.easycontrol import flops_ratio
from tessera.patching.easycontrol_pass import appending, keys_and_values, positions_of

SHARE = 0.9  # of the FLOP ratio
TEXT = 512
CASES = {"one condition of 512 x 512 at 1024 x 1024": (64, 1), "two conditions of 512 x 512 at 512 x 512": (32, 2)}
SIDE = 32  # tokens along a condition of 512 pixels


def network(width: int, blocks: list[int], device: str):
    """The stock class, heads of 128, random weights in bf16 on a GPU and in fp32 on a CPU."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    made = comfy.ldm.flux.model.Flux(
        in_channels=16, out_channels=16, vec_in_dim=64, context_in_dim=64, hidden_size=width, mlp_ratio=4.0,
        num_heads=width // 128, depth=blocks[0], depth_single_blocks=blocks[1], axes_dim=[16, 56, 56], theta=10000,
        patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[], dtype=dtype, device=device,
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return made.eval().requires_grad_(False)


class Told:
    """What the patch tells the dispatcher of."""

    rotation = None


def measure(net, side: int, conditions: int, rounds: int) -> dict[str, float]:
    """Medians of the ratio of paired rounds."""
    weight = next(net.parameters())
    device, dtype = weight.device, weight.dtype
    x = torch.randn(1, 16, 2 * side, 2 * side, device=device, dtype=dtype)
    given = {"context": torch.randn(1, TEXT, 64, device=device, dtype=dtype), "y": torch.randn(1, 64, device=device, dtype=dtype),
             "guidance": torch.full((1,), 3.5, device=device, dtype=dtype), "timestep": torch.full((1,), 0.5, device=device, dtype=dtype)}  # fmt: skip
    sizes = len(net.double_blocks), len(net.single_blocks), net.hidden_size
    loras = [fresh(*sizes, 16, torch.Generator().manual_seed(i)) for i in range(conditions)]
    latents = [torch.randn(1, 16, 2 * SIDE, 2 * SIDE, device=device, dtype=dtype) for _ in loras]
    ids = positions_of(net, torch.empty(1, *x.shape[1:]), {}).ids(SIDE, SIDE, False).to(device)
    turned = net.pe_embedder(ids)

    def held():
        return [keys_and_values(net, c, given, turned, w, 1.0) for c, w in zip(latents, loras, strict=True)]

    def step(kept):
        chain = [appending(Told(), entry.__getitem__, turned) for entry in kept]
        return net(x, given["timestep"], given["context"], given["y"], given["guidance"],
                   transformer_options={"patches": {"attn1_patch": chain}})  # fmt: skip

    def clocked(run):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    kept, ratios = held(), []
    step(kept)
    for _ in range(rounds):
        cached, uncached = clocked(lambda: step(kept)), clocked(lambda: step(held()))
        ratios.append(uncached / cached)
    allowed = flops_ratio(side * side + TEXT, net.hidden_size, SIDE * SIDE * conditions)
    if conditions > 1:  # conditions do not see each other
        allowed -= 4 * net.hidden_size * (conditions**2 - conditions) * SIDE**4 / plain(net, side, conditions)
    return {"time_ratio": statistics.median(ratios), "flop_ratio": allowed}


def plain(net, side: int, conditions: int) -> float:
    """FLOPs of a block for a step that finds the keys."""
    tokens = side * side + TEXT
    return 24 * net.hidden_size**2 * tokens + 4 * net.hidden_size * tokens * (tokens + conditions * SIDE**2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, nargs=2, default=[2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    with torch.inference_mode():
        net = network(args.width, args.blocks, args.device)
        found = {name: measure(net, *case, args.rounds) for name, case in CASES.items()}
    print(json.dumps({"machine": machine(args.device), **found}, indent=2))
    missed = [name for name, row in found.items() if row["time_ratio"] < SHARE * row["flop_ratio"]]
    for name in missed:
        print(f"missed: {name}: {found[name]['time_ratio']:.3f} of {found[name]['flop_ratio']:.3f}", file=sys.stderr)
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
