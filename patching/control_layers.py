"""Parts of a core ControlNet: which of its residuals come from one layer, nets that give some of them only, and the blocks
that need not be computed then. Nothing of a control net's forward is repeated here."""

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from comfy.controlnet import ControlBase

NAMES = ("input", "output", "middle")  # lists of residuals, as core names them
Place = tuple[str, int]  # list, number in it


@dataclass(frozen=True)
class Layer:
    """Residuals that are one and the same tensor: a control net with fewer blocks than the model repeats them."""

    name: str  # of the list
    number: int  # among the layers of its list, in order
    places: tuple[int, ...]  # in the list

    @property
    def words(self) -> str:
        first, last, count = self.places[0], self.places[-1], len(self.places)
        if count == 1:
            return f"{self.name} {first}"
        return f"{self.name} {first}-{last}" if last - first == count - 1 else f"{self.name} {first} x{count}"


@dataclass(frozen=True)
class Layout:
    """What a control net gives: how many entries in each list, and its layers."""

    sizes: Mapping[str, int]
    layers: tuple[Layer, ...]


def layout_of(residuals: Mapping[str, Any]) -> Layout:
    """residuals: lists of tensors and None by name, before they are scaled or merged."""
    layers = []
    for name in NAMES:
        places: dict[int, list[int]] = {}
        for i, tensor in enumerate(residuals.get(name) or ()):
            if tensor is not None:
                places.setdefault(id(tensor), []).append(i)
        layers += [Layer(name, n, tuple(found)) for n, found in enumerate(places.values())]
    return Layout({name: len(residuals[name]) for name in NAMES if residuals.get(name)}, tuple(layers))


@dataclass(eq=False)
class Selection:
    """What a selecting net leaves out. layout: what its net must give; None: any. told: called with what it gives."""

    left_out: frozenset[Layer] = frozenset()
    layout: Layout | None = None
    told: Callable[[Layout], None] | None = None

    @property
    def remaining(self) -> Layout:
        """The layout without what is left out."""
        assert self.layout is not None
        return Layout(self.layout.sizes, tuple(each for each in self.layout.layers if each not in self.left_out))

    def within(self, earlier: "Selection") -> "Selection":
        """Of what an earlier selection has left. ValueError where both are of other control nets."""
        if earlier.layout is None:
            return self
        if self.layout is not None and self.layout.sizes != earlier.layout.sizes:
            raise ValueError(
                f"The relevance is of a ControlNet that gives {_told(self.layout.sizes)}, and this one, of which some are left "
                f"out already, gives {_told(earlier.layout.sizes)}. Measure this ControlNet with Control Relevance."
            )
        return Selection(self.left_out | earlier.left_out, earlier.layout, self.told)


class Selecting:
    """Mixed in before a class of control nets: everything but these is the class's own."""

    tessera_selection: Selection

    def control_merge(self, control, control_prev, *args, **kwargs):
        """Leaves residuals out of this net's own, before those of earlier nets are added."""
        selection, found = self.tessera_selection, dict(control)
        sizes = {name: len(found[name]) for name in NAMES if found.get(name)}
        if selection.layout is not None and sizes != selection.layout.sizes:
            raise ValueError(
                f"The relevance is of a ControlNet that gives {_told(selection.layout.sizes)}, and this one gives {_told(sizes)}. "
                "Measure this ControlNet with Control Relevance."
            )
        if selection.told is not None:
            selection.told(layout_of(found) if selection.layout is None else selection.remaining)
        _agrees(selection, found)
        for layer in selection.left_out:
            entries = list(found[layer.name])
            for i in layer.places:
                entries[i] = _nothing(self, entries[i])
            found[layer.name] = entries
        return super().control_merge(found, control_prev, *args, **kwargs)  # type: ignore[misc]

    def copy(self):
        return select(super().copy(), self.tessera_selection)  # type: ignore[misc]

    def pre_run(self, *args, **kwargs):
        """A ControlLora makes its model here."""
        super().pre_run(*args, **kwargs)  # type: ignore[misc]
        model, selection = getattr(self, "control_model", None), self.tessera_selection
        if model is not None and selection.layout is not None and selection.left_out:
            self.control_model = shortened(model, selection.layout, selection.left_out)


def _told(sizes: Mapping[str, int]) -> str:
    return " and ".join(f"{count} {name}" for name, count in sizes.items()) + " residuals"


def _agrees(selection: Selection, residuals: Mapping[str, Any]) -> None:
    """ValueError where a net of as many residuals makes them from other blocks than the one that was measured."""
    for name in {layer.name for layer in selection.left_out}:
        out = {place for layer in selection.left_out if layer.name == name for place in layer.places}
        entries = residuals[name]
        gone = {id(entries[i]) for i in out if entries[i] is not None and entries[i].numel() > 1}
        kept = [t for i, t in enumerate(entries) if i not in out and t is not None]
        if any(id(t) in gone or t.numel() == 1 for t in kept):
            raise ValueError(
                "The relevance is of another ControlNet: this one gives as many residuals, but from other blocks. Measure "
                "this ControlNet with Control Relevance."
            )


def _nothing(net: Any, residual: Any) -> torch.Tensor | None:
    """None, but a zero where the model adds without asking (Hunyuan-DiT)."""
    if residual is None or type(getattr(net, "control_model", None)).__name__ != "HunYuanControlNet":
        return None
    return residual.new_zeros((1,) * residual.ndim)


