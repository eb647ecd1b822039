"""What files say about themselves."""

import json

import pytest
import torch
from safetensors.torch import load_file

from sdlora.formats.metadata import TrainingFacts, base_keys, base_model, tags, to_metadata, trigger_words
from sdlora.formats.write import write
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import LowRank

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


def test_tags_are_counted_over_all_folders_the_most_frequent_first():
    folders = {"10_zib": {"snow": 2, " zib": 5}, "reg": {"zib ": 4, "sea": 1, "": 3, "gone": 0}}
    assert list(tags({"ss_tag_frequency": json.dumps(folders)}).items()) == [("zib", 9), ("snow", 2), ("sea", 1)]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        "3",
        '{"a": 3}',
        '{"a": {"b": "many"}}',
        '{"a": {"b": Infinity}}',
        '{"a": {"b": null}}',
        "[" * 100_000,
    ],
)
def test_damaged_tags_are_none(text):
    assert tags({"ss_tag_frequency": text}) == {} and trigger_words({"ss_tag_frequency": text}) == ()


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({"ss_sd_model_name": "dreamy.safetensors", "ss_base_model_version": "sd_v1"}, "dreamy.safetensors"),
        ({"ss_sd_model_name": " ", "ss_base_model_version": "sdxl_base_v1-0"}, "sdxl_base_v1-0"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "stable-diffusion-v1/lora"),
        ({}, ""),
    ],
)
def test_the_base_model_is_the_first_that_is_named(metadata, name):
    assert base_model(metadata) == name


def test_what_is_shown_fits_a_line_and_cannot_steer_a_terminal():
    hostile = "zib\x1b[2J\n\x9b31m" + "y" * 100_000
    assert base_model({"ss_sd_model_name": hostile}).startswith("zib [2J 31m")
    assert len(base_model({"ss_sd_model_name": hostile})) == 200
    (tag,) = tags({"ss_tag_frequency": json.dumps({"a": {hostile: 2}})})
    words = trigger_words({"modelspec.trigger_phrase": ",".join([hostile] * 1000)})
    assert set(words) == {tag} and len(words) == 50 and tag.isprintable() and len(tag) == 200


def test_a_lora_of_one_of_two_text_encoders_is_named_by_what_its_metadata_says(tmp_path):
    path = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    delta = LowRank(torch.ones(2, 768), torch.ones(768, 2), 1.0)
    for architecture, prefix in (("sd1", "lora_te_"), ("sdxl", "lora_te1_")):
        write(Adapter({path: delta}, base_keys(architecture)), tmp_path / "a.safetensors")
        assert all(key.startswith(prefix) for key in load_file(tmp_path / "a.safetensors"))
    assert base_keys("custom") == {}
