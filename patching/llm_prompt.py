"""A CLIP whose text encoder is an LLM, with an instruction around every prompt and another layer's hidden states.

The CLIP shares weights, patches and memory management with the one that it was made from: its modules are views of the
same ones, alike but for how tokens go in and rows come out. Core's own code finds and cuts its templates in the tokens as
they were without the instruction, so every model's cutting stays right."""

import copy
import functools
from dataclasses import dataclass
from typing import Any

import comfy.sd
import torch
from comfy.sd1_clip import SDClipModel, SDTokenizer
from comfy.text_encoders.llama import BaseLlama

from ..methods.control.llm_prompt import (
    RAW,
    Hidden,
    has_instruction,
    hidden,
    inserted,
    kept_rows,
    start_of_text,
    without_padding,
)

PROBES = ("x", "7")  # two prompts that begin differently, to see where a template's words begin
COUNTS = ("JoyImageTEModel",)  # cut their template by a count of tokens


@dataclass(frozen=True)
class Prompting:
    instruction: str
    position: str
    drop: bool
    layer: int  # 0: the model's own


class PromptedClip(comfy.sd.CLIP):
    """key: the name of the LLM among the encoders and of its tokens."""

    prompting: Prompting
    key: str

    def clone(self, *args, **kwargs):
        made = super().clone(*args, **kwargs)
        made.__class__, made.prompting, made.key = type(self), self.prompting, self.key
        return made

    def tokenize(self, text, return_word_ids=False, **kwargs):
        plain = super().tokenize(text, return_word_ids, **kwargs)
        asked = self.prompting
        if not asked.instruction.strip() or kwargs.get("llama_template") == "{}":  # a caller's piece of a longer prompt
            return plain
        if isinstance(text, str) and text.startswith(RAW):
            raise ValueError(
                "This prompt brings its own chat template, so LLM Prompt Options cannot tell where its words begin. Leave the "
                "template away, or the instruction empty and write it into the template."
            )
        (tokens,) = plain[self.key]
        words = getattr(self.tokenizer, self.key)
        probes = [super(PromptedClip, self).tokenize(probe, return_word_ids, **kwargs) for probe in PROBES]
        start = start_of_text(tokens, [p[self.key][0] for p in probes], words.pad_token if words.pad_left else None)
        made = inserted(tokens, start, asked.instruction, asked.position, functools.partial(_ids, words))
        if not asked.drop and words.min_length is not None:
            made = without_padding(
                made, len(made) - max(len(tokens), words.min_length), words.pad_token, words.pad_left
            )
        return {**plain, self.key: [made]}


def _ids(words: SDTokenizer, text: str) -> list[int]:
    """Of text as it stands, without the tokens that begin and end a prompt."""
    return words.tokenizer(text)["input_ids"][words.tokens_start : -1 if words.tokenizer_adds_end_token else None]


class _Encoder:
    """What the view of the LLM does otherwise; goes before its class in the order of bases."""

    asked: Prompting

    def encode_token_weights(self, token_weight_pairs):
        full = getattr(token_weight_pairs, "full", None)
        out = super().encode_token_weights(token_weight_pairs if full is None else full)  # type: ignore[misc]
        if full is None or not self.asked.drop:
            return out
        rows = out[0].shape[-2]
        keep = kept_rows(full[0], rows)
        cut = [out[0].index_select(-2, keep.to(out[0].device)), out[1]]
        if len(out) > 2:
            cut.append({name: _cut(value, keep, rows) for name, value in out[2].items()})
        return tuple(cut)

    def set_clip_options(self, options):
        if self.asked.layer and isinstance(options.get("layer"), int):  # CLIP Set Last Layer is for the other encoders
            options = {name: value for name, value in options.items() if name != "layer"}
        super().set_clip_options(options)  # type: ignore[misc]

    def reset_clip_options(self):
        super().reset_clip_options()  # type: ignore[misc]
        if self.asked.layer:
            super().set_clip_options({"layer": self.asked.layer})  # type: ignore[misc]


