"""Notes tell what was named and does nothing, and not what a list or group says of other models' blocks."""

from pathlib import Path

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


def test_a_note_names_the_lora_the_model_and_the_blocks(tmp_path: Path):
    mixer = Mixer(tiny_pipeline("sdxl"))
    loras = []
    for seed, name in enumerate(("v1.5.safetensors", "whole.safetensors")):
        write(Adapter(random_adapter(components_of(mixer.pipeline), seed).deltas), tmp_path / name, "kohya")
        loras.append(LoraWeight(path=str(tmp_path / name), blocks=read_factors("ALL:0.5" if seed else "IN11:0.5")))
    job = Job(prompt="a cat", loras=tuple(loras), width=64, height=64)
    hold(mixer, [job])
    assert left_out(mixer, job) == [f"v1.5: {mixer.architecture.label} has no IN11, so block weights there do nothing"]
