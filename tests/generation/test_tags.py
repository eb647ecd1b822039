"""LoRA tags: what they say, what they refuse, and that A1111 reads what is written."""

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from sdlora.errors import SdloraError
from sdlora.formats.block_weights import BLOCKS, PRESETS, preset_name, read_factors, read_presets, write_presets
from sdlora.generation.job import Job
from sdlora.generation.prompts.tags import lora_weights, names_of, resolved, tag_of, take_tags
from sdlora.mixing.plan import LoraWeight
from sdlora.mixing.schedule import Schedule, progress_of, window

LIBRARY = {name: Path(f"/loras/{name}.safetensors") for name in ("a", "Style v1.5", "k=v:2", "crème", "STYLE V1.6")}
A = LoraWeight(path="/loras/a.safetensors")


def weight_of(tag: str, steps: int = 20) -> LoraWeight:
    (weight,) = lora_weights(take_tags(tag)[1], LIBRARY, steps)
    return weight


def factors(lora: LoraWeight, steps: int) -> list[float]:
    return [lora.schedule.at(progress_of(step, steps)) for step in range(steps)]


@pytest.mark.parametrize(
    ("prompt", "rest"),
    [
        ("a cat", "a cat"),
        ("  a cat ", "  a cat "),
        ("a <lora:a:1> cat", "a cat"),
        ("a cat, <lora:a> <LyCO:a:1>, b", "a cat, , b"),
        ("<lora:a:0.5>\na cat\n<lora:a>", "a cat"),
        ("(a<lora:a>b:1.2)", "(ab:1.2)"),
        ("<3 <lor:a> <b>", "<3 <lor:a> <b>"),
        ("<lora:a>", ""),
    ],
)
def test_a_prompt_is_left_without_its_tags(prompt: str, rest: str):
    assert take_tags(prompt)[0] == rest


@pytest.mark.parametrize(
    ("tag", "lora"),
    [
        ("<lora:a>", A),
        ("<lyco:a:0.8>", replace(A, unet=0.8, text_encoder=0.8)),
        ("<lora:a:-0.5:1.2>", replace(A, unet=1.2, text_encoder=-0.5)),
        ("<lora:a: .5 >", replace(A, unet=0.5, text_encoder=0.5)),
        ("<lora:a:te=0.4>", replace(A, unet=0.4, text_encoder=0.4)),
        ("<lora:a:unet=0.6>", replace(A, unet=0.6, text_encoder=1)),
        ("<lora:a:0.5:unet=2:te2=0>", replace(A, unet=2, text_encoder=0.5, text_encoder_2=0)),
        ("<lora:a:1:2:TE=3>", replace(A, unet=2, text_encoder=3)),
        ("<lora: a :1>", A),
        ("<lora:a.safetensors:1>", A),
        ("<lora:A>", A),
        ('<lora:"a":1>', A),
        ("<lora:Style v1.5:1>", replace(A, path="/loras/Style v1.5.safetensors")),
        ("<lora:style V1.5:1>", replace(A, path="/loras/Style v1.5.safetensors")),
        ("<lora:CRÈME:1>", replace(A, path="/loras/crème.safetensors")),
        ('<lora:"k=v:2":1>', replace(A, path="/loras/k=v:2.safetensors")),
        ("<lora:a:lbw=IN04@0.5,OUT03@0>", replace(A, blocks=(("IN04", 0.5), ("OUT03", 0.0)))),
        ('<lora:a:1:lbw="IN04:0.5, OUT03:0">', replace(A, blocks=(("IN04", 0.5), ("OUT03", 0.0)))),
        ("<lora:a:lbw=" + ",".join(["1"] * 25 + ["0"]) + ">", replace(A, blocks=(("OUT11", 0.0),))),
        ("<lora:a:w=" + ",".join(["X"] + ["1"] * 25) + ":x=0.5>", replace(A, blocks=(("BASE", 0.5),))),
        ("<lora:a:schedule=0.2-0.8>", replace(A, schedule=window(0.2, 0.8))),
        ('<lora:a:schedule="0:0, 1:1">', replace(A, schedule=Schedule(((0, 0), (1, 1))))),
        ("<lora:a:schedule=0@0,1@1>", replace(A, schedule=Schedule(((0, 0), (1, 1))))),
    ],
)
def test_what_a_tag_asks_for(tag: str, lora: LoraWeight):
    assert weight_of(tag) == lora


