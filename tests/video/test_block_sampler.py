"""The loop over blocks, with memories that know nothing."""

import asyncio
import json
from types import SimpleNamespace

import pytest
import torch
from block_helper import SIGMAS, Nothing, clip, euler, sampled
from nodes_helper import error, model_of
from tiny_models import conds, empty_latent

from comfy.patcher_extension import WrappersMP  # isort: skip

from tessera.patching import block_stop
from tessera.patching.block_sampler import BlockSampler
from tessera.patching.video_state import VideoState


def blocks(memory=None, **settings):
    memory = memory or Nothing()
    return BlockSampler("Block Video Sampler", settings.pop("per_block", 2), lambda guider, options: memory, **settings)


@pytest.fixture(scope="module")
def wan():
    return model_of("wan_meta")


def test_one_block_is_the_plain_run(wan):
    want = sampled(*wan, euler(), cfg=3.0)
    assert error(sampled(*wan, blocks(per_block=4, inner=euler()), cfg=3.0), want) < 1e-6


def test_blocks_are_opened_in_order_each_with_a_commit_pass_but_the_last(wan):
    memory = Nothing()
    sampled(*wan, blocks(memory), frames=5)
    assert memory.opened == [(0, 3, False), (0, 3, True), (3, 5, False)]


def test_a_stop_keeps_what_is_done(wan):
    whole = sampled(*wan, blocks(), frames=6)

    def stop(step, x0, x, total):
        if step == 4:  # within the second block of three steps
            assert block_stop.stop("9") == ["9"] and block_stop.stop("8") == []

    cut = sampled(*wan, blocks(node="9"), frames=6, callback=stop)
    assert torch.equal(cut, whole[:, :, :4])
    assert block_stop.stop() == []


def test_a_stop_in_the_pass_over_a_finished_block_begins_no_other(wan):
    class Asking(Nothing):
        def open(self, options, block):
            if block.commit:
                block_stop.stop()

    seen = []
    cut = sampled(*wan, blocks(Asking()), frames=6, callback=lambda step, x0, x, total: seen.append(step))
    assert torch.equal(cut, sampled(*wan, blocks(), frames=6)[:, :, :2]) and seen == [0, 1, 2, 2]
    assert block_stop.stop() == []


def test_each_finished_block_is_previewed_and_the_clip_at_the_end(wan):
    seen = []
    out = sampled(*wan, blocks(), frames=6, callback=lambda step, x0, x, total: seen.append((step, x0.shape[2], total)))
    assert [entry for entry in seen if entry[0] % 3 == 2] == [(2, 2, 9), (5, 2, 9), (8, 6, 9)]
    assert [step for step, _, _ in seen] == list(range(9)) and out.shape[2] == 6


def test_frames_that_are_given_stay(wan):
    latent = torch.randn(clip(wan[1], 6).shape)
    mask = torch.ones(1, 1, 6, 1, 1)
    mask[:, :, :3] = 0  # the first block, and half of the second one
    out = sampled(*wan, blocks(), latent=latent, mask=mask)
    assert error(out[:, :, :3], latent[:, :, :3]) < 1e-5
    assert error(out[:, :, 3:], latent[:, :, 3:]) > 0.1


@pytest.mark.parametrize("frames", [1, 2])
def test_a_prompt_takes_over_at_its_block(wan, frames):
    other = [[torch.randn_like(conds(wan[1])[0][0][0]), {}]]
    plain, changed = (sampled(*wan, blocks(prompts=p), frames=6) for p in ([], [(frames, other)]))
    assert torch.equal(plain[:, :, : 2 * frames], changed[:, :, : 2 * frames])
    assert error(changed[:, :, 2 * frames :], plain[:, :, 2 * frames :]) > 1e-4


def test_a_continued_clip_is_the_uninterrupted_one(wan):
    kept = VideoState()
    whole = sampled(*wan, blocks(), frames=7, batch=2)
    stop = lambda step, x0, x, total: block_stop.stop() if step == 3 else None  # noqa: E731
    first = sampled(*wan, blocks(keep=kept), frames=7, batch=2, callback=stop)
    rest = sampled(*wan, blocks(resume=kept.taken("This test")), frames=7, batch=2)
    assert first.shape[2] == 5 and torch.equal(rest, whole)


def test_an_error_leaves_no_state(wan):
    kept = VideoState()
    sampled(*wan, blocks(keep=kept))

    def interrupt(step, x0, x, total):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        sampled(*wan, blocks(keep=kept), callback=interrupt)
    with pytest.raises(ValueError, match="empty video state"):
        kept.taken("Save Video State")
    assert block_stop.stop() == []


def test_wrong_sigmas_and_latents_get_a_sentence(wan):
    for wrong in (SIGMAS[:-1], SIGMAS[-1:], torch.tensor([0.0, 0.0]), torch.tensor([1.0, torch.nan, 0.0])):
        with pytest.raises(ValueError, match="end at 0"):
            sampled(*wan, blocks(), sigmas=wrong)
    flux = model_of("flux")
    with pytest.raises(ValueError, match="video latent"):
        sampled(*flux, blocks(), latent=empty_latent(flux[1]))
    kept = VideoState()
    sampled(*wan, blocks(keep=kept), frames=4)
    with pytest.raises(ValueError, match="4 finished frames"):
        sampled(*wan, blocks(resume=kept.snapshot), frames=4)


