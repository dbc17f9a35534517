"""A pose beside other nodes, in batches, in other sizes and dtypes, and where it is refused."""

import gc
import weakref
from dataclasses import replace

import comfy_extras.nodes_context_windows as windows
import folder_paths
import pytest
import torch
from dynamictrl_helper import SAMPLE, SIGMAS, apart, called, loaded, pose, posed, spec
from nodes_helper import Job, error, facts, model_of, run_node, taylor, watching
from tiny_models import conds

from tessera.nodes.attention.local_window_attention import LocalWindowAttention
from tessera.nodes.attention.sparse_linear_attention import SparseLinearAttention
from tessera.nodes.loaders.quantize_model import QuantizeModel

NAME = "Apply Pose Control"


def test_beside_attention_nodes_and_caches():
    model, _ = loaded()
    patched, short, job = posed(model), Job(spec(), sigmas=SIGMAS[4:]), Job(spec(), sigmas=SIGMAS, cfg=1.0)

    def window(m):
        return run_node(LocalWindowAttention, model=m, radius=1, temporal_radius=1, min_tokens=0)[0]

    after, before, want = short(window(patched)), short(posed(window(model))), short(patched)
    assert error(after, before) < 1e-5 and error(after, want) > 1e-4
    sparse = run_node(SparseLinearAttention, model=patched, min_tokens=0)[0]
    assert torch.isfinite(short(sparse)).all()
    assert torch.equal(short(taylor(patched, interval=1)), want)
    for cached in (taylor(patched), posed(taylor(model))):
        with watching(cached) as watch:
            job(cached)
        full = sum(d["kind"] == "full" for d in facts(cached)["decisions"])
        assert min(watch.each) == full < 6 and facts(cached, NAME)["steps"] <= 2 * 6


@pytest.mark.parametrize("fix", [False, True])
def test_each_context_window_sees_its_own_frames(fix):
    """Without an overlap: what each half of the video gives with its half of the pose. With core's fix, which puts one
    frame before a window, the pose has that frame too."""
    model, _ = loaded()
    whole, noise = pose(size=(6, *SAMPLE)), torch.randn(1, 16, 6, *SAMPLE, generator=torch.Generator().manual_seed(5))
    settings = {"context_length": 3, "context_overlap": 0, "dim": 2, "causal_window_fix": fix, "freenoise": False}
    cut = run_node(windows.ContextWindowsManualNode, model=posed(model, whole), **settings)[0]
    got = Job(spec(), sigmas=SIGMAS[3:], noise=noise, latent=torch.zeros_like(noise))(cut)
    halves = [slice(0, 3)] if fix else [slice(0, 3), slice(3, 6)]
    assert torch.isfinite(got).all()
    for half in halves:
        part = {"samples": whole["samples"][:, :, half]}
        want = Job(spec(), sigmas=SIGMAS[3:], noise=noise[:, :, half], latent=torch.zeros(1, 16, 3, *SAMPLE))(
            posed(model, part)
        )
        assert error(got[:, :, half], want) < 1e-5


