"""What a picture tells others of its settings."""

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from sdlora.formats.write import write
from sdlora.generation import png
from sdlora.generation.job import Job
from sdlora.generation.render import Picture, hold
from sdlora.lowrank.adapter import Adapter
from sdlora.mixing.mixer import Mixer
from sdlora.mixing.plan import LoraWeight
from sdlora.models.families import components_of
from tests.conftest import random_adapter
from tests.tiny import tiny_pipeline


def test_loras_are_told_by_their_names_and_the_hash_that_others_know(tmp_path: Path):
    mixer = Mixer(tiny_pipeline())
    for seed, (name, naming) in enumerate((("v1.5.safetensors", "kohya"), ("style-v1.5", "peft"))):
        write(
            Adapter(random_adapter(components_of(mixer.pipeline), seed, suffix="to_q").deltas), tmp_path / name, naming
        )
    loras = tuple(LoraWeight(path=str(tmp_path / name)) for name in ("v1.5.safetensors", "style-v1.5"))
    (job,) = hold(mixer, [Job(prompt="a cat", loras=loras, width=64, height=64)])
    text = png.parameters(job)
    assert "<lora:v1.5:1:1>" in text and "<lora:style-v1.5:1:1>" in text
    told = dict(pair.split(": ") for pair in json.loads(re.search('Lora hashes: (".*?")', text)[1]).split(", "))
    assert list(told) == ["v1.5", "style-v1.5"]
    content = (tmp_path / "v1.5.safetensors").read_bytes()
    behind = content[8 + int.from_bytes(content[:8], "little") :]
    assert told["v1.5"] == hashlib.sha256(behind).hexdigest()[:12]


def test_a_job_whose_loras_were_not_read_tells_no_hashes():
    assert "Lora hashes" not in png.parameters(Job(prompt="a cat", loras=(LoraWeight(path="a.safetensors"),)))


def test_a_file_whose_name_is_no_text_is_painted_with_and_found_again(tmp_path: Path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.safetensors")
    job = Job(prompt="a cat", model="m\udce9", loras=(LoraWeight(path=path),), width=64, height=64)
    saved = png.save(Picture(Image.new("RGB", (64, 64)), job), tmp_path / "out")
    assert png.read_job(saved) == job
    with Image.open(saved) as image:
        text = image.info["parameters"]
    assert text.startswith(r"a cat <lora:caf\udce9:1:1>") and r"Model: m\udce9," in text


@pytest.mark.parametrize("model", ["my, model", "two: one", 'a "b", c\\d', "new\nline", 'plain "name"'])
def test_values_are_quoted_where_a1111_quotes_them(model: str):
    """Read with the pattern of A1111's infotext_utils.py."""
    job = Job(prompt="a cat", model=f"models/{model}", guidance_scale=7.1234567)
    pattern = r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)'
    told = dict(re.findall(pattern, png.parameters(job).rpartition("\n")[2]))
    read = json.loads(told["Model"]) if told["Model"][0] == told["Model"][-1] == '"' else told["Model"]
    assert read == model and float(told["CFG scale"]) == 7.1234567
    assert told["Version"].startswith("sdlora ")


def test_dots_stay_in_the_models_name():
    def model(name: str) -> str:
        return re.search("Model: ([^,]*),", png.parameters(Job(prompt="a cat", model=name)))[1]

    assert model("stabilityai/stable-diffusion-xl-base-1.0") == "stable-diffusion-xl-base-1.0"
    assert model("models/v1-5.safetensors") == "v1-5"