def select(net: Any, selection: Selection) -> Any:
    """The given copy of a control net, now of a class that selects, of what it gives so far. ValueError where it is none
    of core's kind."""
    kind = type(net)
    if issubclass(kind, Selecting):
        kind, selection = kind.__bases__[1], selection.within(net.tessera_selection)
    if not isinstance(net, ControlBase) or kind.control_merge is not ControlBase.control_merge:
        raise ValueError(
            f"{kind.__name__} merges its residuals in its own way, so single ones cannot be left out. Load the ControlNet with "
            "ComfyUI's own Load ControlNet Model."
        )
    net.__class__ = _selecting(kind)
    net.tessera_selection = selection
    return net


@functools.cache
def _selecting(kind: type) -> type:
    return type(f"Selecting{kind.__name__}", (Selecting, kind), {})


# Blocks of a control net -------------------------------------------------------------------------------------------

Given = tuple[str | int, ...]  # of a block's arguments, what it returns; one alone is no tuple


@dataclass(frozen=True)
class Stack:
    """A list of blocks of a control net; block i makes the residuals of layer i of one list through projection i."""

    blocks: str
    projections: str
    name: str
    returns: Given


STACKS: dict[tuple[str, str], tuple[Stack, ...]] = {
    ("comfy.ldm.flux.controlnet", "ControlNetFlux"): (
        Stack("double_blocks", "controlnet_blocks", "input", ("img", "txt")),
        Stack("single_blocks", "controlnet_single_blocks", "output", (0,)),
    ),
    ("comfy.cldm.mmdit", "ControlNet"): (Stack("joint_blocks", "controlnet_blocks", "output", (0, 1)),),
    ("comfy.cldm.dit_embedder", "ControlNetEmbedder"): (
        Stack("transformer_blocks", "controlnet_blocks", "output", (0,)),
    ),
    ("comfy.ldm.hydit.controlnet", "HunYuanControlNet"): (Stack("blocks", "after_proj_list", "output", (0,)),),
    ("comfy.ldm.qwen_image.controlnet", "QwenImageControlNetModel"): (
        Stack("transformer_blocks", "controlnet_blocks", "input", ("encoder_hidden_states", "hidden_states")),
    ),
    ("comfy.cldm.cldm", "ControlNet"): (
        Stack("input_blocks", "zero_convs", "output", (0,)),
        Stack("middle_block", "middle_block_out", "middle", (0,)),
    ),
}


class Passed(torch.nn.Module):
    """In the place of a block: gives back what it is given."""

    def __init__(self, returns: Given):
        super().__init__()
        self.returns = returns

    def forward(self, *args, **kwargs):
        found = tuple(args[key] if isinstance(key, int) else kwargs[key] for key in self.returns)
        return found if len(found) > 1 else found[0]


class Unmade(torch.nn.Module):
    """In the place of a projection: a residual of one number, which no other has."""

    def forward(self, hidden, *args):
        return hidden.new_zeros((1,) * hidden.ndim)


def stacks_of(model: torch.nn.Module | None) -> tuple[Stack, ...]:
    """Empty where the blocks of this control net are not known."""
    kind = type(model)
    return STACKS.get((kind.__module__, kind.__name__), ())


def blocks_of(model: torch.nn.Module, stack: Stack) -> list[torch.nn.Module]:
    found = getattr(model, stack.blocks)
    return list(found) if isinstance(found, torch.nn.ModuleList) else [found]


def counted(model: torch.nn.Module | None, left_out: frozenset[Layer], layout: Layout) -> tuple[int, int] | None:
    """(blocks that are computed, blocks) of a control net; None where they are not known."""
    stacks = stacks_of(model)
    if model is None or not stacks:
        return None
    counts = [len(blocks_of(model, stack)) for stack in stacks]
    return _last(stacks, counts, left_out, layout), sum(counts)


def _last(stacks: tuple[Stack, ...], counts: list[int], left_out: frozenset[Layer], layout: Layout) -> int:
    """Number of blocks up to the last that a kept layer needs."""
    starts = {stack.name: sum(counts[:i]) for i, stack in enumerate(stacks)}
    return max((starts[layer.name] + layer.number + 1 for layer in layout.layers if layer not in left_out), default=0)


def shortened(model: torch.nn.Module, layout: Layout, left_out: frozenset[Layer]) -> torch.nn.Module:
    """The same control net, weights and modules shared, that passes by what only residuals that are left out need: the
    blocks after the last kept one, and projections. A net of unknown blocks as it is."""
    stacks = stacks_of(model)
    if not stacks:
        return model
    made = copy.copy(model)
    made._modules = dict(model._modules)
    numbers = {(layer.name, layer.number) for layer in layout.layers if layer not in left_out}
    counts = [len(blocks_of(model, stack)) for stack in stacks]
    last, start = _last(stacks, counts, left_out, layout), 0
    for stack, count in zip(stacks, counts, strict=True):
        blocks = [b if start + i < last else Passed(stack.returns) for i, b in enumerate(blocks_of(model, stack))]
        start += count
        outs = getattr(model, stack.projections)
        single = not isinstance(outs, torch.nn.ModuleList)
        kept = [p if (stack.name, i) in numbers else Unmade() for i, p in enumerate([outs] if single else outs)]
        made._modules[stack.blocks] = blocks[0] if single else torch.nn.ModuleList(blocks)
        made._modules[stack.projections] = kept[0] if single else torch.nn.ModuleList(kept)
    return made
