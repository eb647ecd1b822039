"""Plans: what a weight is at a place, and how plans are written."""

import json

import numpy as np
import pytest

from sdlora.errors import SdloraError
from sdlora.mixing.plan import LoraWeight, Plan, as_dict, from_dict, lora_weight, place_of
from sdlora.mixing.schedule import parse_schedule, window

FULL = LoraWeight(
    path="a",
    unet=0.8,
    text_encoder=0.5,
    text_encoder_2=0.25,
    blocks=(("BASE", 0.5), ("IN04", -2.0)),
    schedule=window(0.2, 0.8),
    sha256="ab",
)
UNET, ENCODERS = "unet.down_blocks.1.attentions.0.proj_in", ("text_encoder", "text_encoder_2")


def test_a_weight_is_the_components_times_the_blocks():
    assert place_of(UNET) == ("unet", "IN04")
    assert FULL.at(place_of(UNET)) == 0.8 * -2
    assert FULL.at(place_of(f"{UNET}.bias")) == 0.8 * -2
    assert FULL.at(place_of("unet.mid_block.resnets.0.conv1")) == 0.8
    assert [FULL.at(place_of(f"{one}.text_model.encoder.layers.0.mlp.fc1")) for one in ENCODERS] == [0.25, 0.125]


def test_the_second_text_encoder_follows_the_first_until_it_is_told_otherwise():
    one = LoraWeight(path="a", text_encoder=0.3)
    assert one.of("text_encoder_2") == 0.3
    assert LoraWeight(path="a", text_encoder=0.3, text_encoder_2=0.0).of("text_encoder_2") == 0


def test_off_is_zero_everywhere_and_keeps_its_settings():
    off = lora_weight("a", {"unet": 0.7, "on": False}, ("unet", "text_encoder"))
    assert off.unet == 0.7 and not off.on and off.at(("unet", "IN01")) == 0


def test_parts_of_a_plan_have_the_others_off():
    (unet,), (heard,) = (Plan("m", (FULL,)).only(one).loras for one in (("unet",), ENCODERS))
    assert unet.schedule == FULL.schedule and (unet.unet, unet.text_encoder, unet.of("text_encoder_2")) == (0.8, 0, 0)
    assert (heard.unet, heard.text_encoder, heard.of("text_encoder_2")) == (0, 0.5, 0.25) and heard.schedule.level == 1


@pytest.mark.parametrize("lora", [FULL, LoraWeight(path="x"), LoraWeight(path="y", on=False, unet=-1)])
def test_a_weight_survives_json(lora: LoraWeight):
    assert from_dict(json.loads(json.dumps(as_dict(lora)))) == lora


def test_pictures_of_before_are_still_read():
    told = {"path": "a.safetensors", "unet": 0.5, "text_encoder": 1.0, "sha256": "ab"}
    assert from_dict(told) == LoraWeight(path="a.safetensors", unet=0.5, sha256="ab")


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (0.5, LoraWeight(path="a", unet=0.5, text_encoder=0.5)),
        ({"unet": 1.0}, LoraWeight(path="a", unet=1.0, text_encoder=0.0)),
        ({"blocks": {"M00": 0.0}}, LoraWeight(path="a", blocks=(("M00", 0.0),))),
        ({"blocks": "M00:0.5", "schedule": "0.5-"}, LoraWeight(path="a", blocks=(("M00", 0.5),), schedule=window(0.5))),
        ({"schedule": parse_schedule("0:0,1:1")}, LoraWeight(path="a", schedule=parse_schedule("0:0,1:1"))),
    ],
)
def test_weights_as_people_write_them(weights, expected: LoraWeight):
    assert lora_weight("a", weights, ("unet", "text_encoder")) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraWeight(path="a", blocks=(("IN4", 1.0),)), "no block 'IN4'.*nearest: IN04"),
        (lambda: LoraWeight(path="a", blocks=(("IN04", float("nan")),)), "must be a finite number"),
        (lambda: LoraWeight(path="a", unet=True), "must be a finite number"),
        (lambda: LoraWeight(path="a", text_encoder=None), "must be a finite number"),  # type: ignore[arg-type]
        (lambda: Plan("", (FULL, FULL)), "a is given twice"),
        (lambda: lora_weight("a", {"vae": 1.0}, ("unet",)), "no component 'vae'"),
    ],
)
def test_what_is_no_plan_is_refused(make, message: str):
    with pytest.raises(SdloraError, match=message):
        make()


def test_numbers_of_numpy_are_weights():
    lora = LoraWeight(path="a", unet=np.float32(0.5), text_encoder=np.int64(1), blocks={"IN01": np.float32(0.25)})
    told = {"path": "a", "unet": 0.5, "text_encoder": 1.0, "blocks": {"IN01": 0.25}}
    assert json.loads(json.dumps(as_dict(lora))) == told
