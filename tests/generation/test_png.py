"""What a picture tells others of its settings."""

import hashlib
import json
import re
from pathlib import Path

from sdlora.formats.write import write
from sdlora.generation import png
from sdlora.generation.job import Job
from sdlora.generation.render import hold
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


def test_dots_stay_in_the_models_name():
    def model(name: str) -> str:
        return re.search("Model: ([^,]*),", png.parameters(Job(prompt="a cat", model=name)))[1]

    assert model("stabilityai/stable-diffusion-xl-base-1.0") == "stable-diffusion-xl-base-1.0"
    assert model("models/v1-5.safetensors") == "v1-5"
