"""Blocks and their factors mean what they mean in the original code and in sd-webui-lora-block-weight."""

import random
import re
from pathlib import Path

import pytest

from sdlora.errors import SdloraError
from sdlora.formats.architectures import Architecture, sd1, sd2, sdxl, toybox
from sdlora.formats.block_weights import (
    BLOCKS,
    PRESETS,
    PresetsIn,
    absent,
    block_of,
    blocks_of,
    preset_name,
    presets_in,
    read_factors,
    read_presets,
    unlisted,
    write_factors,
    write_named,
    write_presets,
)
from tests.originals import original_unet_key

# As the extension's README has the columns of its tables.
LISTS = {
    12: "BASE IN04 IN05 IN07 IN08 M00 OUT00 OUT01 OUT02 OUT03 OUT04 OUT05",
    17: "BASE IN01 IN02 IN04 IN05 IN07 IN08 M00 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11",
    20: "BASE IN00 IN01 IN02 IN03 IN04 IN05 IN06 IN07 IN08 M00 OUT00 OUT01 OUT02 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08",
    26: "BASE IN00 IN01 IN02 IN03 IN04 IN05 IN06 IN07 IN08 IN09 IN10 IN11 M00"
    " OUT00 OUT01 OUT02 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11",
}
# The blocks that the extension's own presets leave on.
ON = {
    "NONE": "",
    "ALL": LISTS[17],
    "INS": "BASE IN01 IN02 IN04",
    "IND": "BASE IN05 IN07 IN08",
    "INALL": "BASE IN01 IN02 IN04 IN05 IN07 IN08",
    "MIDD": "BASE IN05 IN07 IN08 M00 OUT03 OUT04 OUT05 OUT06",
    "OUTD": "BASE OUT03 OUT04 OUT05 OUT06",
    "OUTS": "BASE OUT07 OUT08 OUT09 OUT10 OUT11",
    "OUTALL": "BASE OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11",
}


def original_block(path: str, keys: list[str]) -> str:
    """The block by the number in the original code's name."""
    name = original_unet_key(f"{path}.weight", keys)
    side = re.match(r"(input_blocks|output_blocks)\.(\d+)\.|(middle_block)\.", name)
    if side is None:
        return "BASE"
    return "M00" if side[3] else f"{'IN' if side[1] == 'input_blocks' else 'OUT'}{int(side[2]):02}"


@pytest.mark.parametrize("architecture", [sd1(), sd2(), sdxl()], ids=lambda one: one.name)
def test_each_block_has_the_number_that_the_original_code_gives_it(architecture: Architecture):
    paths = [path for path in (*architecture.shapes, *architecture.norms) if path.startswith("unet.")]
    keys = [path.removeprefix("unet.") + ".weight" for path in paths]
    expected = {path: original_block(path.removeprefix("unet."), keys) for path in paths}
    assert {path: block_of(path) for path in paths} == expected
    assert {path: block_of(f"{path}.bias") for path in paths} == expected


@pytest.mark.parametrize(
    "path",
    [
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder_2.text_projection",
        "unet.time_embedding.linear_1.bias",
        "unet.add_embedding.linear_2",
        "unet.conv_norm_out",
        "unet.conv_out.bias",
        "unet.up_blocks.7.resnets.0.conv1",
    ],
)
def test_what_lies_in_no_block_is_base(path: str):
    assert block_of(path) == "BASE"


def test_a_level_with_more_layers_does_not_reach_into_the_next():
    assert block_of("unet.down_blocks.1.attentions.4.proj_in") == "IN06"
    assert block_of("unet.up_blocks.1.resnets.4.conv1") == "OUT05"


def test_an_architecture_has_the_blocks_of_its_unet():
    assert blocks_of(sd1()) == blocks_of(sd2()) == BLOCKS == tuple(LISTS[26].split())
    assert blocks_of(sdxl()) == tuple(LISTS[20].split())
    # One layer to a level on the way down, two on the way up; two levels.
    assert " ".join(blocks_of(toybox())) == "BASE IN00 IN01 IN03 IN04 M00 OUT00 OUT01 OUT02 OUT03 OUT04"


