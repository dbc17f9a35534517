"""An instruction for LLM text encoders: what goes in, what comes out, and that core's own encoding stays."""

import comfy.hooks
import comfy.sd
import pytest
import torch
from comfy import sd1_clip
from llm_prompt_helper import (
    FILLED,
    KINDS,
    LAYERS,
    OWN,
    PROMPT,
    QUIET,
    build,
    encode,
    ids,
    options,
    same,
    small,
    tokens_of,
)

from tessera.methods.control import llm_prompt as m
from tessera.patching.llm_prompt import language_model


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    made = {}

    def clip_of(kind):
        if kind not in made:
            made[kind] = build(kind, tmp_path_factory)
        return made[kind]

    with small():
        yield clip_of


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_instruction_is_cores_own_encoding(clips, kind):
    clip = clips(kind)
    for text in (PROMPT, "", "(a red:1.3) fox"):
        for changed in (options(clip, ""), options(clip, " \n"), options(clip, "", "system", False)):
            same(encode(changed, text), encode(clip, text))
    if kind in OWN:
        same(encode(options(clip, "", layer=OWN[kind])), encode(clip))


@pytest.mark.parametrize("position", m.POSITIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_dropped_instructions_leave_as_many_rows_as_core(clips, kind, position):
    clip = clips(kind)
    changed = options(clip, position=position)
    for text in (PROMPT, "", "xylophone 7", "7 (red:1.3) foxes"):
        want, got = encode(clip, text), encode(changed, text)
        assert got["cond"].shape == want["cond"].shape and got.keys() == want.keys()
        name = (
            "conditioning_llama3" if kind == "hidream" else "cond"
        )  # there the LLM's states of all layers go beside T5's
        assert got[name].shape == want[name].shape
        if isinstance(want.get("attention_mask"), torch.Tensor):
            assert torch.equal(got["attention_mask"], want["attention_mask"])
        assert torch.isfinite(got[name]).all() and not torch.equal(got[name], want[name]), "the LLM has read it"
        if want["pooled_output"] is not None:
            assert torch.equal(got["pooled_output"], want["pooled_output"]), "CLIP-L sees the prompt alone"


@pytest.mark.parametrize("kind", KINDS)
def test_the_dropped_length_is_that_of_the_tokenised_prefix(clips, kind):
    clip = clips(kind)
    dropped, kept = options(clip), options(clip, drop=False)
    prefix = ids(clip, QUIET + "\n")
    plain, made = (tokens_of(clip, c.tokenize(PROMPT)) for c in (clip, dropped))
    own = [t for t in made if isinstance(t[0], m.Instruction)]
    assert [int(t[0]) for t in own] == prefix and [t[1] for t in own] == [1.0] * len(prefix)
    assert [t for t in made if not isinstance(t[0], m.Instruction)] == plain, "the prompt's own tokens are core's"
    if kind in FILLED:
        assert len(tokens_of(clip, kept.tokenize(PROMPT))) == len(plain) == FILLED[kind], "padding makes room"
        assert encode(kept)["cond"].shape == encode(clip)["cond"].shape
    else:
        assert encode(kept)["cond"].shape[1] == encode(dropped)["cond"].shape[1] + len(prefix)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in FILLED])
def test_dropped_rows_are_those_of_the_instruction(clips, kind):
    """What is left with and without dropping is the same, and it is what the LLM says of the whole."""
    clip = clips(kind)
    count = len(ids(clip, QUIET + "\n"))
    dropped, kept = (encode(options(clip, drop=drop))["cond"][0] for drop in (True, False))
    ways = [i for i in range(len(dropped) + 1) if torch.equal(torch.cat([kept[:i], kept[i + count :]]), dropped)]
    assert ways, "one run of rows, as many as the prefix has tokens"
    start = m.start_of_text(
        tokens_of(clip, clip.tokenize(PROMPT)), [tokens_of(clip, clip.tokenize(p)) for p in ("x", "7")], None
    )
    before = len(tokens_of(clip, clip.tokenize(PROMPT))) - start  # rows from the prompt's first word on
    assert len(dropped) - ways[0] <= before


