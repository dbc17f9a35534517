"""The declared block lists are the ones that run, in that order, and can be hooked and skipped as declared."""

import importlib
import inspect
from collections import Counter
from pathlib import Path

import pytest
import torch

from tessera.archs import all_archs, find, layout_of

CLIP_TOKENS = 5  # what variants of Wan with an image encoder are given
FEWER = {"wan": 2, "wan_meta": 2, "wan_ar": 2}  # Wan without an image encoder makes the first two of three calls


def test_stack_runs_once_in_order(case):
    record = case.record
    stack = [path for _, _, path, _ in case.modules(stack=True)]
    assert stack and [path for path in record.order if path in stack] == stack
    outside = [path for _, _, path, _ in case.modules(stack=False)]
    assert sorted(record.order) == sorted(stack + outside)


def test_attention_calls_of_a_block(case):
    record = case.record
    if not case.arch.override:
        assert not record.calls
        return
    made, pad = Counter(c.block for c in record.calls), case.arch.pad(case.diffusion_model)
    for blocks, index, _, _ in case.modules():
        expected = FEWER.get(case.name, len(blocks.calls))
        if case.name == "sd3" and index == 1:  # only its first block attends to the image twice
            expected = 1
        assert made[(blocks.path, index)] == expected
    text = case.spec.context[1]
    assert all(c.queries <= -(-text // pad) * pad for c in record.calls if c.block is None)  # text refiners only
    kinds = {b.path: b.calls for b in case.arch.blocks}
    for call in (c for c in record.calls if c.block):
        kind = kinds[call.block[0]][call.nth]
        found = layout_of(case.arch, record.grid, kind, call.queries, call.keys, 0, pad)
        assert (found is not None) == (kind in ("self", "joint"))
        if kind == "joint":
            assert found.others >= (1 if "cross" in kinds[call.block[0]] else text)
        if kind == "cross":
            first = next(c for c in record.calls if c.block == call.block)
            assert call.queries == first.queries and call.keys in (text, CLIP_TOKENS)


def test_flags(case):
    record = case.record
    assert record.wrapped == case.arch.wrapper
    assert bool(record.calls) == case.arch.override
    stack = {b.path for b in case.lists(stack=True)}
    told = [c for c in record.calls if c.block and c.block[0] in stack]
    published = [c.options.get("block_index") == c.block[1] and "block_type" in c.options for c in told]
    assert all(published) == any(published) == case.arch.indexed if told else not case.arch.indexed


def test_identity_hook_changes_nothing(case):
    plain, seen = case.plain, Counter()

    def around(blocks, index, streams, proceed):
        seen[blocks.path, index] += 1
        assert all(s is not None for s in streams)
        return proceed(streams)

    record = case.run(around)
    assert torch.equal(record.output, plain)
    assert seen == Counter({(b.path, i): 1 for b, i, _, _ in case.modules()})
    assert torch.equal(case.unhooked(), plain)


def test_every_block_can_be_skipped(case):
    plain = case.plain
    record = case.run(lambda blocks, index, streams, proceed: streams, stack=True)
    stack = {path for _, _, path, _ in case.modules(stack=True)}
    assert not record.computed & stack and case.record.computed >= stack
    assert torch.isfinite(record.output).all() and not torch.equal(record.output, plain)


def test_what_a_block_returns(case):
    """A tensor for one stream, else one per stream in their order, each as long as it was."""
    streams = {}

    def around(blocks, index, values, proceed):
        out = proceed(values)
        if index == 0:
            streams[blocks.path] = ([shapes(v) for v in values], [shapes(v) for v in out])
        return out

    record = case.run(around, stack=True)
    for blocks in case.lists(stack=True):
        given, returned = streams[blocks.path]
        assert given == returned
        if blocks.replace is None:
            assert isinstance(record.outputs[blocks.path], tuple) == (len(blocks.streams) > 1)


def test_positions_are_those_of_the_signature(case):
    for blocks, _, _, module in case.modules():
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        if blocks.replace is None:
            assert tuple(names[place] for place in blocks.positions) == blocks.streams
        else:
            assert not blocks.positions


def shapes(value):
    return [shapes(v) for v in value] if isinstance(value, tuple) else value.shape


def test_mutation_is_declared(case):
    assert case.record.written == {b.path for b in case.arch.blocks if b.mutates}


@pytest.mark.parametrize(
    ("home", "name"), [k for k in all_archs() if k[0] not in ("diffusers", "networks")], ids=lambda part: part
)
def test_classes_exist(home, name):
    """Every class is found below its home, and it or a base makes the block lists that its Arch names."""
    import comfy.ldm.flux as ldm

    root = Path(ldm.__path__[0]).parent
    (file,) = [f for f in root.joinpath(*home.split(".")[:1]).rglob("*.py") if f"\nclass {name}(" in f.read_text()]
    module = importlib.import_module(".".join(("comfy.ldm", *file.relative_to(root).with_suffix("").parts)))
    defined = getattr(module, name)
    arch = all_archs()[home, name]
    assert find(object.__new__(defined)) is arch
    source = "".join(inspect.getsource(base) for base in defined.__mro__ if base.__module__.startswith("comfy.ldm"))
    for blocks in arch.blocks:
        assert f"self.{blocks.path.split('.')[0]} = " in source
