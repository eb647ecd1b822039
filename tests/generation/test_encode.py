"""Texts become conditioning: held against diffusers' own pipelines, and against float64 on the encoders' outputs."""

from functools import cache
from typing import Any

import pytest
import torch

from sdlora.errors import SdloraError
from sdlora.generation.prompts.encode import Remembered, chunked, encode, encode_negative
from sdlora.models.families import Conditioning, family_of
from tests.models.test_families import taught
from tests.tiny import tiny_pipeline, tokenizer

KINDS = ["sd1", "sd2", "sdxl"]
STATES = "encoder_hidden_states"


def fresh_pipeline(kind: str) -> Any:
    """With the padding of the family's released models: SD2's tokenizer and SDXL's second pad with "!"."""
    pipeline = tiny_pipeline(kind)
    if kind != "sd1":
        padded = tokenizer.__wrapped__()  # its own, as others share the one at hand
        padded.pad_token = "!"
        setattr(pipeline, "tokenizer_2" if kind == "sdxl" else "tokenizer", padded)
    return tilted(pipeline)


pipeline_of = cache(fresh_pipeline)  # for tests that do not write to it


@torch.no_grad()
def tilted(pipeline: Any) -> Any:
    """With states that have a mean, as trained text encoders make them: a fresh layer norm's is 0."""
    for encoder in (pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)):
        for name, module in encoder.named_modules() if encoder is not None else ():
            if name.endswith("final_layer_norm"):
                module.bias.copy_(torch.linspace(-0.5, 1, len(module.bias)))
    return pipeline


@torch.no_grad()
def plain(pipeline: Any, *texts: str) -> list[Conditioning]:
    """What the family makes of each text alone."""
    return [family_of(pipeline).encode(pipeline, [text]) for text in texts]


def same(one: Conditioning, other: Conditioning) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool((one.double() - other.double()).abs().max() <= 1e-5)


# One window


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["a red cat", "", " ", "x" * 75, "Ünï, code!"])
def test_a_plain_prompt_gets_the_bits_that_the_family_and_diffusers_give(kind: str, text: str):
    pipeline = pipeline_of(kind)
    mine = encode(pipeline, text)
    assert same(mine, *plain(pipeline, text))
    assert same(encode_negative(pipeline, text), family_of(pipeline).unconditional(pipeline, [text]))
    theirs = pipeline.encode_prompt(text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    for value, other in zip(mine.values(), (value for value in theirs if value is not None), strict=True):
        assert torch.equal(value, other)


def test_an_empty_negative_prompt_of_sdxl_is_zeros_where_the_model_was_trained_so():
    pipeline = fresh_pipeline("sdxl")
    assert not any(value.any() for value in encode_negative(pipeline, "").values())
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    assert same(encode_negative(pipeline, ""), encode(pipeline, ""))


# Emphasis


def emphasised(pipeline: Any, chunks: list[list[tuple[str, float]]]) -> torch.Tensor:
    """A1111's "Original" in float64, chunk by chunk: states times weights, then the mean that they had.

    chunks: words of one token and their weights.
    """
    columns = []
    for suffix in ("", "_2") if hasattr(pipeline, "text_encoder_2") else ("",):
        reader, encoder = getattr(pipeline, f"tokenizer{suffix}"), getattr(pipeline, f"text_encoder{suffix}")
        rows = []
        for chunk in chunks:
            ids = reader(" ".join(word for word, _ in chunk), padding="max_length", return_tensors="pt").input_ids
            output = encoder(ids, output_hidden_states=True)
            states = (output.hidden_states[-2] if "text_encoder_2" in dir(pipeline) else output[0])[0].double()
            weights = torch.ones(77, dtype=torch.float64)
            weights[1 : len(chunk) + 1] = torch.tensor([weight for _, weight in chunk])
            changed = states * weights[:, None]
            rows.append(changed * states.mean() / changed.mean())
        columns.append(torch.cat(rows))
    return torch.cat(columns, dim=-1).detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("text", "chunks"),
    [
        ("a (b:1.5) [c] d", [[("a", 1), ("b", 1.5), ("c", 1 / 1.1), ("d", 1)]]),
        ("(a:0) b", [[("a", 0), ("b", 1)]]),
        ("((a)) BREAK b BREAK [c]", [[("a", 1.21)], [("b", 1)], [("c", 1 / 1.1)]]),
        (" ".join("x" * 74) + " (y z:1.4)", [[*[("x", 1.0)] * 74, ("y", 1.4)], [("z", 1.4)]]),
    ],
)
def test_emphasis_weighs_the_states_and_gives_each_chunk_its_mean_back(kind: str, text: str, chunks: list):
    pipeline = pipeline_of(kind)
    found = encode(pipeline, text)
    assert near(found[STATES][0], emphasised(pipeline, chunks))
    if kind == "sdxl":  # what is pooled is the first chunk's, and has no weights
        (first,) = plain(pipeline, " ".join(word for word, _ in chunks[0]))
        assert near(found["text_embeds"], first["text_embeds"])