def test_a_name_may_hold_an_equals_sign_without_quotes():
    library = {"a=b.c d": Path("x.safetensors")}
    assert lora_weights(take_tags("<lora:a=b.c d:0.5>")[1], library, 20) == (
        LoraWeight(path="x.safetensors", unet=0.5, text_encoder=0.5),
    )


def test_a_preset_where_the_second_weight_stands_is_one_as_in_old_prompts():
    assert weight_of("<lora:a:0.8:INS>") == weight_of("<lora:a:0.8:lbw=INS>")
    assert dict(weight_of("<lora:a:0.8:INS>").blocks)["OUT03"] == 0


@pytest.mark.parametrize(
    ("when", "first", "end"),
    [
        ("start=3", 3, 8),
        ("stop=3", 0, 3),
        ("start=2:stop=5", 2, 5),
        ("step=2-5", 2, 5),
        ("step=2-", 2, 8),
        ("step=-5", 0, 5),
        ("start=0", 0, 8),
        ("stop=99", 0, 8),
        ("start=8", 8, 8),
        ("start=99", 8, 8),
        ("stop=0", 0, 0),
    ],
)
def test_steps_are_counted_as_the_block_weight_extension_counts_them(when: str, first: int, end: int):
    """On in the steps `first` to `end` - 1, from 0: start=A leaves the first A steps without, stop=B ends after B."""
    assert factors(weight_of(f"<lora:a:{when}>", steps=8), 8) == [float(first <= step < end) for step in range(8)]


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("<lora:Stile v1.5>", r"no LoRA 'Stile v1.5' \(nearest: Style v1.5"),
        ("<lora:STYLE V2.5>", r"no LoRA 'STYLE V2.5' \(nearest: Style v1.5, STYLE V1.6"),
        ("<lora:>", "names no LoRA"),
        ("<lora: :1>", "names no LoRA"),
        ("<lora:a:1", "does not end"),
        ("a <lora:a:1 cat", "does not end"),
        ("<lora:a:abc>", "<lora:a:abc>: the weight 'abc' is no number"),
        ("<lora:a:nan>", "no number"),
        ("<lora:a:1e309>", "no number"),
        ("<lora:a:unet=inf>", "no number"),
        ("<lora:a:>", "the weight '' is no number"),
        ("<lora:a:1:1:4>", "'4' is one number too many"),
        ("<lora:a:dyn=4>", "sdlora resize"),
        ("<lora:a:lbwe=ATTNDEEPON>", "weigh blocks with lbw="),
        ("<lora:a:strat=4>", r"strat=: it is none of .* \(nearest: start"),
        ("<lora:a:te=1:TE=2>", "says te= twice"),
        ("<lora:a:lbw=1,1>", "<lora:a:lbw=1,1>: block weights: 2 numbers"),
        ("<lora:a:lbw=INZ>", "nearest: INS"),
        ("<lora:a:start=0.5>", "write a whole number, or shares as in schedule=0.2-0.8"),
        ("<lora:a:start=-1>", "no step"),
        ("<lora:a:step=7>", "no pair of steps"),
        ("<lora:a:step=->", "no pair of steps"),
        ("<lora:a:step=9-3>", "no step is between 9 and 3"),
        ("<lora:a:start=3:step=3-5>", "start= and step= say when twice"),
        ("<lora:a:schedule=later>", "'later' is not understood"),
        ("<lora:a:" + "1" * 1000 + "x>", r"\.\.\.: the weight"),
    ],
)
def test_what_cannot_be_meant_is_an_error_of_one_line(tag: str, message: str):
    with pytest.raises(SdloraError, match=message) as caught:
        weight_of(tag)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_capitals_that_tell_two_names_apart_are_asked_for():
    library = {"One": Path("1"), "ONE": Path("2"), "two": Path("3")}
    (exact,) = lora_weights(take_tags("<lora:ONE>")[1], library, 20)
    assert exact.path == "2"
    with pytest.raises(SdloraError, match="may be ONE or One"):
        lora_weights(take_tags("<lora:one>")[1], library, 20)


def test_presets_of_ones_own_stand_in_tags():
    presets = {**PRESETS, "MINE": "0.5" + ",1" * 11}
    for tag in ("<lora:a:lbw=MINE>", "<lora:a:1:MINE>"):
        (lora,) = lora_weights(take_tags(tag)[1], LIBRARY, 20, presets)
        assert lora.blocks == read_factors(presets["MINE"])
        assert resolved(Job(prompt=tag), LIBRARY, presets).loras == (lora,)
    with pytest.raises(SdloraError, match=r"no preset .* 'MIEN' \(nearest: MINE"):
        lora_weights(take_tags("<lora:a:lbw=MIEN>")[1], LIBRARY, 20, presets)


