"""Learned tokens are there from add to unload, as diffusers' textual inversion would have them, and then are gone."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.lowrank.adapter import Adapter, same_vectors
from sdlora.lowrank.laws import Full
from sdlora.mixing.mixer import Mixer
from sdlora.mixing.tokens import MOST_VECTORS, Vocabulary, put
from sdlora.models.families import family_of, truncated
from tests.mixing.states import same_state, state_of
from tests.tiny import tiny_pipeline

PROMPTS = ["a <s1> cat", "<s1>, <s2> on a<s2>", "no token"]


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


def tokens(**vectors: Tensor) -> Adapter:
    """For the first text encoder; s1 is <s1>."""
    return Adapter({}, embeddings={f"<{name}>": {"text_encoder": value} for name, value in vectors.items()})


def looked_up(pipeline: Any, prompt: str) -> Tensor:
    """What the text encoder sees of a prompt, start and end left out."""
    ids = pipeline.tokenizer(pipeline.maybe_convert_prompt(prompt, pipeline.tokenizer)).input_ids[1:-1]
    return pipeline.text_encoder.get_input_embeddings()(torch.tensor(ids)).detach()


def encoded(pipeline: Any, prompts: list[str]) -> list[Tensor]:
    """By diffusers' own pipeline, in the order of our conditioning."""
    found = pipeline.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    return [value for value in found if value is not None]


@torch.no_grad()
def conditioned(pipeline: Any, prompts: list[str]) -> list[Tensor]:
    return list(family_of(pipeline).encode(pipeline, prompts).values())


def test_a_prompt_looks_up_the_learned_vectors_and_the_base_s_own():
    pipeline = tiny_pipeline()
    mixer, own = Mixer(pipeline), looked_up(pipeline, "a cat")
    one, many = rows(1), rows(3, seed=1)
    mixer.add(tokens(s1=one, s2=many), "lora")
    assert torch.equal(looked_up(pipeline, "a<s1> cat"), torch.cat([own[:1], one, own[1:]]))
    assert torch.equal(looked_up(pipeline, "<s2> a cat <s1>"), torch.cat([many, own, one]))
    mixer.set({"lora": 0.0})
    assert torch.equal(looked_up(pipeline, "<s1>"), one), "tokens are there whatever the weight"


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_outputs_equal_those_of_diffusers_textual_inversion(kind: str):
    ours, theirs = tiny_pipeline(kind), tiny_pipeline(kind)
    encoders = family_of(ours).text_encoders
    vectors = {"<s1>": rows(1), "<s2>": rows(3, seed=1)}
    mixer = Mixer(ours)
    mixer.add(Adapter({}, embeddings={token: dict.fromkeys(encoders, one) for token, one in vectors.items()}), "lora")
    for name in encoders:
        part = name.replace("text_encoder", "tokenizer")
        tokenizer = copy.deepcopy(getattr(theirs, part))  # diffusers edits the one at hand, and tests share that
        setattr(theirs, part, tokenizer)
        for token, one in vectors.items():
            theirs.load_textual_inversion(
                one.clone(), token=token, tokenizer=tokenizer, text_encoder=getattr(theirs, name)
            )
    for mine, other, told in zip(
        encoded(ours, PROMPTS), encoded(theirs, PROMPTS), conditioned(ours, PROMPTS), strict=True
    ):
        assert torch.equal(mine, other)
        assert (told - other).abs().max() < 1e-6
    pictures = [
        pipeline(
            PROMPTS[1], num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0)
        ).images
        for pipeline in (ours, theirs)
    ]
    assert torch.equal(*pictures)
    mixer.unload("lora")
    assert same_state(ours, state_of(tiny_pipeline(kind)))


def test_tokens_that_diffusers_has_taught_since_are_not_taken_away():
    pipeline = tiny_pipeline()
    pipeline.tokenizer = copy.deepcopy(pipeline.tokenizer)
    mixer = Mixer(pipeline)
    pipeline.load_textual_inversion(torch.ones(32), token="<theirs>")
    with pytest.raises(SdloraError, match="the text_encoder has learned other tokens since the mixer was made"):
        mixer.add(Adapter({}, embeddings={"<s1>": {"text_encoder": rows(1)}}), "lora")
    assert torch.equal(looked_up(pipeline, "<theirs>"), torch.ones(1, 32)) and mixer.names == ()
    mixer.add(Adapter({}), "without tokens")