def test_between_the_loader_and_the_pose_the_model_may_be_quantized(tmp_path, monkeypatch):
    """What the loader put on the MODEL moves to the quantized one: rotations, added norms, and the pose after it."""
    model, _ = loaded()
    paths = {**folder_paths.folder_names_and_paths, "diffusion_models": ([str(tmp_path)], {".safetensors"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", paths)
    small = run_node(QuantizeModel, model=model, format="int8_row", filename="dynamictrl")[0]
    job = Job(spec(), sigmas=SIGMAS[2:])
    want, plain = job(posed(model)), job(model)
    assert error(job(small), plain) < 0.02 and error(job(posed(small)), want) < 0.02 < error(plain, want)
    again = run_node(QuantizeModel, model=model, format="int8_row", filename="dynamictrl", existing="reuse")[0]
    assert torch.equal(job(posed(again)), job(posed(small)))
    with pytest.raises(ValueError, match="Connect it before the node that put them there"):
        run_node(QuantizeModel, model=posed(model), format="int8_row", filename="late")


def test_a_run_leaves_nothing_behind():
    model, _ = loaded()
    patched, job = posed(model), Job(spec(), steps=2)
    plain, first, kept = job(model), job(patched), []

    def stop(step):
        run = gc_find()
        kept.extend(weakref.ref(state) for state in run)
        raise RuntimeError("stopped")

    def gc_find():
        from tessera.patching.pose_control import Chain, PoseState

        return [o for o in gc.get_objects() if isinstance(o, PoseState | Chain)]

    with pytest.raises(RuntimeError, match="stopped"):
        Job(spec(), steps=2, on_step=stop)(patched)
    gc.collect()
    assert kept and all(ref() is None for ref in kept)
    Job(spec(), steps=1, latent=torch.zeros(1, 16, 2, 6, 10))(posed(model, pose(size=(2, 6, 10))))
    assert torch.equal(job(patched), first) and torch.equal(job(model), plain) and error(first, plain) > 1e-3


def test_memory_is_counted():
    model, _ = loaded()
    feature = posed(model).model_options["transformer_options"]["tessera_features"][-1]
    bare = replace(feature, cache=False)

    class Run:
        model = None

    Run.model, Run.dtype = model.model, model.model.get_dtype_inference()
    size = model.model.get_dtype_inference().itemsize
    assert feature.held_bytes(Run, (1, 16, 3, 8, 12), {"p": [0], "n": [0]}) == (2 + 2) * 72 * 128 * size
    assert bare.held_bytes(Run, (1, 16, 3, 8, 12), {}) == 3 * 72 * 128 * size
    assert replace(feature, strength=0.0).held_bytes(Run, (1, 16, 3, 8, 12), {}) == 0
    beside = model.get_additional_models_with_key("tessera_dynamictrl")[0]
    assert beside.model_size() == sum(p.numel() * p.element_size() for p in beside.model.parameters())


def test_what_does_not_fit_is_refused():
    model, _ = loaded()
    with pytest.raises(ValueError, match="pose video has 5 x 8 x 12 latent cells .* to be drawn 3 x 8 x 12"):
        Job(spec(), steps=1)(posed(model, pose(size=(5, 8, 12))))
    with pytest.raises(ValueError, match="pose video has 3 x 6 x 12 latent cells"):
        Job(spec(), steps=1)(posed(model, pose(size=(3, 6, 12))))
    with pytest.raises(ValueError, match="needs the MODEL of Load DynamiCtrl"):
        posed(model_of("cogvideox")[0])
    with pytest.raises(ValueError, match="16 channels and 5 dimensions"):
        posed(model, {"samples": torch.ones(1, 4, 3, 8, 12)})
    with pytest.raises(ValueError, match="is not finite"):
        posed(model, {"samples": torch.full((1, 16, 3, 8, 12), float("nan"))})
    with pytest.raises(ValueError, match="start_percent 0.5 must not lie after end_percent 0.2"):
        posed(model, start_percent=0.5, end_percent=0.2)


def test_bf16_other_sizes_and_a_first_frame():
    model, official = loaded()
    half = model.clone()
    half.set_model_compute_dtype(torch.bfloat16)
    near = Job(spec(), steps=2)(posed(half))
    assert error(near, Job(spec(), steps=2)(posed(model))) < 0.1
    size = (5, 6, 10)
    patched = posed(model, pose(size=size))
    positive, negative = conds(spec())
    positive[0][1]["concat_latent_image"] = negative[0][1]["concat_latent_image"] = torch.randn(1, 16, 1, *size[1:])
    job = Job(spec(), steps=1, latent=torch.zeros(1, 16, *size), positive=positive, negative=negative)
    (x, timestep, context, _), out = called(patched, job)[0]
    z = model.model.process_latent_in(pose(size=size)["samples"]).expand(len(x), -1, -1, -1, -1)
    assert error(out, official(x, context, timestep, z)) < 1e-5
    odd = Job(spec(), steps=1, latent=torch.zeros(1, 16, 2, 7, 9))(posed(model, pose(size=(2, 7, 9))))
    assert torch.isfinite(odd).all()


def test_each_row_of_a_batch_has_its_pose():
    model, _ = loaded()
    two = torch.cat((pose()["samples"], pose(seed=4)["samples"]))
    noise = torch.randn(2, 16, 3, *SAMPLE, generator=torch.Generator().manual_seed(5))
    got = Job(spec(), steps=2, batch=2, noise=noise)(posed(model, {"samples": two}))
    for row in range(2):
        want = Job(spec(), steps=2, noise=noise[row : row + 1])(posed(model, {"samples": two[row : row + 1]}))
        assert error(got[row : row + 1], want) < 1e-5
    one = Job(spec(), steps=2, batch=2, noise=noise)(posed(model, {"samples": two[:1]}))
    assert error(one[1:], got[1:]) > 1e-3
    split = Job(spec(), steps=2, batch=2, noise=noise)(apart(posed(model, {"samples": two})))
    assert error(split, got) < 1e-5


def test_two_poses_add():
    model, official = loaded()
    first, second = pose(), pose(seed=8)
    both = posed(posed(model, first, strength=0.5), second, strength=0.25)
    job = Job(spec(), sigmas=SIGMAS[3:5], cfg=1.0)
    (given, out), *_ = called(both, job)
    swapped = posed(posed(model, second, strength=0.25), first, strength=0.5)
    (_, other), *_ = called(swapped, job)
    assert error(other, out) < 1e-5
    alone = official(given[0], given[2], given[1], model.model.process_latent_in(first["samples"]), strength=0.5)
    assert error(out, alone) > 1e-3
