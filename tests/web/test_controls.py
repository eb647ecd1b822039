"""What the controls make of what is typed and moved, without a browser."""

from typing import Any

import gradio as gr
import pytest

from sdlora.formats.architectures import sd1, sdxl, toybox
from sdlora.formats.block_weights import PRESETS, read_factors
from sdlora.generation.job import Job
from sdlora.generation.render import Progress
from sdlora.mixing.plan import LoraWeight
from sdlora.web import blocks, markup, outcome, row, timing


def test_sliders_stand_at_the_mean_of_their_blocks() -> None:
    assert blocks.shown("") == [1, 1, 1, 1]
    assert blocks.shown("BASE:0,IN:0.5,M00:2,OUT00-OUT05:0") == [0, 0.5, 2, 0.5]
    assert blocks.shown("no such preset") == [1, 1, 1, 1]
    assert blocks.shown("IN:-1,OUT:9") == [1, 0, 1, 2], "as far as a slider goes"


@pytest.mark.parametrize("text", ["", "IN04:0.5,OUT03:0", *PRESETS, "OUT:-1"])
def test_a_moved_slider_changes_its_own_group_only(text: str) -> None:
    at = blocks.shown(text)
    moved = blocks.slid(text, [*at[:2], 0.35, at[3]])
    assert dict(read_factors(moved)) == {**dict(blocks.read(text)), "M00": 0.35}


def test_groups_are_written_by_their_names() -> None:
    assert blocks.slid("", [0, 0.5, 1, 1]) == "BASE:0,IN:0.5"
    assert blocks.slid("IN:0.5", [1, 1, 1, 1]) == ""


def test_a_text_is_the_preset_that_has_its_factors() -> None:
    presets = {**PRESETS, "half": "1,1,1,1,1,1,1,0.5,1,1,1,1,1,1,1,1,1", "other half": PRESETS["ALL0.5"], "bad": "1,2"}
    assert blocks.preset_of("M00:0.5,OUT00-OUT02:0,IN00:0,IN03:0,IN06:0,IN09-IN11:0", presets) == "half"
    assert blocks.preset_of(PRESETS["ALL0.5"], presets) == "ALL0.5"
    assert blocks.preset_of(PRESETS["ALL0.5"], presets, "other half") == "other half", "the one that was chosen"
    assert blocks.preset_of("other half", presets) and blocks.preset_of("", presets) is None
    assert blocks.shown("half", presets)[2] == 0.5
    assert "off, as the list" in blocks.remark("half", sd1(), presets)


def test_no_digit_of_a_factor_is_lost_when_a_slider_moves() -> None:
    assert blocks.slid("IN:0.1234567", [1, 0.12, 0.5, 1]) == "IN:0.1234567,MID:0.5"


def test_blocks_named_in_vain_and_switched_off_unsaid_are_told() -> None:
    assert "OUT09" in blocks.remark("OUT09:0.5", sdxl())
    assert not blocks.remark("OUT:0.5", sdxl()), "a group is of the blocks that are there"
    assert "OUT00, OUT01, OUT02" in blocks.remark("ALL", sd1())
    assert "no block &#x27;IN12&#x27;" in blocks.remark("IN12:1", toybox())


@pytest.mark.parametrize(
    "text, ends",
    [("", (0, 1)), ("0.2-0.8", (0.2, 0.8)), ("0.3-", (0.3, 1)), ("0:0, 0.5:1, 1:0", (0, 1)), ("?", (0, 1))],
)
def test_schedule_sliders_show_windows(text: str, ends: tuple[float, float]) -> None:
    assert timing.shown(text) == ends


def test_a_lora_is_called_by_its_name_and_all_of_it() -> None:
    job = Job(prompt="a cat", loras=(LoraWeight(path="loras/style-v1.5"), LoraWeight(path="zib.v2.safetensors")))
    assert markup.caption(job) == "seed 0 · style-v1.5 1 · zib.v2 1"
    assert "style-v1.5 1; zib.v2 1" in markup.settings(job, "")


def test_the_bar_counts_all_pictures_of_a_batch() -> None:
    assert 'aria-valuenow="25"' in outcome.bar(Progress(0, 5, 10, together=6), 12)
    assert "pictures 7 to 12 of 12, step 5 of 10" in outcome.bar(Progress(6, 5, 10, together=6), 12)
    assert 'aria-valuenow="75"' in outcome.bar(Progress(6, 5, 10, together=6), 12)
    assert "picture 2 of 2, step 1 of 4" in outcome.bar(Progress(1, 1, 4), 2)


@pytest.fixture(scope="module")
def one_row() -> row.Row:
    with gr.Blocks():
        return row.build(0, lambda: PRESETS)


def _values(one: row.Row, **changed: Any) -> dict[Any, Any]:
    values = {widget: widget.value for widget in one.inputs}
    return values | {(one.encoders | {"follows": one.follows})[name]: value for name, value in changed.items()}


def test_text_encoders_follow_the_weight_until_they_are_set_apart(one_row: row.Row) -> None:
    usual = one_row.lora_weight(_values(one_row), "a", sdxl().components)
    assert usual == LoraWeight(path="a", unet=0.8, text_encoder=0.8)
    apart = _values(one_row, follows=False, text_encoder=0.4, text_encoder_2=0.2)
    weights = {"path": "a", "unet": 0.8, "text_encoder": 0.4}
    assert one_row.lora_weight(apart, "a", sdxl().components) == LoraWeight(**weights, text_encoder_2=0.2)
    assert one_row.lora_weight(apart, "a", sd1().components) == LoraWeight(**weights), "SD 1.x has one"


def test_the_fold_says_what_is_set_in_it(one_row: row.Row) -> None:
    apart = _values(one_row, follows=False, text_encoder=0.4, text_encoder_2=0.2)
    told = one_row.told(apart, sdxl())
    assert told[one_row.more].label == "more · text encoder 0.4 · text encoder 2 0.2"
    assert [told[one].visible for one in one_row.encoders.values()] == [True, True]
    assert [one_row.told(apart, sd1())[one].visible for one in one_row.encoders.values()] == [True, False]
    assert one_row.told(_values(one_row), sdxl())[one_row.more].label == "more"