def test_sdxl_spells_out_a_token_that_one_encoder_does_not_know():
    pipeline, plain = tiny_pipeline("sdxl"), tiny_pipeline("sdxl")
    Mixer(pipeline).add(Adapter({}, embeddings={"<s1>": {"text_encoder_2": rows(2)}}), "lora")
    assert pipeline.tokenizer is plain.tokenizer
    assert pipeline.tokenizer_2.tokenize("a <s1>") == ["a</w>", "<s1>"]
    told, usual = conditioned(pipeline, ["a <s1>"]), conditioned(plain, ["a <s1>"])
    width = pipeline.text_encoder.config.hidden_size
    assert torch.equal(told[0][..., :width], usual[0][..., :width])
    assert not torch.allclose(told[0][..., width:], usual[0][..., width:])
    assert all(torch.equal(mine, other) for mine, other in zip(told, encoded(pipeline, ["a <s1>"]), strict=True))


def test_a_token_with_capitals_is_found_however_a_prompt_writes_it():
    pipeline = tiny_pipeline()
    many = rows(3)
    Mixer(pipeline).add(Adapter({}, embeddings={"MyChar": {"text_encoder": many}}), "lora")
    for prompt in ("MyChar", "mychar"):
        assert torch.equal(looked_up(pipeline, prompt), many)
    (usual,) = conditioned(pipeline, ["a mychar cat"])
    for prompt in ("a MyChar cat", "a MYCHAR cat", "a myChar cat"):
        assert torch.equal(conditioned(pipeline, [prompt])[0], usual)
    assert torch.equal(encoded(pipeline, ["a MyChar cat"])[0], usual)


def test_the_end_that_is_cut_off_is_told_in_plain_words_while_tokens_are_there():
    pipeline = tiny_pipeline()
    Mixer(pipeline).add(tokens(s1=rows(10)), "lora")
    assert truncated(pipeline, "<s1> " + "x " * 65 + "the end") == "the end"


@pytest.mark.parametrize("prompt", ["a cat", "<s1> a cat"])
def test_the_pooled_embedding_is_that_of_the_end_where_the_config_is_an_old_one(prompt: str):
    """The configs of SD and SDXL as released call the end 2, whereupon transformers pools at the highest number."""
    modern, old = tiny_pipeline("sdxl"), tiny_pipeline("sdxl")
    old.text_encoder_2.config.eos_token_id = 2
    for module in old.text_encoder_2.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = 2
    base, pooled = state_of(old), []
    for pipeline in (modern, old):
        mixer = Mixer(pipeline)
        mixer.add(Adapter({}, embeddings={"<s1>": {"text_encoder_2": rows(1)}}), "lora")
        pooled.append(conditioned(pipeline, [prompt])[1])
    assert torch.equal(*pooled)
    mixer.unload("lora")
    assert same_state(old, base)


def test_tokens_of_others_keep_their_vectors_when_one_leaves():
    pipeline = tiny_pipeline()
    base, mixer = state_of(pipeline), Mixer(pipeline)
    vectors = {"b": rows(2, seed=1), "a": rows(1, seed=2), "c": rows(3, seed=3)}
    for name, own in vectors.items():
        mixer.add(tokens(**{name: own}), name)
    for gone in ("a", "b"):
        mixer.unload(gone)
        del vectors[gone]
        assert all(torch.equal(looked_up(pipeline, f"<{name}>"), own) for name, own in vectors.items())
        assert pipeline.tokenizer.tokenize(f"<{gone}>") == ["<</w>", f"{gone}</w>", "></w>"]
    mixer.unload("c")
    assert same_state(pipeline, base)


def test_a_replaced_adapter_brings_its_new_vectors():
    pipeline = tiny_pipeline()
    mixer = Mixer(pipeline)
    for seed, count in enumerate((3, 1)):
        mixer.add(tokens(s1=rows(count, seed)), "lora")
        assert torch.equal(looked_up(pipeline, "<s1>"), rows(count, seed))
    mixer.add(Adapter({}), "lora")
    assert same_state(pipeline, state_of(tiny_pipeline()))