@pytest.mark.parametrize("kind", ["z_image", "lumina2"])
def test_it_is_what_the_llm_says_of_instruction_and_prompt(clips, kind):
    """The LLM itself, called with the ids in a row."""
    clip = clips(kind)
    key = language_model(clip)
    plain = [int(t[0]) for t in tokens_of(clip, clip.tokenize(PROMPT))]
    prefix = ids(clip, QUIET + "\n")
    start = 3 if kind == "z_image" else 1  # <|im_start|>user\n, or the token that begins a text
    whole = torch.tensor([plain[:start] + prefix + plain[start:]])
    model = getattr(clip.cond_stage_model, key).transformer
    states = model(whole, attention_mask=torch.ones_like(whole), intermediate_output=-3, final_layer_norm_intermediate=False, dtype=torch.float32)[1][0]  # fmt: skip
    want = torch.cat([states[:start], states[start + len(prefix) :]])
    got = encode(options(clip, layer=-3))["cond"][0]
    assert torch.allclose(got, want, atol=1e-5)


def test_layers(clips):
    for kind, own in OWN.items():
        clip = clips(kind)
        seen = [encode(options(clip, "", layer=-n))["cond"] for n in range(1, LAYERS + 1)]
        assert [torch.equal(s, encode(clip)["cond"]) for s in seen] == [-n == own for n in range(1, LAYERS + 1)]
        same(encode(clip), encode(options(clip, "")))
    with pytest.raises(ValueError, match="layer -6 is asked of an LLM with 5 layers"):
        options(clips("z_image"), layer=-6)
    with pytest.raises(ValueError, match="takes layers 1, 2, 3 at once"):
        options(clips("klein"), layer=-3)


def test_only_the_llm_changes_its_layer(clips):
    clip = clips("hunyuan_video")
    changed = options(clip, "", layer=-1)
    assert torch.equal(encode(changed)["pooled_output"], encode(clip)["pooled_output"])
    other = changed.clone()
    other.clip_layer(-2)
    assert torch.equal(encode(other)["cond"], encode(changed)["cond"]), "CLIP Set Last Layer is for CLIP-L then"
    own = options(clip, "").clone()
    own.clip_layer(-2)
    want = clip.clone()
    want.clip_layer(-2)
    same(encode(own), encode(want))


def test_the_system_part(clips):
    """At the end of the template's own; a part of its own where the template has none."""
    clip = clips("qwen_image")
    made = tokens_of(clip, options(clip, position="system").tokenize(PROMPT))
    text = clip.tokenizer.qwen25_7b.tokenizer.decode([int(t[0]) for t in made])
    assert f"objects and background:\n{QUIET}<|im_end|>\n<|im_start|>user\n{PROMPT}<|im_end|>" in text
    clip = clips("z_image")
    made = tokens_of(clip, options(clip, position="system").tokenize(PROMPT))
    text = clip.tokenizer.qwen3_4b.tokenizer.decode([int(t[0]) for t in made])
    assert text.startswith(f"<|im_start|>system\n{QUIET}<|im_end|>\n<|im_start|>user\n{PROMPT}<|im_end|>")
    clip = clips("hunyuan_video")
    made = tokens_of(clip, options(clip, position="system").tokenize(PROMPT))
    own, first = ids(clip, "\n" + QUIET), next(i for i, t in enumerate(made) if isinstance(t[0], m.Instruction))
    assert [int(t[0]) for t in made[first : first + len(own) + 2]] == [
        *own,
        *ids(clip, "<|eot_id|><|start_header_id|>"),
    ]
    assert not any(isinstance(t[0], m.Instruction) for t in [*made[:first], *made[first + len(own) :]])
    clip = clips("lumina2")
    a, b = (options(clip, position=p).tokenize(PROMPT) for p in m.POSITIONS)
    assert a == b, "no template: both are the same"


def test_templates_are_not_looked_for_in_the_instruction(clips):
    """Ovis cuts after the first ' background:', which this instruction holds too."""
    clip = clips("ovis")
    got = encode(options(clip, "Tell the color and background: and more", "system", False))["cond"]
    plain = encode(clip)["cond"]
    assert (
        got.shape[1] <= plain.shape[1] + 20
        and encode(options(clip, "a background: b", "system"))["cond"].shape == plain.shape
    )


@pytest.mark.parametrize("drop", [True, False])
def test_pictures_in_the_prompt(clips, drop):
    """Each picture's one token becomes several rows, before the words."""
    clip = clips("qwen_image")
    images = [torch.rand(1, 56, 56, 3)]
    want, got = encode(clip, images=images), encode(options(clip, drop=drop), images=images)
    count = 0 if drop else len(ids(clip, QUIET + "\n"))
    assert got["cond"].shape[1] == want["cond"].shape[1] + count
    words = len(ids(clip, PROMPT)) + len(ids(clip, "<|im_end|>\n<|im_start|>assistant\n"))
    assert torch.equal(got["cond"][:, : want["cond"].shape[1] - words], want["cond"][:, :-words]), (
        "before the instruction all is the same"
    )
    assert not torch.equal(got["cond"][:, -words:], want["cond"][:, -words:])


