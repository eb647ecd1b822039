"""Notes tell what was named and does nothing, and not what a list or group says of other models' blocks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdlora.formats.architectures import sd1, sdxl
from sdlora.formats.block_weights import PRESETS, read_factors
from sdlora.formats.write import write
from sdlora.generation.job import Job
from sdlora.generation.notes import in_vain, left_out
from sdlora.generation.render import hold
from sdlora.lowrank.adapter import Adapter
from sdlora.mixing.mixer import Mixer
from sdlora.mixing.plan import LoraWeight
from sdlora.models.families import components_of
from tests.conftest import random_adapter
from tests.tiny import tiny_pipeline


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("IN10:0.5", ("IN10",)),
        ("IN10:0", ("IN10",)),
        ("IN04:0.5,IN10:0.5,OUT11:0", ("IN10", "OUT11")),
        ("IN09-IN11:0.5", ("IN09", "IN10", "IN11")),
        ("IN:0,OUT11:0.5", ("OUT11",)),
        ("IN:0.5", ()),
        ("OUT:0,OUT03:1", ()),
        ("ALL:0.5", ()),
        ("IN04:0.5", ()),
        *((name, ()) for name in PRESETS),
        *((",".join(["1"] * (count - 1) + ["0.5"]), ()) for count in (12, 20)),
        (",".join(["0.5"] * 26), ()),
    ],
)
def test_what_was_named_is_told_and_what_a_list_says_of_other_models_is_not(text: str, blocks: tuple[str, ...]):
    assert in_vain(read_factors(text), sdxl()) == blocks
    assert in_vain(read_factors(text), sd1()) == ()


@pytest.fixture(scope="module")
def mixer() -> Mixer:
    return Mixer(tiny_pipeline())


@pytest.mark.parametrize(
    ("told", "notes"),
    [
        ({"schedule": "0.11-0.12"}, ["1: the schedule is 0 at every step of 4, so the UNet gets nothing of it"]),
        ({"schedule": "0.1-0.2"}, []),
        ({"schedule": "0.11-0.12", "unet": 0.0}, []),
        ({"schedule": "0.11-0.12", "on": False}, []),
        (
            {"text_encoder_2": 0.0},
            ["1: the model has no second text encoder, so a weight of its own for that does nothing"],
        ),
    ],
)
def test_a_setting_that_does_nothing_is_told_and_one_of_0_is_not(mixer: Mixer, told: dict[str, Any], notes: list[str]):
    loras = (LoraWeight(path="0.safetensors"), LoraWeight(path="1.safetensors", **told))
    assert left_out(mixer, Job(prompt="a cat", steps=4, loras=loras)) == notes


def test_a_second_text_encoder_that_is_there_is_no_note():
    job = Job(prompt="a cat", loras=(LoraWeight(path="a.safetensors", text_encoder_2=0.5),))
    assert left_out(Mixer(tiny_pipeline("sdxl")), job) == []


@pytest.mark.parametrize(
    ("every", "schedule", "note"),
    [
        (1, "", None),
        (
            2,
            "0-0.5",
            "1: its turn never comes in 4 steps, 2 a turn while its schedule is not 0: the UNet gets nothing of it",
        ),
        (2, "0-0.8", None),
        (4, "", "1: its turn never comes in 4 steps, 4 a turn: the UNet gets nothing of it"),
        (4, "0.11-0.12", "1: the schedule is 0 at every step of 4, so the UNet gets nothing of it"),
    ],
)
def test_a_turn_that_never_comes_is_told(mixer: Mixer, every: int, schedule: str, note: str | None):
    loras = (LoraWeight(path="0.safetensors"), LoraWeight(path="1.safetensors", schedule=schedule))
    job = Job(prompt="a cat", steps=4, loras=loras, compose="switch", switch_every=every)
    assert left_out(mixer, job) == ([note] if note else [])
    assert not any("turn" in one for one in left_out(mixer, replace(job, compose="composite")))


def test_a_note_names_the_lora_the_model_and_the_blocks(tmp_path: Path):
    mixer = Mixer(tiny_pipeline("sdxl"))
    loras = []
    for seed, name in enumerate(("v1.5.safetensors", "whole.safetensors")):
        write(Adapter(random_adapter(components_of(mixer.pipeline), seed).deltas), tmp_path / name, "kohya")
        loras.append(LoraWeight(path=str(tmp_path / name), blocks=read_factors("ALL:0.5" if seed else "IN11:0.5")))
    job = Job(prompt="a cat", loras=tuple(loras), width=64, height=64)
    hold(mixer, [job])
    assert left_out(mixer, job) == [f"v1.5: {mixer.architecture.label} has no IN11, so block weights there do nothing"]
