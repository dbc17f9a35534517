"""python bench/long_video.py [--chunks 4 50] [--frames 3] [--side 16]: memory and time of a clip made chunk by chunk.

Samples a random SANA-Video block by block in a child process for each length, and counts within every block of the network
what all living tensors hold beside its weights. Noise, latents and the finished frames are left out, for they are as long as the
clip. Promises: the longest run holds at most 1.1 times the shortest, the same state, and its last quarter of
chunks takes at most 1.25 times the time of the second. Exits 1 where one is missed.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bootstrap"))

import torch
from pack import load_pack, use_comfyui

MOST_MEMORY, MOST_TIME = 1.1, 1.25
STEPS = "1000,500"


def held(clip: int) -> int:
    """Bytes of every tensor made since the model stood, each storage once, without those as large as the whole clip: noise,
    latents and finished frames."""
    gc.collect()  # core makes classes while it joins conditions, which hold the chunk's latents until then
    found = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and thing.device.type != "meta":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(size for size in found.values() if size != clip)


def model(device):
    """A MODEL of random weights: 4 blocks of 2 heads of 112."""
    import comfy.model_patcher

    from tessera.networks.sana_layers import Sizes
    from tessera.patching.diffusers_sampling import noise_of
    from tessera.patching.layers import place
    from tessera.patching.sana_video import SanaVideo, SanaVideoModel, family
    from tessera.patching.sana_video_load import SCHEDULE

    sizes, noise = Sizes(16, 2, 112, 4, 2, 64, 672), noise_of(SCHEDULE, "bench")
    made, generator = SanaVideo(sizes), torch.Generator().manual_seed(0)
    weights = {
        key: torch.randn(value.shape, generator=generator) / max(1, value[0].numel()) ** 0.5
        if value.ndim > 1
        else torch.ones_like(value)
        for key, value in made.state_dict().items()
    }
    place(made, weights, torch.float32, torch.float32)
    return comfy.model_patcher.ModelPatcher(
        SanaVideoModel(family(sizes, noise), noise, made), device, torch.device("cpu")
    )


def sampled(patched, feature, chunks: int, frames: int, side: int, told) -> int:
    """One run -> bytes of the state at its end."""
    import comfy.samplers

    from tessera.patching.linear_blocks import BlockLinearSampler, levels_of

    levels, memories = levels_of(STEPS, 3.0), []

    def memory(guider, options):
        memories.append(feature.memory(guider, options))
        return memories[-1]

    sampler = BlockLinearSampler(feature.name, frames, memory, levels=tuple(map(float, levels)))
    guider = comfy.samplers.CFGGuider(patched)
    guider.set_conds(*([[torch.randn(1, 8, 64), {}]] for _ in range(2)))
    guider.set_cfg(1.0)
    clip = torch.zeros(1, 16, chunks * frames, side, side)
    with torch.inference_mode():
        guider.sample(torch.randn(clip.shape), clip, sampler, levels, callback=told, disable_pbar=True, seed=1)
    return memories[0].held_bytes()


def child(chunks: int, frames: int, side: int) -> None:
    """Two runs, one counted and one timed: the most bytes within a block of the network, those of the state, and the seconds of
    each chunk, as JSON."""
    import comfy.model_management

    from tessera.patching.linear_blocks import LinearBlocks
    from tessera.patching.run import attach

    feature = LinearBlocks(None, per_block=frames)
    patched = attach(model(comfy.model_management.get_torch_device()), feature)
    clip, most, ticks = 4 * 16 * chunks * frames * side * side, [0], []
    gc.collect()
    gc.freeze()  # what stands now is not counted
    blocks = patched.model.diffusion_model.transformer_blocks
    hooks = [block.ff.register_forward_hook(lambda *_: most.append(max(most.pop(), held(clip)))) for block in blocks]
    state = sampled(patched, feature, chunks, frames, side, None)
    for hook in hooks:
        hook.remove()

    def told(step, x0, x, total):
        if (step + 1) % len(STEPS.split(",")) == 0:
            ticks.append(time.perf_counter())

    sampled(patched, feature, chunks, frames, side, told)
    seconds = [b - a for a, b in zip(ticks, ticks[1:], strict=False)]
    print(json.dumps({"most": most[0], "state": state, "seconds": seconds}))


def run(chunks: int, args) -> dict:
    given = [str(value) for value in (chunks, args.frames, args.side)]
    out = subprocess.run([sys.executable, __file__, "--child", *given], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(out.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, nargs=2, default=[4, 50])
    parser.add_argument("--frames", type=int, default=3, help="latent frames of a chunk")
    parser.add_argument("--side", type=int, default=16, help="of the latent")
    parser.add_argument("--child", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    use_comfyui()
    load_pack()
    if args.child:
        child(*args.child)
        return 0
    few, many = (run(chunks, args) for chunks in args.chunks)
    quarter = len(many["seconds"]) // 4
    early, late = (statistics.median(many["seconds"][at]) for at in (slice(1, quarter + 1), slice(-quarter, None)))
    for chunks, told in zip(args.chunks, (few, many), strict=True):
        print(
            f"{chunks} chunks: {told['most'] / 2**20:.2f} MiB beside noise and latents, {told['state'] / 2**10:.1f} KiB of state"
        )
    memory, duration = many["most"] / few["most"], late / early
    print(f"memory x {memory:.3f}, time of a chunk {early:.3f} s early, {late:.3f} s late (x {duration:.2f})")
    missed = memory > MOST_MEMORY or few["state"] != many["state"] or duration > MOST_TIME
    print("missed" if missed else "kept: at most 1.1 x the memory, the same state, flat time")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
