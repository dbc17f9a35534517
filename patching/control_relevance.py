"""Which residuals of a ControlNet matter: one sampling run with all of them, then one without each; and nets that keep the
best."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from comfy_api.latest import io
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise

from ..methods.measure.control_change import change, chart
from .control import rgb
from .control_layers import Layer, Layout, Selection, counted, select
from .run import features_of
from .sampling import Job, Outcome, Progress, metered, sample
from .solve_threshold import seeded

NAME = "Control Relevance"
VERSION = 1
RelevanceSocket = io.Custom("TESSERA_RELEVANCE")
NOTE = (
    "A stand-in that needs no labels for the paper's score, which ranks FID and edge distance over a test set: told is how "
    "much the finished picture changes when one residual is left out."
)
Relevance = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """seeds: how many. keep: layers that the closing run keeps."""

    metric: str = "latent_l2"
    seeds: int = 2
    keep: int = 11


@dataclass(frozen=True, eq=False)
class Control:
    """A ControlNet and how it is applied."""

    net: Any
    image: torch.Tensor  # [b, H, W, C]
    vae: Any = None
    strength: float = 1.0

    def on(self, conditioning: list, nets: dict[Any, Any], selection: Selection | None) -> list:
        """The conditioning under control, as ComfyUI's own node puts it there. nets: by the ControlNet before it, shared by
        the prompts. selection None: as it is, without this control."""
        if selection is None:
            return conditioning
        found = []
        for text, extra in conditioning:
            before = extra.get("control")
            if before not in nets:
                net = select(self.net.copy(), selection)
                hint = rgb(self.image).movedim(-1, 1)
                nets[before] = net.set_cond_hint(hint, self.strength, (0.0, 1.0), vae=self.vae)
                net.set_previous_controlnet(before)
            found.append([text, {**extra, "control": nets[before], "control_apply_to_uncond": False}])
        return found


def measure(model: Any, job: Job, control: Control, asked: Asked) -> tuple[Relevance, torch.Tensor]:
    """(relevance, chart [1, H, W, 3]). ValueError where there is nothing to measure."""
    steps = len(job.sigmas) - 1
    if steps < 1:
        raise ValueError(f"{NAME} needs a schedule of at least 2 sigmas, got {len(job.sigmas)}; raise the steps.")
    if control.net.latent_format is not None and control.vae is None:
        raise ValueError(
            f"{NAME}: this ControlNet encodes its image, and no VAE is connected. Connect the MODEL's VAE."
        )
    if control.strength == 0:
        raise ValueError(
            f"{NAME}: at strength 0 the ControlNet adds nothing, and no residual can matter. Raise strength."
        )
    model, progress = metered(model), Progress(steps)
    seen: list[Layout] = []
    picture = _pictures(control.vae, asked.metric)

    def run(number: int, selection: Selection | None) -> Outcome:
        nets: dict[Any, Any] = {}
        positive, negative = (control.on(c, nets, selection) for c in (job.positive, job.negative))
        own = Job(positive, negative, job.latent, job.sampler, job.sigmas, job.noise, job.cfg)
        return sample(model, seeded(own, number), progress.step)

    full = run(0, Selection(told=seen.append))
    layout = _agreed(seen)
    progress.bar.total = steps * (asked.seeds * (2 + len(layout.layers)) + 2)
    scores: list[list[float]] = [[] for _ in layout.layers]
    without: list[float] = []
    for number in range(asked.seeds):
        full = run(number, Selection()) if number else full
        whole = picture(full.samples)
        without.append(change(asked.metric, whole, picture(run(number, None).samples)))
        for layer, row in zip(layout.layers, scores, strict=True):
            cut = run(number, Selection(frozenset([layer]), layout))
            row.append(change(asked.metric, whole, picture(cut.samples)))
    made = _relevance(control, job, asked, layout, scores, without)
    kept = kept_layers(made, asked.keep)
    left_out = frozenset(layout.layers) - kept
    last = asked.seeds - 1
    closing = run(last, Selection(left_out, layout)), run(last, Selection())
    made["kept"] = _closing(asked, kept, closing, picture) | _blocks(control.net, left_out, layout)
    made["notes"] = [f"{f.name} acted on this MODEL; the times are with it" for f in features_of(model.model_options)
                     if not f.inactive and f.name != "Meter"]  # fmt: skip
    return made, _chart(made)


def _agreed(seen: list[Layout]) -> Layout:
    if not any(layout.layers for layout in seen):
        raise ValueError(f"{NAME}: the ControlNet gave no residuals in this run. Check its model and the schedule.")
    if any(layout != seen[0] for layout in seen):
        raise ValueError(f"{NAME}: the ControlNet's residuals change within a run, so single ones cannot be left out.")
    return seen[0]


def _pictures(vae: Any, metric: str) -> Callable[[Any], torch.Tensor]:
    """samples -> what the metric compares."""

    def pictures(samples: Any) -> torch.Tensor:
        if getattr(samples, "is_nested", False):
            raise ValueError(f"{NAME} compares one latent, and this MODEL makes several (video and sound).")
        if metric != "edge_f1":
            return samples.float()
        grey = samples.mean(1) if vae is None else vae.decode(samples).float().mean(-1)
        return grey.reshape(-1, *grey.shape[-2:])

    return pictures


def _relevance(
    control: Control, job: Job, asked: Asked, layout: Layout, scores: list[list[float]], without: list[float]
) -> Relevance:
    means = [sum(row) / len(row) for row in scores]
    order = sorted(range(len(means)), key=lambda i: -means[i])
    layers = [
        {
            "residuals": layer.words,
            "list": layer.name,
            "number": layer.number,
            "places": list(layer.places),
            "scores": [round(score, 8) for score in row],
            "score": round(mean, 8),
            "rank": order.index(i) + 1,
        }
        for i, (layer, row, mean) in enumerate(zip(layout.layers, scores, means, strict=True))
    ]
    return {
        "kind": "control_relevance", "version": VERSION, "note": NOTE, "control_net": type(control.net).__name__,
        "sizes": dict(layout.sizes), "metric": asked.metric, "steps": len(job.sigmas) - 1, "seeds": asked.seeds,
        "cfg": job.cfg, "strength": control.strength, "without_control": round(sum(without) / len(without), 8),
        "layers": layers,
    }  # fmt: skip


def _closing(asked: Asked, kept: frozenset[Layer], runs: tuple[Outcome, Outcome], picture) -> dict[str, Any]:
    short, full = runs
    return {
        "layers": [layer.words for layer in sorted(kept, key=lambda layer: (layer.name, layer.number))],
        "change": round(change(asked.metric, picture(full.samples), picture(short.samples)), 8),
        "seconds": round(short.seconds, 4),
        "seconds_full": round(full.seconds, 4),
        "time_saved": round(1 - short.seconds / full.seconds, 4),
    }


def _blocks(net: Any, left_out: frozenset[Layer], layout: Layout) -> dict[str, int]:
    found = counted(getattr(net, "control_model", None), left_out, layout)
    return {} if found is None else {"blocks_computed": found[0], "blocks": found[1]}


def _chart(made: Relevance) -> torch.Tensor:
    layers = made["layers"]
    title = [
        f"{made['control_net']}: change in {made['metric']} without one residual",
        f"without control {made['without_control']:.4g}, cells are shares of the largest",
        "a stand-in without labels for the FID and edge ranks of RelaCtrl",
    ]
    return chart(title, *([layer[key] for layer in layers] for key in ("residuals", "scores", "rank")))


def lines_of(made: Relevance) -> list[str]:
    """The report in lines, the first a headline."""
    kept, layers = made["kept"], sorted(made["layers"], key=lambda layer: layer["rank"])
    blocks = f", {kept['blocks_computed']} of {kept['blocks']} control blocks computed" if "blocks" in kept else ""
    return [
        f"{layers[0]['residuals']} matters most of {len(layers)} residuals ({layers[0]['score']:.4g} in {made['metric']})",
        made["note"],
        f"without control the picture changes by {made['without_control']:.4g}",
        *(f"{layer['rank']}. {layer['residuals']}: {layer['score']:.4g}" for layer in layers),
        f"keeping {len(kept['layers'])}: change {kept['change']:.4g}{blocks}; {kept['seconds']:.3g} s in place of "
        f"{kept['seconds_full']:.3g} s, {kept['time_saved']:.1%} of the run saved",
        *made["notes"],
    ]


def parsed(relevance: Any) -> Layout:
    """The layout that a relevance was measured on. ValueError for anything else."""
    try:
        if relevance["kind"] != "control_relevance" or relevance["version"] != VERSION:
            raise KeyError("kind")
        layers = tuple(Layer(r["list"], int(r["number"]), tuple(map(int, r["places"]))) for r in relevance["layers"])
        return Layout({str(name): int(size) for name, size in relevance["sizes"].items()}, layers)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError("Select Control Layers got no relevance. Connect that of Control Relevance.") from error


def kept_layers(relevance: Relevance, keep: int, gone: frozenset[Layer] = frozenset()) -> frozenset[Layer]:
    """The best of it by score, but for those that are gone; of equal ones the earlier."""
    ranked = sorted(zip(relevance["layers"], parsed(relevance).layers, strict=True), key=lambda pair: pair[0]["rank"])
    return frozenset([layer for _, layer in ranked if layer not in gone][:keep])


def keep_layers(net: Any, relevance: Relevance, keep: int) -> tuple[Any, list[str]]:
    """(copy of the control net that gives its best residuals alone, lines about it)."""
    before = getattr(net, "tessera_selection", Selection()).left_out  # by a node of this kind
    layout = parsed(relevance)
    kept = kept_layers(relevance, keep, before)
    made = select(net.copy(), Selection(frozenset(layout.layers) - kept, layout))
    left_out, layout = made.tessera_selection.left_out, made.tessera_selection.layout
    blocks = _blocks(net, left_out, layout)
    told = f", {blocks['blocks_computed']} of {blocks['blocks']} control blocks are computed" if blocks else ""
    names = ", ".join(layer.words for layer in layout.layers if layer in kept)
    return made, [f"{len(kept)} of {len(layout.layers)} residuals kept{told}", f"kept: {names}"]


def job_of(
    model: Any, positive: list, negative: list, latent: dict[str, Any], steps: int, seed: int, cfg: float, sampler=None,
    sigmas=None,
) -> Job:  # fmt: skip
    """What is sampled: Euler on the simple schedule of so many steps, where no sampler and no sigmas are given."""
    if sigmas is None:
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    sampler = comfy.samplers.sampler_object("euler") if sampler is None else sampler
    return Job(positive, negative, latent, sampler, sigmas, Noise_RandomNoise(seed), cfg)