@pytest.mark.parametrize("count", LISTS)
def test_a_list_gives_each_number_to_its_block_and_0_to_the_blocks_it_leaves_out(count: int):
    listed = LISTS[count].split()
    factors = dict(read_factors(", ".join(str(2 + i) for i in range(count))))
    assert [factors.pop(block) for block in listed] == [2 + i for i in range(count)]
    assert factors == dict.fromkeys(set(BLOCKS) - set(listed), 0)


@pytest.mark.parametrize("name", ON)
def test_a_preset_leaves_on_what_the_extension_leaves_on(name: str):
    factors = dict(read_factors(name))
    assert {block for block in BLOCKS if factors.get(block, 1) == 1} == set(ON[name].split())
    assert set(factors.values()) <= {0}


def test_a_preset_may_halve_and_people_may_have_their_own():
    assert dict(read_factors("ALL0.5"))["OUT11"] == 0.5
    assert read_factors("HALF", {"HALF": ",".join(["0.5"] + ["1"] * 25)}) == (("BASE", 0.5),)
    assert set(PRESETS) == {*ON, "ALL0.5"}


def test_factors_come_in_the_order_of_the_blocks_without_those_that_are_1():
    assert read_factors("OUT03:0, IN04:.5, M00:1, BASE:-1.5") == (("BASE", -1.5), ("IN04", 0.5), ("OUT03", 0.0))


def test_blocks_are_named_by_range_and_group_and_the_later_word_counts():
    assert read_factors("in01-IN03:0.5") == read_factors("IN03-IN01:0.5") == tuple((f"IN0{i}", 0.5) for i in (1, 2, 3))
    assert [block for block, _ in read_factors("IN11-OUT00:0")] == ["IN11", "M00", "OUT00"]
    assert [block for block, _ in read_factors("OUT:0,OUT03:1")] == [
        f"OUT{i:02}" for i in (0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11)
    ]
    assert read_factors("ALL:0,MID:1,IN:1,OUT:1") == (("BASE", 0.0),)


def test_x_in_a_list_is_the_number_given_beside_it():
    ones = ",".join(["1"] * 23)
    assert read_factors(f"X,X+0.25,X-0.25,{ones}", dynamic=0.5) == (("BASE", 0.5), ("IN00", 0.75), ("IN01", 0.25))
    assert read_factors(f"X,1,1,{ones}") == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("OUTT", r"no preset .* 'OUTT' \(nearest: OUTS"),
        ("ins", r"no preset .* 'ins'"),
        ("0.5", "no preset"),
        ("", "no preset"),
        ("1,1,1", "3 numbers; an lbw list has 12, 17, 20 or 26"),
        (",".join("1" * 61), "61 are for Flux"),
        ("1,1,1,1,1,1,R,1,1,1,1,1", "OUT00 is R, a random factor.* write a number"),
        ("U,1,1,1,1,1,1,1,1,1,1,1", "BASE is U, a random factor"),
        ("1,1,1,1,1,1,1,1,1,1,1,o", "OUT05 is 'o'"),
        ("1,1,1,1,1,1,1,1,1,1,1,", "OUT05 is ''"),
        ("1,1,1,1,1,1,1,1,1,1,1,1e999", "OUT05 is '1e999'"),
        ("1,1,1,1,1,1,1,1,1,1,1,nan", "OUT05 is 'nan'"),
        ("1,1,1,1,1,1,1,1,1,1,1,1_0", "OUT05 is '1_0'"),
        ("X0.5,1,1,1,1,1,1,1,1,1,1,1", "BASE is 'X0.5'"),
        ("IN4:0.5", r"no block 'IN4' \(nearest: IN"),
        ("IN01-IN02-IN03:1", "no block 'IN01-IN02-IN03'"),
        ("IN04:", "IN04 is ''"),
        ("IN04:0.5,0.7", "'0.7' has no block"),
    ],
)
def test_what_is_no_weighting_is_refused_in_one_line_that_names_it(text: str, said: str):
    with pytest.raises(SdloraError, match=said) as error:
        read_factors(text)
    assert "\n" not in str(error.value)