@pytest.mark.parametrize("name", ["mine", "my own", "a=b", "1 to 2", "IN04 off", "crème", "a.b", "x\\y", "<a"])
def test_a_name_that_a_preset_may_be_given_stands_in_its_file_and_in_tags(name: str):
    assert preset_name(f" {name} ") == name
    presets = read_presets(write_presets({name: "0.5" + ",1" * 11}))
    (lora,) = lora_weights(take_tags(f"<lora:a:1:lbw={name}>")[1], LIBRARY, 20, presets)
    assert lora.blocks == read_factors(name, presets) != ()


def test_a_number_in_the_second_place_is_the_unets_weight_whatever_presets_are_called():
    presets = {**PRESETS, "0.5": "0.25" + ",1" * 11}
    (lora,) = lora_weights(take_tags("<lora:a:1:0.5>")[1], LIBRARY, 20, presets)
    assert lora == replace(A, unet=0.5)


# Jobs


def test_tags_move_from_the_prompt_into_the_job():
    job = Job(prompt="a <lora:a:0.5> cat", loras=(LoraWeight(path="mine.safetensors"),), steps=10)
    done = resolved(job, LIBRARY)
    assert done.prompt == "a cat"
    assert done.loras == (*job.loras, replace(A, unet=0.5, text_encoder=0.5))
    assert resolved(done, LIBRARY) is done


def test_a_job_counts_its_own_steps():
    (lora,) = resolved(Job(prompt="<lora:a:stop=5>", steps=10), LIBRARY).loras
    assert lora.schedule == window(0, 0.5)


def test_a_tag_in_the_negative_prompt_is_sent_to_the_prompt():
    with pytest.raises(SdloraError, match="negative prompt has the tag <lora:a:1>; LoRAs belong in the prompt"):
        resolved(Job(prompt="", negative_prompt="bad <lora:a:1>"), LIBRARY)


# Writing


def a1111_reads(tag: str, steps: int) -> tuple[str, float, float, list[float] | None, list[float]]:
    """Name, te, unet, lbw and the factors by step, as A1111 1.10 and its block weight extension take a tag apart."""
    (found,) = re.findall(r"<(\w+):([^>]+)>", tag)
    items = found[1].split(":")
    named = dict(item.split("=") for item in items if item.count("=") == 1 and item != items[0])
    placed = [item for item in items if item.count("=") != 1 or item == items[0]]
    lbw = [float(number) for number in named["lbw"].split(",")] if "lbw" in named else None
    start, stop = int(named.get("start", 0)), int(named.get("stop", steps))
    return placed[0], float(placed[1]), float(placed[2]), lbw, [float(start <= k < stop) for k in range(steps)]


def any_lora(rng: random.Random, name: str) -> LoraWeight:
    blocks = sorted(rng.sample(BLOCKS, rng.randint(0, 4)), key=BLOCKS.index)
    first, end = sorted(rng.sample(range(13), 2))
    return LoraWeight(
        path=f"/loras/{name}.safetensors",
        unet=rng.choice([1.0, 0.1 + 0.2, -2.0, 1e-30, rng.random()]),
        text_encoder=rng.choice([1.0, 0.0, rng.random()]),
        blocks=tuple((block, rng.choice([0.0, 0.5, rng.random()])) for block in blocks),
        schedule=rng.choice([Schedule(), window(first / 12, end / 12), Schedule(((0.0, 0.0),))]),
    )


@pytest.mark.parametrize("seed", range(30))
def test_a1111_reads_the_tags_that_are_written(seed: int):
    lora = any_lora(random.Random(seed), "Style v1.5")
    name, text_encoder, unet, lbw, by_step = a1111_reads(tag_of(lora, 12), 12)
    assert (name, text_encoder, unet) == ("Style v1.5", lora.text_encoder, lora.unet)
    assert (lbw or [1.0] * 26) == [dict(lora.blocks).get(block, 1.0) for block in BLOCKS]
    assert by_step == factors(lora, 12)


