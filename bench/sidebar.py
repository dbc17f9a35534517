"""python bench/sidebar.py [--steps 20] [--rounds 5] [--blocks 57]: what telling the sidebar of every step costs, on the
smallest model there is, the digits FLUX with Taylor Cache. All that is done for it is timed where it is done: columns and
blocks of the time line, events with their JSON as ComfyUI's own loop would send them; the blocks of a large model are added.
Times are of the processor, on one thread, so that a busy machine does not count. Prints microseconds an evaluation and the
share of a plain step; exits 1 where that is more than 1 %."""

import argparse
import asyncio
import functools
import json
import statistics
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bootstrap"))

import torch
from pack import load_pack, use_comfyui
from timing import machine

use_comfyui()
load_pack()

import comfy.sample
import comfy.sd
from server import PromptServer

from tessera.methods.digits import words
from tessera.patching import blocks, live, report, timeline
from tessera.patching.cache_blocks import StackCache
from tessera.patching.run import attach

MOST = 0.01  # of a step
TIMED = [(live.Live, "begin"), (live.Live, "step"), (live.Live, "whole"), (blocks, "_note"), (report, "notify")]


class Server:
    """Sends as ComfyUI does: from another thread's loop, which makes the JSON."""

    client_id, last_node_id = "page", "1"

    def __init__(self):
        self.events, self.bytes, self.seconds = 0, 0, 0.0
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def send_sync(self, event, data, sid=None):
        self.loop.call_soon_threadsafe(self._made, event, data)

    def _made(self, event, data):
        start = time.thread_time()
        made = json.dumps({"type": event, "data": data})
        self.events, self.bytes = self.events + 1, self.bytes + len(made)
        self.seconds += time.thread_time() - start


class Spent:
    """Seconds in the functions of TIMED, wherever they are called."""

    def __init__(self):
        self.seconds = 0.0
        for owner, name in TIMED:
            setattr(owner, name, self._watched(getattr(owner, name)))

    def _watched(self, function):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - start

        return timed


def job(model, steps: int) -> float:
    """Seconds of one run."""
    prompt, empty = (
        [[t, {"pooled_output": p}]] for t, p in (words.encode(torch.tensor([words.parse(w)])) for w in ("seven", ""))
    )
    latent = torch.zeros(1, 16, 32, 32)
    noise = comfy.sample.prepare_noise(latent, 1)
    start = time.thread_time()
    comfy.sample.sample(model, noise, steps, 2.0, "euler", "simple", prompt, empty, latent, disable_pbar=True, seed=1)
    return time.thread_time() - start


def of_a_block() -> float:
    """Seconds that one more block of a model costs."""
    made, count = timeline.Timeline(), 1000
    start = time.thread_time()
    for number in range(count):
        made.block(0, SimpleNamespace(number=number, count=count), timeline.COMPUTED)
    return (time.thread_time() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=57)
    given = parser.parse_args()
    torch.set_num_threads(1)
    server, spent = Server(), Spent()
    PromptServer.instance = server
    plain = comfy.sd.load_diffusion_model(str(ROOT / "models/digits_flux.safetensors"))
    cached = attach(plain, StackCache("4"))
    with torch.inference_mode():
        job(plain, 3), job(cached, 3)
        steps, costs = [], []
        for _ in range(given.rounds):
            steps.append(job(plain, given.steps) / given.steps)
            spent.seconds = server.seconds = 0.0
            job(cached, given.steps)
            time.sleep(0.1)  # for the last event
            costs.append((spent.seconds + server.seconds) / given.steps + given.blocks * of_a_block())
    step, cost = statistics.median(steps), statistics.median(costs)
    print(f"{machine('cuda' if torch.cuda.is_available() else 'cpu')}: {1e6 * cost:.0f} us an evaluation, {given.blocks} blocks; "
          f"a plain step takes {1e3 * step:.1f} ms: {cost / step:.2%} (bar {MOST:.0%}); "
          f"{server.events} events, {server.bytes / server.events / 1024:.1f} KiB each")  # fmt: skip
    sys.exit(cost > MOST * step)


if __name__ == "__main__":
    main()
