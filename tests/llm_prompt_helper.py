"""Tiny random LLM text encoders of core's own classes, with the tokenizers that ComfyUI ships.

Gemma's tokenizer is a sentencepiece file, which it does not ship: one is trained here, on a few lines."""

import contextlib
import dataclasses

import comfy.hooks
import comfy.model_patcher
import comfy.sd
import comfy.text_encoders.flux
import comfy.text_encoders.hidream
import comfy.text_encoders.hunyuan_video
import comfy.text_encoders.kandinsky5
import comfy.text_encoders.llama as llama
import comfy.text_encoders.lumina2
import comfy.text_encoders.omnigen2
import comfy.text_encoders.ovis
import comfy.text_encoders.qwen_image
import comfy.text_encoders.qwen_vl
import comfy.text_encoders.z_image
import pytest
import torch
from nodes_helper import run_node

from tessera.methods.control import llm_prompt as m
from tessera.nodes.control.llm_prompt_options import LlmPromptOptions
from tessera.patching.llm_prompt import language_model

te = comfy.text_encoders
LAYERS = 5
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}
QUIET = "Describe the color, the texture and the background:"
PROMPT = "a red fox, two cups"


class Visual(torch.nn.Module):
    """Stands in for the vision tower: each picture is 4 rows."""

    def __init__(self, output_hidden_size=32, **_):
        super().__init__()
        self.width = output_hidden_size

    def forward(self, image, grid):
        return torch.full((4, self.width), 0.3)


@contextlib.contextmanager
def small():
    """Core's configs and picture encoders made small while text encoders are built."""
    patch = pytest.MonkeyPatch()
    for name in ("Llama2Config", "Qwen25_7BVLI_Config", "Qwen3_4BConfig", "Qwen25_3BConfig", "Ovis25_2BConfig", "Gemma2_2B_Config",
                 "Qwen3_8BConfig"):  # fmt: skip
        base = getattr(llama, name)

        def shrunk(base=base, **given):
            return dataclasses.replace(base(), **{**SMALL, **given})

        patch.setattr(llama, name, shrunk)
    patch.setattr(comfy.text_encoders.qwen_vl, "Qwen2VLVisionTransformer", Visual)
    try:
        yield
    finally:
        patch.undo()


def gemma(tmp_path_factory):
    """The bytes of a sentencepiece model."""
    import io

    import sentencepiece

    lines = [QUIET, PROMPT, m.INSTRUCTION, "the quick brown fox jumps over the lazy dog 0123456789 x y z"] * 8
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=made, vocab_size=90, hard_vocab_limit=False, pad_id=0, eos_id=1, bos_id=2,
        unk_id=3, minloglevel=2,
    )  # fmt: skip
    return torch.ByteTensor(list(made.getvalue()))


KINDS = {  # tokenizer, encoders; the layer that is the model's own
    "z_image": (te.z_image.ZImageTokenizer, te.z_image.ZImageTEModel),
    "qwen_image": (te.qwen_image.QwenImageTokenizer, te.qwen_image.QwenImageTEModel),
    "omnigen2": (te.omnigen2.Omnigen2Tokenizer, te.omnigen2.Omnigen2Model),
    "ovis": (te.ovis.OvisTokenizer, te.ovis.OvisTEModel),
    "kandinsky5": (te.kandinsky5.Kandinsky5Tokenizer, te.kandinsky5.Kandinsky5TEModel),
    "hunyuan_video": (te.hunyuan_video.HunyuanVideoTokenizer, te.hunyuan_video.HunyuanVideoClipModel),
    "klein": (te.flux.KleinTokenizer, te.flux.klein_te()),
    "hidream": (te.hidream.HiDreamTokenizer, te.hidream.hidream_clip(clip_l=False, clip_g=False, t5=False)),
    "lumina2": (te.lumina2.LuminaTokenizer, te.lumina2.LuminaModel),
}
OWN = {
    "z_image": -2,
    "qwen_image": -1,
    "omnigen2": -1,
    "ovis": -1,
    "kandinsky5": -1,
    "hunyuan_video": -3,
    "lumina2": -2,
}
FILLED = {"ovis": 284, "klein": 512, "hidream": 128}  # lengths that tokens are filled up to


def build(kind, tmp_path_factory):
    tokenizer, encoders = KINDS[kind]
    clip = comfy.sd.CLIP(no_init=True)
    data = {"spiece_model": gemma(tmp_path_factory)} if kind == "lumina2" else {}
    clip.tokenizer = tokenizer(tokenizer_data=data)
    layers = {"layer": [1, 2, 3]} if kind == "klein" else {}
    beside = {
        "clip_l_model_config": {
            "num_hidden_layers": 3,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_attention_heads": 1,
        }
    }
    clip.cond_stage_model = encoders(device="cpu", dtype=torch.float32, model_options=beside)
    if layers:
        clip.cond_stage_model.qwen3_4b.layer = layers["layer"]
        clip.cond_stage_model.qwen3_4b.options_default = (layers["layer"], None, True)
    fill(clip.cond_stage_model)
    clip.patcher = comfy.model_patcher.ModelPatcher(clip.cond_stage_model, torch.device("cpu"), torch.device("cpu"))
    clip.patcher.is_clip = True
    clip.patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
    clip.layer_idx, clip.tokenizer_options, clip.use_clip_schedule, clip.apply_hooks_to_conds = None, {}, False, None
    return clip


def fill(module):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(
                torch.randn(p.shape, generator=g) / max(1, p.shape[-1]) ** 0.5
                if p.ndim > 1
                else 1 + torch.rand(p.shape, generator=g)
            )


def options(clip, instruction=QUIET, position="before", drop=True, layer=0):
    given = {"instruction": instruction, "position": position, "drop_instruction_tokens": drop, "layer": layer}
    return run_node(LlmPromptOptions, clip=clip, **given)[0]


def encode(clip, text=PROMPT, **kwargs):
    """One condition: {"cond": [1, N, D], ...}."""
    ((cond, extra),) = clip.encode_from_tokens_scheduled(clip.tokenize(text, **kwargs))
    return {"cond": cond, **extra}


def same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value is b[name], name


def ids(clip, text):
    words = getattr(clip.tokenizer, language_model(clip))
    return words.tokenizer(text)["input_ids"][words.tokens_start :]


def tokens_of(clip, made):
    return made[language_model(clip)][0]