def test_a_chunk_without_emphasis_keeps_its_bits_beside_one_that_has_some():
    pipeline = pipeline_of("sd1")
    without, weighed = encode(pipeline, "a BREAK b")[STATES], encode(pipeline, "a BREAK (b:1.3)")[STATES]
    assert torch.equal(without[:, :77], weighed[:, :77])
    assert not torch.equal(without[:, 77:], weighed[:, 77:])


def test_emphasis_is_computed_in_float32_and_rounded_once():
    pipeline = fresh_pipeline("sd1")
    pipeline.text_encoder.to(torch.bfloat16)
    found = encode(pipeline, "a (b:1.5) c")[STATES]
    exact = emphasised(pipeline, [[("a", 1), ("b", 1.5), ("c", 1)]])
    assert found.dtype == torch.bfloat16
    assert ((found[0].double() - exact).abs() <= exact.abs() * 2**-8 + 1e-12).all()


@pytest.mark.parametrize("left", [0.0, 3e-5, -3e-5])
def test_a_mean_in_which_the_tokens_cancel_out_is_not_restored(left: float):
    """Else one small difference over another would scale the states, or turn them round."""
    pipeline = tiny_pipeline("sd1")
    norm = next(module for name, module in pipeline.text_encoder.named_modules() if name.endswith("final_layer_norm"))
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0, 2, len(norm.weight)))  # gives each token a mean of its own
        norm.bias.sub_(encode(pipeline, "a b")[STATES].mean() - left)
    found, alone = (encode(pipeline, text)[STATES][0] for text in ("a (b:1.5)", "a b"))
    weights = torch.ones(77)
    weights[2] = 1.5
    assert near(found, alone * weights[:, None])


def test_emphasis_without_bounds_is_an_error():
    with pytest.raises(SdloraError, match="the emphasis in .* is too strong"):
        encode(pipeline_of("sd1"), "(a:" + "9" * 60 + ")")
    with pytest.raises(SdloraError, match="too strong"):
        encode(pipeline_of("sd1"), "(a:" + "9" * 400 + ")")


# Many windows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("text", "chunks"),
    [
        ("x " * 76, ["x " * 75, "x"]),
        ("x " * 200, ["x " * 75, "x " * 75, "x " * 50]),
        ("a BREAK b", ["a", "b"]),
        ("BREAK a BREAK BREAK b BREAK", ["", "a", "", "b"]),
        ("x " * 75 + "BREAK b", ["x " * 75, "b"]),
        # A full chunk ends at its last comma, if that is among its last 20 tokens; the comma stays.
        ("x " * 60 + ", " + "y " * 20, ["x " * 60 + ",", "y " * 20]),
        ("x " * 54 + ", " + "y " * 30, ["x " * 54 + ", " + "y " * 20, "y " * 10]),
        ("x " * 55 + ", " + "y " * 30, ["x " * 55 + ",", "y " * 30]),
        ("x " * 74 + ", y", ["x " * 74 + ",", "y"]),
        ("x " * 75 + ", y", ["x " * 75, ", y"]),
        ("x " * 60 + ", " + "y " * 14, ["x " * 60 + ", " + "y " * 14]),
        ("x " * 60 + ", " + "y " * 14 + "BREAK z", ["x " * 60 + ", " + "y " * 14, "z"]),
    ],
)
def test_a_long_prompt_is_the_chunks_that_a1111_cuts_it_into(kind: str, text: str, chunks: list[str]):
    pipeline = pipeline_of(kind)
    alone, found = plain(pipeline, *chunks), encode(pipeline, text)
    assert near(found[STATES], torch.cat([one[STATES] for one in alone], dim=1))
    if kind == "sdxl":
        assert near(found["text_embeds"], alone[0]["text_embeds"])