def test_two_adapters_may_bring_the_same_token_with_the_same_vectors():
    pipeline = tiny_pipeline()
    base, mixer = state_of(pipeline), Mixer(pipeline)
    for name in ("a", "b"):
        mixer.add(tokens(s1=rows(2)), name)
    mixer.unload("a")
    assert torch.equal(looked_up(pipeline, "<s1>"), rows(2))
    mixer.unload("b")
    assert same_state(pipeline, base)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_embedding_keeps_its_dtype_and_its_objects(dtype: torch.dtype):
    pipeline = tiny_pipeline().to(dtype)
    base, embedding = state_of(pipeline), pipeline.text_encoder.get_input_embeddings()
    weight, mixer = embedding.weight, Mixer(pipeline)
    mixer.add(tokens(s1=rows(2)), "lora")
    assert pipeline.text_encoder.get_input_embeddings() is embedding and embedding.weight is weight
    assert weight.dtype == dtype and torch.equal(looked_up(pipeline, "<s1>"), rows(2).to(dtype))
    mixer.unload("lora")
    assert embedding.weight is weight and same_state(pipeline, base)


def test_rows_of_the_embedding_that_no_word_of_the_base_uses_stay():
    pipeline = tiny_pipeline()
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer) + 6, mean_resizing=False)
    base, mixer = state_of(pipeline), Mixer(pipeline)
    mixer.add(tokens(s1=rows(2)), "lora")
    assert torch.equal(looked_up(pipeline, "<s1>"), rows(2))
    mixer.unload("lora")
    assert same_state(pipeline, base)


def test_a_saved_pipeline_with_tokens_loads_again(tmp_path):
    from diffusers import StableDiffusionPipeline

    pipeline = tiny_pipeline()
    Mixer(pipeline).add(tokens(s1=rows(2)), "lora")
    pipeline.save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert torch.equal(looked_up(loaded, "a <s1> cat"), looked_up(pipeline, "a <s1> cat"))


HELD = {"<s1>": {"text_encoder": rows(1)}, "name": {"text_encoder": rows(1)}, "ab": {"text_encoder": rows(2)}}
WRONG = {
    "a word": ({"a": {"text_encoder": rows(1)}}, "new: the token 'a' would take the place of 'a'"),
    "a word with a capital": ({"A": {"text_encoder": rows(1)}}, "the token 'A' would take the place of 'A'"),
    "the end": ({"<|endoftext|>": {"text_encoder": rows(1)}}, "would take the place of '<.endoftext.>'"),
    "taken": ({"<s1>": {"text_encoder": rows(1, 5)}}, "held and new bring the token '<s1>' with different vectors"),
    "taken, with a capital": ({"<S1>": {"text_encoder": rows(1, 5)}}, "held and new bring the token '<S1>'"),
    "the next vector": ({"name_1": {"text_encoder": rows(1, 5)}}, "cannot tell 'name' and 'name_1' apart"),
    "inside another": ({"xabx": {"text_encoder": rows(1, 5)}}, "cannot tell 'ab' and 'xabx' apart"),
    "the same letters": ({"e\u0301t": {"text_encoder": rows(1)}, "\u00e9t": {"text_encoder": rows(1)}}, "cannot learn"),
    "width": ({"<s3>": {"text_encoder": torch.zeros(1, 31)}}, "'<s3>' has vectors of shape 1x31, the model's are 32"),
    "no matrix": ({"<s3>": {"text_encoder": torch.zeros(32)}}, "has vectors of shape 32,"),
    "a number": ({"<s3>": {"text_encoder": torch.tensor(1.0)}}, "has vectors of shape ,"),
    "none": ({"<s3>": {"text_encoder": torch.zeros(0, 32)}}, "has 0 vectors, a prompt has room for 1 to 75"),
    "too many": ({"<s3>": {"text_encoder": torch.zeros(76, 32)}}, "has 76 vectors"),
    "nan": ({"<s3>": {"text_encoder": rows(1) * float("nan")}}, "nan, infinite or too large for float16"),
    "too large": ({"<s3>": {"text_encoder": torch.full((1, 32), 1e5)}}, "nan, infinite or too large for float16"),
    "component": ({"<s3>": {"text_encoder_2": rows(1)}}, "is for 'text_encoder_2'; .* are text_encoder$"),
    "no text encoder": ({"<s3>": {"unet": rows(1)}}, "is for 'unet'; .* are text_encoder$"),
    "blank": ({" ": {"text_encoder": rows(1)}}, "' ' can be no token"),
    "two lines": ({"a\nb": {"text_encoder": rows(1)}}, "can be no token"),
    "long": ({"x" * 101: {"text_encoder": rows(1)}}, "can be no token"),
    "crowd": ({f"<t{i}>": {"text_encoder": rows(1)} for i in range(MOST_VECTORS + 1)}, "brings 1025 learned vectors"),
    "crowd with others": ({f"<t{i}>": {"text_encoder": rows(1)} for i in range(MOST_VECTORS)}, "bring 1028 learned"),
}


