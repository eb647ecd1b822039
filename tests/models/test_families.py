"""Captions on their way to the text encoders, learned tokens of several vectors among them."""

from typing import Any

import pytest
import torch

from sdlora.models.families import family_of, truncated
from tests.tiny import tiny_pipeline, tokenizer


def taught(kind: str = "sd1", **tokens: int) -> Any:
    """A pipeline that has learned tokens of so many vectors, by diffusers' textual inversion."""
    pipeline = tiny_pipeline(kind)
    for suffix in ("", "_2") if kind == "sdxl" else ("",):
        part = tokenizer.__wrapped__()  # diffusers edits the one at hand, and tests share that
        setattr(pipeline, f"tokenizer{suffix}", part)
        for token, count in tokens.items():
            vectors = torch.randn(count, 32, generator=torch.Generator().manual_seed(count))
            encoder = getattr(pipeline, f"text_encoder{suffix}")
            pipeline.load_textual_inversion(vectors, token=token, tokenizer=part, text_encoder=encoder)
    return pipeline


@torch.no_grad()
def conditioned(pipeline: Any, captions: list[str]) -> list[torch.Tensor]:
    return list(family_of(pipeline).encode(pipeline, captions).values())


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("caption", ["a sks cat", "sks, one and sks", "no token", "x " * 70 + "sks sks"])
def test_captions_are_encoded_as_by_diffusers_own_pipeline(kind: str, caption: str):
    pipeline = taught(kind, sks=3, one=1)
    theirs = pipeline.encode_prompt(caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    theirs = [value.detach() for value in theirs if value is not None]
    for mine, other in zip(conditioned(pipeline, [caption]), theirs, strict=True):
        assert torch.equal(mine, other)


def test_a_token_written_with_capitals_is_spelled_out_too():
    pipeline = taught(**{"s.s": 3})
    (usual,), (other,) = conditioned(pipeline, ["a s.s cat"]), conditioned(pipeline, ["a S.S cat"])
    assert torch.equal(usual, other)


def test_a_token_of_several_vectors_takes_as_much_of_the_window():
    pipeline, rest = taught(sks=10), "x " * 66
    assert truncated(pipeline, f"{rest}a b") == truncated(tiny_pipeline(), f"{rest}a b") == ""
    assert truncated(pipeline, f"sks {rest.strip()[:-2]} a b") == "a b"
    assert truncated(tiny_pipeline(), f"sks {rest.strip()[:-2]} a b") == ""