@pytest.mark.parametrize("seed", range(30))
def test_a_tag_says_what_it_was_written_from(seed: int):
    rng = random.Random(seed)
    name = rng.choice(["a", 'q"x\\', 'k=v:2 "q">', " space ", '"', "ж.ü"])
    lora = replace(any_lora(rng, name), text_encoder_2=rng.choice([None, 0.25]))
    lora = replace(lora, schedule=rng.choice([lora.schedule, Schedule(((0, 0), (0.3, rng.random()), (1, 1)))]))
    rest, tags = take_tags(f"x {tag_of(lora, 12)}, y")
    (read,) = lora_weights(tags, {name: Path(lora.path)}, 12)
    assert rest == "x , y"
    assert factors(read, 12) == factors(lora, 12)
    assert replace(read, schedule=lora.schedule) == lora


def test_a_lora_that_is_off_is_written_with_no_weight():
    assert tag_of(LoraWeight(path="a.safetensors", unet=0.5, on=False), 20) == "<lora:a:0:0>"


# Names


def test_a_library_knows_stems_and_paths(tmp_path: Path):
    for file in ("a.safetensors", "in/v1.5.safetensors", "in/A.SAFETENSORS", ".hid/x.safetensors", "in/note.txt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    peft = tmp_path / "peft one"
    peft.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (peft / file).touch()
    names = names_of([tmp_path])
    assert dict(names) == {
        "a": tmp_path / "a.safetensors",
        "in/v1.5": tmp_path / "in/v1.5.safetensors",
        "v1.5": tmp_path / "in/v1.5.safetensors",
        "A": tmp_path / "in/A.SAFETENSORS",
        "in/A": tmp_path / "in/A.SAFETENSORS",
        "peft one": peft,
    }
    assert dict(names_of([peft, str(tmp_path / "a.safetensors")])) == {
        "peft one": peft,
        "a": tmp_path / "a.safetensors",
    }


def test_a_lora_in_a_folder_for_each_component_has_one_name(tmp_path: Path):
    for part in ("unet", "text_encoder"):
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (tmp_path / "style" / part).mkdir(parents=True, exist_ok=True)
            (tmp_path / "style" / part / file).touch()
    assert dict(names_of([tmp_path])) == {"style": tmp_path / "style"}


def test_a_name_that_two_files_share_is_an_error_only_when_it_is_used(tmp_path: Path):
    for file in ("one/a.safetensors", "two/a.safetensors", "b.safetensors"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    names = names_of([tmp_path])
    assert names["b"] == tmp_path / "b.safetensors" and names["two/a"] == tmp_path / "two/a.safetensors"
    for tag in ("<lora:a>", "<lora:A>"):
        with pytest.raises(SdloraError, match="several LoRAs are called 'a': one/a, two/a"):
            lora_weights(take_tags(tag)[1], names, 20)


def test_what_two_libraries_have_under_one_name_is_called_by_the_library_too(tmp_path: Path):
    for file in ("one/in/a.safetensors", "two/in/a.safetensors", "one/b.safetensors"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    names = names_of([tmp_path / "one", tmp_path / "two"])
    assert names["one/in/a"] == tmp_path / "one/in/a.safetensors" and names["b"] == tmp_path / "one/b.safetensors"
    with pytest.raises(SdloraError, match="several LoRAs are called 'a': one/in/a, two/in/a; write one of these"):
        names["a"]


def test_links_are_followed_and_end(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.safetensors").touch()
    (tmp_path / "library").mkdir()
    (tmp_path / "library/sub").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/round").symlink_to(tmp_path / "library")
    assert dict(names_of([tmp_path / "library"])) == {
        name: tmp_path / "library/sub/a.safetensors" for name in ("a", "sub/a")
    }


def test_the_same_file_by_two_ways_is_one(tmp_path: Path):
    (tmp_path / "a.safetensors").touch()
    (tmp_path / "b.safetensors").symlink_to(tmp_path / "a.safetensors")
    (tmp_path / "again").symlink_to(tmp_path)
    names = names_of([tmp_path, tmp_path / "again", tmp_path / "a.safetensors"])
    assert dict(names) == {"a": tmp_path / "a.safetensors", "b": tmp_path / "b.safetensors"}


# Hostile prompts


def test_a_hundred_thousand_tags_are_read():
    rest, tags = take_tags("<lora:a:0.5> " * 100_000)
    assert rest == "" and len(tags) == 100_000 and set(tag.numbers for tag in tags) == {("0.5",)}


@pytest.mark.parametrize("text", ["<lora:", '<lora:"', '<lora:"a\\', '<lora:a="'])
def test_a_hundred_thousand_tags_without_end_are_one_error(text: str):
    with pytest.raises(SdloraError, match="does not end"):
        take_tags(text * 100_000)