def _cut(value: Any, keep: torch.Tensor, rows: int) -> Any:
    """Masks and tags of the tokens; what has another length is of something else."""
    if not isinstance(value, torch.Tensor) or not value.ndim or value.shape[-1] != rows:
        return value
    return value.index_select(-1, keep.to(value.device))


class _Encoders:
    """What the view of all encoders does otherwise."""

    asked: Prompting
    key: str

    def encode_token_weights(self, token_weight_pairs, *args, **kwargs):
        lists = token_weight_pairs.get(self.key)
        if lists is not None and not isinstance(lists, Hidden) and has_instruction(lists):
            token_weight_pairs = {**token_weight_pairs, self.key: hidden(lists, self.asked.drop)}
        return super().encode_token_weights(token_weight_pairs, *args, **kwargs)  # type: ignore[misc]


@functools.cache
def _class(first: type, base: type) -> type:
    return type(base.__name__, (first, base), {})


def _view(module: torch.nn.Module, first: type, **fields: Any) -> Any:
    """The same module, whose parameters and submodules are the module's own, of a class with `first` before its own."""
    made = copy.copy(module)
    made.__dict__["_modules"] = dict(module._modules)
    made.__dict__.update(fields)
    made.__class__ = _class(first, type(module))
    return made


def language_model(clip: Any) -> str:
    """The name of the LLM among a CLIP's encoders. ValueError where there is none, or more than one."""
    encoders = _plain(clip.cond_stage_model)
    found = [
        name
        for name, module in encoders.named_children()
        if isinstance(module, SDClipModel)
        and isinstance(module.transformer, BaseLlama)
        and isinstance(getattr(clip.tokenizer, name, None), SDTokenizer)
    ]
    if len(found) == 1:
        return found[0]
    kind = type(encoders).__mro__[1].__name__ if type(encoders).__name__.endswith("_") else type(encoders).__name__
    if found:
        raise ValueError(
            f"{kind} writes music with {len(found)} LLM ({', '.join(found)}); LLM Prompt Options serves one."
        )
    raise ValueError(
        f"This text encoder ({kind}) is no LLM that reads instructions, as those of Qwen-Image, Z-Image, Lumina 2, HiDream or "
        "HunyuanVideo are. Connect the CLIP of such a model."
    )


def _plain(encoders: torch.nn.Module) -> Any:
    """The module that a view is of."""
    return encoders.__dict__.get("plain", encoders)


def prompted(clip: Any, asked: Prompting) -> Any:
    """A CLIP that encodes as asked; options of an earlier node on it are replaced."""
    key = language_model(clip)
    encoders = _plain(clip.cond_stage_model)
    _check(encoders, getattr(encoders, key), asked)
    model = _view(getattr(encoders, key), _Encoder, asked=asked)
    if asked.layer and model.options_default[0] == "last":
        model.layer_norm_hidden_state = True  # the DiT was trained on states that went through the final norm
    made = clip.clone()
    made.__class__, made.prompting, made.key = PromptedClip, asked, key
    made.cond_stage_model = _view(encoders, _Encoders, asked=asked, key=key, plain=encoders)
    made.cond_stage_model._modules[key] = model
    return made


def _check(encoders: Any, model: SDClipModel, asked: Prompting) -> None:
    own = model.options_default[0]
    if asked.layer and (isinstance(own, list) or own == "all"):
        taken = "all layers" if own == "all" else f"layers {', '.join(map(str, own))} at once"
        raise ValueError(f"This model takes {taken} of its LLM, so no single layer can be chosen. Set layer to 0.")
    if -asked.layer > model.num_layers:
        raise ValueError(f"layer {asked.layer} is asked of an LLM with {model.num_layers} layers. Set it nearer to -1.")
    counted = any(kind.__name__ in COUNTS for kind in type(encoders).__mro__)
    if counted and asked.position == "system" and not asked.drop and asked.instruction.strip():
        raise ValueError(
            "This model cuts its template by a count of tokens, so an instruction in the system's part cannot be kept. Set "
            "drop_instruction_tokens on, or position to before."
        )
