"""What files say about themselves."""

import json

import pytest

from sdlora.formats.metadata import TrainingFacts, to_metadata, trigger_words

FACTS = TrainingFacts(
    title="zib",
    model="some/model",
    architecture="sd1",
    dataset="zib",
    captions=("zib, a beach", "zib, snow", "zib, a city"),
    resolution=512,
    prediction_type="epsilon",
    trigger=None,
    step=300,
    settings={"seed": 0, "num_epochs": None},
)


def test_metadata_is_what_kohya_and_the_modelspec_call_it():
    metadata = to_metadata(FACTS)
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.resolution"] == "512x512"
    assert json.loads(metadata["ss_tag_frequency"]) == {"zib": {"zib": 3, "a beach": 1, "snow": 1, "a city": 1}}
    assert metadata["ss_seed"] == "0" and "ss_num_epochs" not in metadata
    assert all(isinstance(value, str) for value in metadata.values())


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"modelspec.trigger_phrase": "zib, purple"}, ("zib", "purple")),
        (to_metadata(FACTS), ("zib",)),
        ({"ss_tag_frequency": "{"}, ()),
        ({"ss_tag_frequency": '{"a": {"x": "many"}}'}, ()),
        ({"ss_tag_frequency": '{"a": 3}'}, ()),
        ({}, ()),
    ],
)
def test_trigger_words(metadata, words):
    assert trigger_words(metadata) == words