@pytest.mark.parametrize("case", WRONG)
def test_tokens_that_the_model_cannot_take_are_refused_and_change_nothing(case: str):
    embeddings, message = WRONG[case]
    pipeline = tiny_pipeline().to(torch.float16)
    mixer, path = Mixer(pipeline), "unet.conv_in.bias"
    mixer.add(Adapter({path: Full(torch.ones(16))}, embeddings=HELD), "held")
    mixer.set({"held": 1.0})
    before = state_of(pipeline)
    with pytest.raises(SdloraError, match=message) as error:
        mixer.add(Adapter({path: Full(torch.ones(16))}, embeddings=embeddings), "new")
    assert "\n" not in str(error.value)
    assert same_state(pipeline, before) and mixer.names == ("held",)
    mixer.unload("held")
    mixer.add(Adapter({}), "new")
    assert same_state(pipeline, state_of(tiny_pipeline().to(torch.float16)))


@pytest.mark.parametrize("moment", range(8))
def test_a_change_of_tokens_interrupted_anywhere_leaves_the_base_and_what_was_at_hand(monkeypatch, moment: int):
    pipeline = tiny_pipeline("sdxl")
    base, mixer = state_of(pipeline), Mixer(pipeline)
    both = {name: rows(2) for name in ("text_encoder", "text_encoder_2")}
    mixer.add(Adapter({"unet.conv_in.bias": Full(torch.ones(16))}, embeddings={"<s1>": both}), "one")
    before, write, calls = state_of(pipeline), type(pipeline).__setattr__, iter(range(100))
    mixer.set({"one": 1.0})
    cat = torch.cat

    def interrupted(original, *values):
        call = next(calls)
        if call == moment // 2:
            if moment % 2:
                original(*values)
            raise KeyboardInterrupt
        return original(*values)

    with monkeypatch.context() as patch:
        patch.setattr(type(pipeline), "__setattr__", lambda *values: interrupted(write, *values))
        patch.setattr(torch, "cat", lambda *values: interrupted(cat, *values))
        with pytest.raises(KeyboardInterrupt):
            mixer.unload("one")
    assert same_state(pipeline, before) and mixer.names == ("one",) and mixer.state == "base"
    mixer.unload("one")
    assert same_state(pipeline, base)


def test_an_adapter_whose_mix_overflows_brings_no_token():
    pipeline = tiny_pipeline().to(torch.float16)
    base, mixer = state_of(pipeline), Mixer(pipeline)
    mixer.add(Adapter({}), "one")
    mixer.set({"one": 1.0})
    huge = Adapter({"unet.conv_in.bias": Full(torch.full((16,), 1e5))}, embeddings={"<s1>": {"text_encoder": rows(1)}})
    with pytest.raises(SdloraError, match="overflows float16"):
        mixer.add(huge, "one")
    assert same_state(pipeline, base)


def test_tokens_leave_again_though_the_weights_cannot_be_put_back(monkeypatch: pytest.MonkeyPatch):
    pipeline = tiny_pipeline("sdxl")
    base, mixer = state_of(pipeline), Mixer(pipeline)

    def interrupted(pipeline: Any, component: str, vocabulary: Vocabulary) -> None:
        put(pipeline, component, vocabulary)
        if component == "text_encoder_2" and vocabulary.learned:
            raise KeyboardInterrupt

    def gone() -> None:
        raise SdloraError("the file has changed")

    monkeypatch.setattr("sdlora.mixing.mixer.put", interrupted)
    monkeypatch.setattr(mixer._base, "restore", gone)
    both = {name: rows(1) for name in ("text_encoder", "text_encoder_2")}
    with pytest.raises(SdloraError, match="the file has changed"):
        mixer.add(Adapter({}, embeddings={"<s1>": both}), "one")
    assert same_state(pipeline, base) and mixer.names == ()


def test_vectors_are_the_same_under_the_same_names_in_whatever_precision():
    one, both = {"text_encoder": rows(1)}, {"text_encoder": rows(1), "text_encoder_2": rows(1)}
    half = {"text_encoder": rows(1).half()}
    assert same_vectors(one, dict(one)) and same_vectors(both, dict(both))
    assert not same_vectors(one, both) and not same_vectors(both, one)
    assert not same_vectors(one, half) and same_vectors(half, {"text_encoder": rows(1).half().double()})