def test_the_route_stops_the_run_of_a_node_and_refuses_nonsense(monkeypatch):
    routes, sent = {}, []
    server = SimpleNamespace(
        routes=SimpleNamespace(post=lambda path: lambda handler: routes.setdefault(path, handler)),
        client_id="c",
        send_sync=lambda event, message, client: sent.append((event, message, client)),
    )
    monkeypatch.setattr(block_stop, "_server", lambda: server)
    block_stop.register()

    def post(body):
        async def read():
            return json.loads(body)

        request = SimpleNamespace(can_read_body=bool(body), json=read)
        answer = asyncio.run(routes[block_stop.ROUTE](request))
        return answer.status, json.loads(answer.body)

    assert post("") == (200, {"stopping": []})
    with block_stop.watch("12:5") as run, block_stop.watch(None) as other:
        run.tell(1, 4)
        assert post('{"node": "12:5"}') == (200, {"stopping": ["12:5"]}) and run.asked and not other.asked
        assert post("{}")[1] == {"stopping": ["12:5", None]} and other.asked
        assert post("[]")[0] == post("{")[0] == post('{"node": {}}')[0] == 400
    told = [message["running"] for _, message, _ in sent]
    assert sent[0][:1] + sent[0][2:] == ("tessera.blocks", "c") and told == [True, False]
    assert post("{}") == (200, {"stopping": []})


def seen_by_the_network(model, spec, sampler, name, **run):
    """What the diffusion model is given as `name` in each evaluation."""
    found, patched = [], model.clone()

    def watch(executor, x, *args, **kwargs):
        found.append((x if name == "x" else kwargs[name]).clone())
        return executor(x, *args, **kwargs)

    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", watch)
    sampled(patched, spec, sampler, sigmas=SIGMAS[-2:], **run)
    return found


@pytest.mark.parametrize(
    ("family", "name", "axis", "given"),
    [
        ("wan_i2v", "x", 2, lambda: {"concat_latent_image": torch.randn(1, 16, 5, 8, 8), "concat_mask": torch.rand(1, 1, 5, 8, 8)}),
        ("wan_vace", "vace_context", 3, lambda: {"vace_frames": [torch.randn(1, 32, 5, 8, 8)],
                                                 "vace_mask": [torch.rand(1, 64, 5, 8, 8)], "vace_strength": [1.0]}),
    ],
)  # fmt: skip
def test_conditions_are_cut_to_the_block(family, name, axis, given):
    model, spec = model_of(family)
    positive = [[conds(spec)[0][0][0], given()]]
    (whole,) = seen_by_the_network(model, spec, euler(), name, frames=5, positive=positive)
    cut = seen_by_the_network(model, spec, blocks(inner=euler()), name, frames=5, positive=positive)
    first = 16 if name == "x" else 0  # behind the latent itself
    assert [part.shape[axis] for part in cut] == [3, 3, 2]
    got = torch.cat([cut[0], cut[2]], axis)
    assert torch.equal(got[:, first:], whole[:, first:]) and whole[:, first:].std() > 0


def _halves(kind: str, frames: int) -> tuple[dict, dict]:
    """Two conditions: of the first three frames, and of the others."""
    first = torch.zeros(frames, 8, 12)
    first[:3] = 1
    if kind == "area":
        return {"area": (3, 8, 12, 0, 0, 0)}, {"area": (frames - 3, 8, 12, 3, 0, 0)}
    return {"mask": first}, {"mask": 1 - first}


@pytest.mark.parametrize("frames", [5, 8])  # as many as rows: these are not cut
@pytest.mark.parametrize("kind", ["mask", "area"])
def test_prompts_of_a_part_of_the_clip(kind, frames):
    model, spec = model_of("wan_meta")
    one, two = (c[0][0] for c in conds(spec))
    latent = torch.zeros(1, 16, frames, 8, 12)
    alone = [sampled(model, spec, blocks(inner=euler()), latent=latent, positive=[[text, {}]]) for text in (one, two)]
    parts = [[text, of] for text, of in zip((one, two), _halves(kind, frames), strict=True)]
    got = sampled(model, spec, blocks(inner=euler()), latent=latent, positive=parts)
    if frames == 8:  # blocks of 2: the second has a frame of each
        assert error(got[:, :, :2], alone[0][:, :, :2]) < 1e-5 and error(got[:, :, 4:], alone[1][:, :, 4:]) < 1e-5
    else:
        assert error(got, torch.cat([alone[0][:, :, :3], alone[1][:, :, 3:]], 2)) < 1e-5
    rows = [[one, {"mask": torch.ones(1, 8, 12)}], [two, {"mask": torch.zeros(1, 8, 12)}]]
    assert error(sampled(model, spec, blocks(inner=euler()), latent=latent, positive=rows), alone[0]) < 1e-5


def test_a_start_frame_stands_in_its_block_alone():
    model, spec = model_of("kandinsky5")
    start, found, patched = torch.randn(1, 16, 1, *spec.latent[3:]), [], model.clone()

    def watch(executor, x, *args, **kwargs):
        found.append(kwargs.get("time_dim_replace") is not None)
        return executor(x, *args, **kwargs)

    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", watch)
    text, more = conds(spec)[0][0]
    positive = [[text, {**more, "time_dim_replace": start}]]
    sampled(patched, spec, blocks(), frames=4, positive=positive, sigmas=SIGMAS[-2:])
    assert found == [True, True, False]  # a block, its commit pass, a block


def test_a_text_as_wide_as_the_clip_is_long_stays_whole():
    model, spec = model_of("wan_meta")
    width = spec.context[2]
    latent = torch.zeros(1, 16, width, 4, 4)
    found = []
    patched = model.clone()

    def watch(executor, x, t, context, *args, **kwargs):
        found.append(context.shape[-1])
        return executor(x, t, context, *args, **kwargs)

    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", watch)
    sampled(patched, spec, blocks(per_block=32), latent=latent, sigmas=SIGMAS[-2:])
    assert set(found) == {width}