def test_what_moves_behind_a_comma_keeps_its_weight():
    units: list = [*[((1,), 1.0)] * 60, ((2,), 1.0), *[((3,), 1.5)] * 20]
    assert chunked(units, comma=2, room=75) == [[(1, 1.0)] * 60 + [(2, 1.0)], [(3, 1.5)] * 20]


def test_a_unit_never_goes_over_the_room_that_is_left():
    units: list = [*[((1,), 1.0)] * 4, ((2,), 1.0), ((3,), 1.0), ((4,) * 8, 1.0)]
    assert [len(chunk) for chunk in chunked(units, comma=2, room=6)] == [5, 1, 8]
    assert [len(chunk) for chunk in chunked(units, comma=None, room=9)] == [6, 8]


# Learned tokens


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_learned_token_of_many_vectors_is_not_torn_apart(kind: str):
    pipeline = taught(kind, sks=10, one=1)
    found = encode(pipeline, "x " * 70 + "sks y SKS")
    first, second = plain(pipeline, "x " * 70, "sks y sks")
    assert near(found[STATES], torch.cat([first[STATES], second[STATES]], dim=1))
    assert same(encode(pipeline, "a sks, one"), *plain(pipeline, "a sks, one"))


def test_all_vectors_of_a_learned_token_get_its_weight():
    pipeline = tilted(taught("sd1", sks=3))
    words = ["sks", "sks_1", "sks_2"]
    exact = emphasised(pipeline, [[("a", 1), *((word, 1.5) for word in words), ("b", 1)]])
    assert near(encode(pipeline, "a (sks:1.5) b")[STATES][0], exact)


def test_encoders_that_need_different_numbers_of_chunks_are_brought_to_one():
    pipeline = taught("sdxl")
    vectors = torch.randn(10, 32, generator=torch.Generator().manual_seed(0))
    encoder = pipeline.text_encoder_2
    pipeline.load_textual_inversion(vectors, token="sks", tokenizer=pipeline.tokenizer_2, text_encoder=encoder)
    found = encode(pipeline, "x " * 70 + "sks")[STATES]
    assert found.shape == (1, 154, 64)
    padding, second = plain(pipeline, "", "sks")
    assert near(found[:, 77:, :32], padding[STATES][..., :32])
    assert near(found[:, 77:, 32:], second[STATES][..., 32:])


# Remembering


def test_what_is_remembered_is_made_once_and_the_oldest_goes_first():
    made = []

    def make(name: str) -> Conditioning:
        made.append(name)
        return {STATES: torch.full((1, 77, 1), len(made))}  # 616 bytes

    memory = Remembered(most=1300)
    first = memory.get("a", lambda: make("a"))
    memory.get("b", lambda: make("b"))
    assert memory.get("a", lambda: make("a")) is first
    memory.get("c", lambda: make("c"))
    assert len(memory) == 2 and memory.bytes == 2 * 616
    memory.get("a", lambda: make("a"))
    memory.get("b", lambda: make("b"))
    assert made == ["a", "b", "c", "b"]


def test_what_is_larger_than_the_memory_is_not_kept():
    memory = Remembered(most=10)
    assert memory.get("a", lambda: {STATES: torch.ones(1, 77, 1)})[STATES].all()
    assert (len(memory), memory.bytes) == (0, 0)