def test_weights_stay_with_their_words(clips):
    clip = clips("omnigen2")
    plain, made = (c.tokenize("a (red:1.3) fox") for c in (clip, options(clip)))
    words = [t for t in tokens_of(clip, made) if not isinstance(t[0], m.Instruction)]
    assert words == tokens_of(clip, plain) and any(t[1] == 1.3 for t in words)
    assert len(tokens_of(clip, options(clip).tokenize(PROMPT, return_word_ids=True))[5]) == 3
    got = encode(options(clip), "a (red:1.3) fox")["cond"]
    assert got.shape == encode(clip, "a (red:1.3) fox")["cond"].shape
    assert not torch.equal(got, encode(options(clip), "a red fox")["cond"])


def test_a_prompt_with_its_own_template(clips):
    with pytest.raises(ValueError, match="brings its own chat template"):
        options(clips("qwen_image")).tokenize("<|im_start|>user\nfox<|im_end|>")
    text = "<|im_start|>user\nfox<|im_end|>"
    same(encode(options(clips("qwen_image"), ""), text), encode(clips("qwen_image"), text))


def test_the_clip_that_it_came_from_stays(clips):
    clip = clips("z_image")
    before = encode(clip)
    changed = options(clip, layer=-1)
    encode(changed)
    same(encode(clip), before)
    assert type(clip) is comfy.sd.CLIP and "encode_token_weights" not in vars(clip.cond_stage_model.qwen3_4b)
    same(encode(changed.clone()), encode(changed))
    again = options(changed, "", layer=0)
    same(encode(again), before)
    assert changed.cond_stage_model.state_dict().keys() == clip.cond_stage_model.state_dict().keys()
    pointers = [{p.data_ptr() for p in c.cond_stage_model.parameters()} for c in (clip, changed)]
    assert pointers[0] == pointers[1], "no weight is held twice"


def test_a_lora_on_it_acts(clips):
    clip = clips("z_image")
    key = "qwen3_4b.transformer.model.layers.0.mlp.down_proj.weight"
    patch = {key: ("diff", (torch.ones(32, 48),))}
    a, b = options(clip, ""), clip.clone()
    for one in (a, b):
        assert one.add_patches(patch, 0.1) == [key]
    same(encode(a), encode(b))
    assert not torch.equal(encode(a)["cond"], encode(clip)["cond"])


def test_hooks_that_switch_a_lora_on(clips):
    """Core encodes scheduled hooks in another place."""
    from comfy_extras.nodes_hooks import SetClipHooks

    key = "qwen3_4b.transformer.model.layers.0.mlp.down_proj.weight"
    hooks = comfy.hooks.HookGroup()
    hooks.add(comfy.hooks.WeightHook(strength_clip=1.0))
    hooks.hooks[0].weights_clip = hooks.hooks[0].weights = {key: ("diff", (0.1 * torch.ones(32, 48),))}
    hooks.hooks[0].need_weight_init = False
    plain = clips("z_image")
    made = {}
    for name, clip in (("core", plain), ("empty", options(plain, "")), ("told", options(plain))):
        held = SetClipHooks().apply_hooks(clip, True, False, hooks)[0]
        held.patcher.add_hook_patches(held.patcher.forced_hooks.hooks[0], hooks.hooks[0].weights)
        made[name] = held.encode_from_tokens_scheduled(held.tokenize(PROMPT))
    assert torch.equal(made["core"][0][0], made["empty"][0][0])
    assert not torch.equal(made["core"][0][0], encode(plain)["cond"]), "the hook acts"
    assert made["told"][0][0].shape == made["core"][0][0].shape and not torch.equal(
        made["told"][0][0], made["core"][0][0]
    )


def test_encoders_that_are_no_llm(clips):
    clip = clips("kandinsky5").clone()
    clip.cond_stage_model, clip.tokenizer = sd1_clip.SD1ClipModel(), sd1_clip.SD1Tokenizer()
    with pytest.raises(ValueError, match="SD1ClipModel.*is no LLM that reads instructions"):
        options(clip)