def test_a_preset_that_is_wrong_is_named():
    with pytest.raises(SdloraError, match="preset MINE: 2 numbers"):
        read_factors("MINE", {"MINE": "1,1"})


@pytest.mark.parametrize("count", LISTS)
def test_what_is_written_is_read_back_to_the_bit(count: int):
    draw = random.Random(count)
    for _ in range(20):
        text = ",".join(repr(draw.choice([0.0, 1.0, draw.uniform(-2, 2), draw.uniform(0, 1e-9)])) for _ in range(count))
        factors = read_factors(text)
        written = write_factors(factors)
        assert read_factors(written) == factors and len(written.split(",")) <= count
        assert read_factors(write_named(factors)) == factors


def test_groups_whose_blocks_agree_are_called_by_their_names():
    for text in ("IN04:0.5,OUT:0", "BASE:0.25,IN:0,MID:2,OUT11:-1", "IN00:0.5,IN01:0.25"):
        assert write_named(read_factors(text)) == text


@pytest.mark.parametrize("count", LISTS)
def test_a_list_is_written_in_the_length_that_it_was_typed_in(count: int):
    text = ",".join(f"0.{number}5" for number in range(1, count + 1))
    assert write_factors(read_factors(text)) == text
    assert write_factors(read_factors("IN04:0.5")) == ",".join(["1"] * 5 + ["0.5"] + ["1"] * 20)


def test_presets_are_written_as_they_are_typed_where_no_shorter_list_says_the_same():
    shorter = {"NONE": ",".join("0" * 12), "IND": "1,0,1,1,1,0,0,0,0,0,0,0"}
    assert {name: write_factors(read_factors(name)) for name in PRESETS} == {**PRESETS, **shorter}


@pytest.mark.parametrize("write", [write_factors, write_named])
def test_factors_that_are_none_are_not_written(write):
    with pytest.raises(SdloraError, match=r"no block 'IN4' \(nearest"):
        write((("IN4", 0.5),))
    with pytest.raises(SdloraError, match="factor of IN04 is nan"):
        write((("IN04", float("nan")),))


def test_factors_on_blocks_that_an_architecture_lacks_are_named():
    factors = read_factors("BASE:0.5,IN08-IN10:0,OUT11:2")
    assert absent(factors, sdxl()) == ("IN09", "IN10", "OUT11")
    assert absent(factors, sd1()) == ()
    assert absent(factors, toybox()) == ("IN08", "IN09", "IN10", "OUT11")


def test_blocks_that_a_list_switches_off_unsaid_are_named():
    assert unlisted("ALL", sdxl()) == ("IN00", "IN03", "IN06", "OUT00", "OUT01", "OUT02")
    assert unlisted("HERS", sd1(), {"HERS": ",".join("1" * 20)}) == (
        *("IN09", "IN10", "IN11"),
        *("OUT09", "OUT10", "OUT11"),
    )
    assert unlisted(",".join("1" * 20), sdxl()) == unlisted("OUT:0", sdxl()) == ()
    with pytest.raises(SdloraError, match="no preset"):
        unlisted("AL", sdxl())


ONES = ",".join("1" * 12)


