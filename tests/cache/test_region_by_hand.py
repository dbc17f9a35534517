"""Region-Adaptive Sampling against the method by hand, and its parts against plain ones."""

import math

import pytest
import torch
from nodes_helper import Job, error, model_of
from region_helper import ras, steps

from tessera.archs.wan import PER_TOKEN
from tessera.methods.cache.region import Choice, ages, latent_mask, measure
from tessera.patching.region_rows import Place, gathered, widened
from tessera.patching.region_state import Rows


class Naive:
    """The method by hand: everything is recomputed at every step, and attention over the whole sequence is given the
    last keys and values of tokens that are left out. Patches of 2, the image last in the sequence."""

    def __init__(self, choice: Choice, sparse: str, spec, others: set[int]):
        t = spec.latent[2] if len(spec.latent) == 5 else 1
        self.choice, self.sparse, self.grid, self.step = choice, sparse, (t, *(n // 2 for n in spec.latent[-2:])), -1
        self.n, self.others = math.prod(self.grid), others  # tokens of a sequence that are not of the image
        self.keys: dict[tuple, torch.Tensor] = {}
        self.v, self.active, self.measured = None, None, None
        self.left_out = None
        self.layer = 0

    def attention(self, func, q, k, v, heads, *args, **kwargs):
        axis = 2 if kwargs.get("skip_reshape") else 1
        if q.shape[axis] != k.shape[axis] or q.shape[axis] - self.n not in self.others:
            return func(q, k, v, heads, *args, **kwargs)
        k, v, layer = k.clone(), v.clone(), self.layer
        self.layer += 1
        for name, t in (("k", k.movedim(axis, 1)), ("v", v.movedim(axis, 1))):
            for row in range(t.shape[0]):
                for token in range(self.n):
                    at = (layer, name, row, token)
                    if self.active is None or token in self.active[row % len(self.active)].tolist():
                        self.keys[at] = t[row, t.shape[1] - self.n + token].clone()
                    t[row, t.shape[1] - self.n + token] = self.keys[at]
        return func(q, k, v, heads, *args, **kwargs)

    def model(self, apply_model, given):
        x, sigma, c = given["input"], given["timestep"], given["c"]
        self.step, self.layer = self.step + 1, 0
        left_out = torch.zeros(x.shape[0] // 2, self.n) if self.left_out is None else self.left_out
        sparse = self.sparse[self.step] == "r"
        self.active = self.choice.choose(self.measured, left_out, None, self.n // 2) if sparse else None
        self.left_out = ages(left_out, self.active)
        options = {**c["transformer_options"], "optimized_attention_override": self.attention}
        made = apply_model(x, sigma, **{**c, "transformer_options": options})
        level = sigma.reshape(-1, *[1] * (x.ndim - 1))
        v = (x - made) / level
        if self.active is not None:
            mask = latent_mask(self.active, self.grid, (1, 2, 2), x.shape).repeat(2, *[1] * (x.ndim - 1))
            v = torch.where(mask, v, self.v)
        self.v = v
        positive = given["cond_or_uncond"].index(0)
        self.measured = measure(v.chunk(2)[positive], None, self.choice.metric, (1, 2, 2))
        return x - level * v


@pytest.mark.parametrize(
    "name, keep",
    [("flux", "high"), ("flux", "low"), ("flux", "mixed"), ("sd3", "high"), ("qwen_image", "low"), ("lumina2", "high"),
     ("wan_meta", "high"), ("hunyuan_video", "high"), ("chroma", "low"), ("aura", "high")],
)  # fmt: skip
def test_against_the_method_by_hand(name, keep):
    """With CFG in one batch, and two pictures that each have their own tokens."""
    model, spec = model_of(name)
    job = Job(spec, batch=2, steps=6)
    text = spec.context[1]  # AuraFlow adds 8 registers; some of SD3's blocks attend to the image alone as well
    others = {"wan_meta": {0}, "sd3": {text, 0}, "aura": {text + 8}}.get(name, {text})
    naive = Naive(Choice(keep=keep), "ffrrfr", spec, others)
    by_hand = model.clone()
    by_hand.set_model_unet_function_wrapper(naive.model)
    want = job(by_hand)
    patched = ras(model, keep=keep, round_to=1)
    got = job(patched)
    assert steps(patched) == naive.sparse and naive.layer >= 2
    assert error(got, want) < 2e-5 and error(want, job(model)) > 1e-3


@pytest.mark.parametrize("entries", [2, 6, 12])
def test_time_steps_of_frames_follow_their_tokens(entries):
    """Wan's modulation for each of 2 frames, for several tokens in a row, and for every token, of 12."""
    vec, rows = torch.randn(2, entries, 6, 4), torch.tensor([[0, 5, 6, 11], [1, 2, 3, 7]])
    place = Place(12, 0, 12, 0, 12)
    got = gathered({"pe": None, "vec": vec}, PER_TOKEN, place, rows, rows, torch.empty(2, 12, 4))["vec"]
    assert torch.equal(got, torch.stack([vec.repeat_interleave(12 // entries, 1)[b, rows[b]] for b in range(2)]))


def test_masks_over_computed_tokens_become_masks_over_all():
    """2 of text, 4 of image (the tokens at 1 and 3 are computed), 1 behind."""
    rows = torch.tensor([0, 1, 3, 5, 6])
    image = slice(2, 6)
    text = torch.tensor([0.0, -9.0, 0.0, 0.0, 0.0]).reshape(1, 1, 1, 5)
    assert widened(text, image, 5, 7, rows).flatten().tolist() == [0, -9, 0, 0, 0, 0, 0]
    over_all = torch.arange(7.0).reshape(1, 1, 1, 7)
    assert torch.equal(widened(over_all, image, 5, 7, rows), over_all)
    each = torch.arange(49.0).reshape(1, 1, 7, 7)
    assert torch.equal(widened(each, image, 5, 7, rows), each[:, :, rows])
    own = torch.stack((rows, torch.tensor([0, 1, 2, 4, 6])))
    assert torch.equal(widened(each, image, 5, 7, own), torch.stack([each[0, :, r] for r in own]))


@pytest.mark.parametrize("dtype, tolerance", [(None, 0.0), (torch.bfloat16, 4e-3), (torch.float8_e4m3fn, 0.04)])
def test_kept_rows_are_those_of_a_dictionary(dtype, tolerance):
    """Rows after updates against a plain dictionary by sample and token."""
    torch.manual_seed(2)
    first = torch.randn(2, 3, 20, 8) * torch.logspace(-3, 3, 20)[:, None]  # fp8 alone would overflow and underflow
    rows, want = Rows.of(first, dtype), {(b, n): first[b, :, n] for b in range(2) for n in range(20)}
    for _ in range(3):
        at = torch.stack([torch.randperm(20)[:7] for _ in range(2)])
        new = torch.randn(2, 3, 7, 8)
        rows.write(new, at)
        want.update({(b, int(n)): new[b, :, m] for b in range(2) for m, n in enumerate(at[b])})
    got = rows.read(torch.float32)
    for (b, n), row in want.items():
        assert (got[b, :, n] - row).norm() <= tolerance * row.norm()
    assert first.data_ptr() != rows.data.data_ptr()