def test_a_file_of_presets_is_read_as_the_extension_reads_it():
    flux, odd = ",".join("1" * 61), "R, U,X,X+0.2,X-.5,1e-3,-1,0,0,0,0,.5"
    text = f"# my own: {ONES}\nINS:{PRESETS['INS']}\r\n\n MINE : {odd}\nOFF#:1,1,1\nFLUXALL:{flux}\n"
    presets = read_presets(text)
    assert presets == {"INS": PRESETS["INS"], "MINE": odd, "FLUXALL": flux}
    with pytest.raises(SdloraError, match="preset FLUXALL: 61 numbers"):
        read_factors("FLUXALL", presets)
    with pytest.raises(SdloraError, match="preset MINE: BASE is R, a random factor"):
        read_factors("MINE", presets)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("only words", "'only words' is no preset; write NAME:1,0,... or put # before it"),
        ("MINE:IN04:0.5", "is no preset"),
        (f"MINE:{ONES},half", "is no preset"),
        (f":{ONES}", "is no preset"),
        ("MINE:1,0,1", "MINE: 3 numbers; an lbw list has 12, 17, 20 or 26"),
        (f"A:0,{ONES[2:]}", "there is another list for A before"),
    ],
)
def test_a_line_that_is_no_preset_is_named(line: str, why: str):
    with pytest.raises(SdloraError, match=f"^his.txt, line 3: .*{re.escape(why)}"):
        read_presets(f"A:{ONES}\nA:{ONES}\n{line}\n", "his.txt")


def test_presets_of_folders_stand_beside_the_built_in_ones(tmp_path: Path):
    for name in ("one", "two", "none"):
        (tmp_path / name).mkdir()
    folders = [tmp_path / name for name in ("one", "none", "two")]
    zeros = ",".join("0" * 12)
    (tmp_path / "one" / "lbwpresets.txt").write_text(f"\N{BYTE ORDER MARK}MINE:{ONES}\nINS:{zeros}\n", "utf-8")
    (tmp_path / "two" / "lbwpresets.txt").write_text(f"HERS:{zeros}\nMINE:{ONES}\n")
    presets = presets_in(folders)
    assert presets == {**PRESETS, "MINE": ONES, "INS": zeros, "HERS": zeros}
    assert read_factors("INS", presets) == read_factors("NONE")
    (tmp_path / "two" / "lbwpresets.txt").write_text(f"MINE:{zeros}\n")
    with pytest.raises(SdloraError, match="two.*another list for MINE than a folder before"):
        presets_in(folders)
    (tmp_path / "two" / "lbwpresets.txt").write_bytes(b"MINE\xff:1,0")
    with pytest.raises(SdloraError, match="two.*cannot be read"):
        presets_in(folders)


def test_presets_are_read_when_one_is_asked_for(tmp_path: Path):
    presets = PresetsIn([tmp_path])
    (tmp_path / "lbwpresets.txt").write_text(f"MINE:{ONES}\n")
    assert dict(presets) == {**PRESETS, "MINE": ONES}
    (tmp_path / "lbwpresets.txt").write_text("broken\n")
    presets = PresetsIn([tmp_path])
    for ask in (lambda: read_factors("INS", presets), lambda: len(presets)):
        with pytest.raises(SdloraError, match="lbwpresets.txt, line 1"):
            ask()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        *((name, "no name of a preset; write one without : #") for name in ("", " ", "a\nb", "a:b", "#a", "a@b")),
        *((name, "no name of a preset; write one without : #") for name in ("X,Y", '"q"', ">")),
        *((name, f"{name} is a number") for name in ("0.5", "-1", "1e3", "nan", "inf", ".5")),
        *((name, f"{name} is the name of blocks") for name in ("IN04", "in04", "M00", "MID", "OUT", "BASE")),
    ],
)
def test_what_means_something_else_is_no_name_of_a_preset(name: str, why: str):
    with pytest.raises(SdloraError, match=re.escape(why)):
        preset_name(name)


def test_presets_are_read_back_as_they_were_written():
    assert write_presets({"B": ONES, "A b": ONES}) == f"B:{ONES}\nA b:{ONES}\n"
    assert read_presets(write_presets(PRESETS)) == PRESETS


@pytest.mark.parametrize(
    ("name", "told"),
    [("a:b", ONES), ("#a", ONES), ("a\nb", ONES), ("", ONES), (" a", ONES), ("a", "IN04:0"), ("a", "1,0")],
)
def test_a_preset_that_the_file_cannot_hold_is_not_written(name: str, told: str):
    with pytest.raises(SdloraError, match="has no place in lbw's file"):
        write_presets({"GOOD": ONES, name: told})
