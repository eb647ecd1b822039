"""The controls of a mix, worked in a real browser: what they say stands in the picture's own job."""

from pathlib import Path
from typing import Any

from PIL import Image

from sdlora.formats.block_weights import PRESET_FILE
from sdlora.mixing.plan import LoraWeight
from sdlora.mixing.schedule import parse_schedule, window
from tests.web.pages import Open, choose_lora, file_shown, generate, job_shown, set_number, unfold


def write(page: Any, where: str, text: str) -> None:
    """Into a text box, and on to the next one."""
    box = page.locator(f"{where} :is(input, textarea)")
    box.fill(text)
    box.press("Tab")


def compare(page: Any, shown: int) -> None:
    """Press the button, and wait until so many pictures and sheets are shown."""
    page.locator("#compare-go").click()
    page.wait_for_function("count => document.querySelectorAll('#gallery img').length == count", arg=shown)
    page.locator("#compare-go").wait_for()


def choose_model(page: Any, name: str) -> None:
    page.get_by_label("Model").click()
    page.get_by_role("option", name=name).click()
    page.wait_for_function("() => !document.querySelector('[role=option]')")


def save_preset(page: Any, name: str) -> None:
    """The blocks of the first row, under a name that is typed."""
    page.locator("#lora-0 .preset input").fill(name)
    page.locator("#lora-0 .save-preset").click()


def with_alpha(open_page: Open, steps: int = 2) -> Any:
    page = open_page()
    set_number(page, "#steps", steps)
    choose_lora(page, 0, "alpha")
    return page


def test_what_is_in_the_fold_goes_into_the_job_and_out_with_the_row(open_page: Open) -> None:
    page = with_alpha(open_page)
    assert not page.locator("#lora-0 .blocks-text").is_visible(), "folds are closed until they are asked for"
    usual = generate(page)
    (lora,) = job_shown(page).loras
    assert lora == LoraWeight(path=lora.path, unet=0.8, text_encoder=0.8, sha256=lora.sha256)
    unfold(page, "#lora-0 .lora-more")
    page.locator("#lora-0 .follows input").uncheck()
    page.locator("#lora-0 .text_encoder").wait_for()
    set_number(page, "#lora-0 .text_encoder", 0.3)
    write(page, "#lora-0 .blocks-text", "IN01:0.5,OUT:0.2")
    set_number(page, "#lora-0 .schedule-from", 0.25)
    page.get_by_text("more · text encoder 0.3 · blocks IN01:0.5,OUT:0.2 · schedule 0.25-1").wait_for()
    assert generate(page) != usual
    (lora,) = job_shown(page).loras
    assert (lora.unet, lora.text_encoder, lora.text_encoder_2) == (0.8, 0.3, None)
    assert dict(lora.blocks) == {"IN01": 0.5, **{f"OUT{i:02}": 0.2 for i in range(12)}}
    assert lora.schedule == window(0.25, 1)
    page.locator("#lora-0 .lora-remove").click()
    page.locator("#add-lora").click()
    choose_lora(page, 0, "alpha")
    assert generate(page) == usual, "a new row knows nothing of the one that was there"


def test_block_presets_sliders_and_text_say_the_same(open_page: Open) -> None:
    page = with_alpha(open_page)
    unfold(page, "#lora-0 .lora-more")
    text, sliders = page.locator("#lora-0 .blocks-text :is(input, textarea)"), "#lora-0 .group input[type=number]"
    page.locator("#lora-0 .preset input").click()
    page.get_by_role("option", name="OUTS").click()
    page.get_by_text("off, as the list has no number for them: IN00, IN03, OUT00, OUT01, OUT02").wait_for()
    assert text.input_value() == "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1"
    assert page.locator(sliders).nth(2).input_value() == "0", "M is off"
    set_number(page, "#lora-0 .group-MID", 0.4)
    page.wait_for_function("box => box.value.includes('MID:0.4')", arg=text.element_handle())
    write(page, "#lora-0 .blocks-text", "OUT11:0.5")
    page.get_by_text("no effect, as toybox has no such block: OUT11").wait_for()
    write(page, "#lora-0 .schedule-text", "0:0, 0.5:1, 1:0")
    page.locator("#lora-0 figure.curve").wait_for()
    generate(page)
    assert job_shown(page).loras[0].blocks == (("OUT11", 0.5),)
    assert job_shown(page).loras[0].schedule == parse_schedule("0:0, 0.5:1, 1:0")


def test_a_saved_preset_is_there_for_all_pages_and_gives_the_same_job(open_page: Open, library: Path) -> None:
    page = with_alpha(open_page)
    unfold(page, "#lora-0 .lora-more")
    write(page, "#lora-0 .blocks-text", "IN01:0.5,OUT:0.2")
    page.get_by_text("more · blocks IN01:0.5,OUT:0.2").wait_for()
    for name, told in (("a:b", "'a:b' is no name of a preset"), ("INS", "there is a preset INS already")):
        save_preset(page, name)
        page.locator(".toast-body", has_text=told).wait_for()
    write(page, "#lora-0 .blocks-text", "IN01:0.5,OUT:0.2")  # as a known name was typed, it has been filled in
    save_preset(page, "my own")
    page.get_by_text("more · blocks my own").wait_for()
    picture, job = generate(page), job_shown(page)
    again = with_alpha(open_page)
    unfold(again, "#lora-0 .lora-more")
    again.locator("#lora-0 .preset input").click()
    again.get_by_role("option", name="my own").click()
    again.get_by_text("more · blocks my own").wait_for()
    assert generate(again) == picture
    assert job_shown(again) == job
    (library / PRESET_FILE).unlink()


def test_what_is_refused_is_said_in_the_fold_and_when_it_is_asked_for(open_page: Open) -> None:
    page = with_alpha(open_page)
    unfold(page, "#lora-0 .lora-more")
    write(page, "#lora-0 .blocks-text", "OUT99:1")
    page.locator("#lora-0 .fault", has_text="there is no block 'OUT99'").wait_for()
    page.locator("#generate").click()
    page.locator(".toast-body", has_text="there is no block 'OUT99'").wait_for()
    assert not page.locator("#gallery img").count()
    write(page, "#lora-0 .blocks-text", "")
    write(page, "#lora-0 .schedule-text", "0.8-0.2")
    page.locator("#lora-0 .fault", has_text="window").wait_for()
    page.locator("#generate").click()
    page.locator(".toast-body", has_text="the window 0.8-0.2 is none").wait_for()
    write(page, "#lora-0 .schedule-text", "")
    generate(page)


def test_tags_in_the_prompt_are_loras(open_page: Open) -> None:
    page = with_alpha(open_page)
    in_rack = generate(page)
    page.locator("#lora-0 .lora-remove").click()
    write(page, "#prompt", "a red cat in a meadow <lora:alpha:0.8>")
    assert generate(page) == in_rack
    assert job_shown(page).prompt == "a red cat in a meadow"
    assert "LoRAs\nalpha 0.8" in page.locator("#details").inner_text()


def test_an_unknown_name_in_a_tag_makes_no_picture(open_page: Open) -> None:
    page = with_alpha(open_page)
    write(page, "#prompt", "a red cat <lora:betta:0.8>")
    page.locator("#generate").click()
    page.locator(".toast-body", has_text="(nearest: beta)").wait_for()
    page.locator("#generate").wait_for()
    assert not page.locator("#gallery img").count()


def test_loras_come_together_in_three_ways(open_page: Open) -> None:
    page = with_alpha(open_page)
    page.locator("#add-lora").click()
    choose_lora(page, 1, "beta")
    pictures = {generate(page)}
    for way in ("switch", "composite"):
        page.get_by_role("radio", name=way).check()
        page.locator("#switch-every").wait_for(state="visible" if way == "switch" else "hidden")
        pictures.add(generate(page))
        assert job_shown(page).compose == way
        assert f"come together\n{way}" in page.locator("#details").inner_text()
    assert len(pictures) == 3


def test_a_ladder_is_one_run_and_one_sheet_for_each_seed(open_page: Open) -> None:
    page = with_alpha(open_page)
    set_number(page, "#pictures", 2)
    unfold(page, "#compare")
    set_number(page, "#axis-a .axis-count", 3)
    compare(page, shown=8)
    assert "compared\nalpha 0 to 1.25" in page.locator("#details").inner_text()
    with Image.open(file_shown(page)) as sheet:
        assert sheet.width > 2 * sheet.height, "three pictures side by side, with their weights above them"
    captions = [image.get_attribute("alt") for image in page.locator("#gallery img").all()]
    rungs = {seed: [f"seed {seed} · alpha {weight}" for weight in ("0", "0.625", "1.25")] for seed in (0, 1)}
    sheets = {seed: f"sheet · alpha 0 to 1.25 · seed {seed}" for seed in (0, 1)}
    assert captions == [sheets[1], *rungs[1], sheets[0], *rungs[0]]
    page.locator("#gallery img").nth(2).click()
    page.locator("#details", has_text="alpha 0.625").wait_for()
    assert job_shown(page).loras[0].text_encoder == 0.625


def test_a_grid_of_two_loras_has_every_pair_of_weights(open_page: Open) -> None:
    page = with_alpha(open_page)
    page.locator("#add-lora").click()
    choose_lora(page, 1, "beta")
    unfold(page, "#compare")
    page.get_by_role("radio", name="grid of two LoRAs").check()
    page.locator("#axis-b").wait_for()
    for axis in ("a", "b"):
        set_number(page, f"#axis-{axis} .axis-count", 2)
        set_number(page, f"#axis-{axis} .axis-stop", 1)
    compare(page, shown=5)
    captions = [image.get_attribute("alt") for image in page.locator("#gallery img").all()[1:]]
    assert captions == [f"seed 0 · alpha {a} · beta {b}" for b in (0, 1) for a in (0, 1)]


def test_a_comparison_can_be_cancelled_within_a_step(open_page: Open) -> None:
    page = with_alpha(open_page, steps=100)
    unfold(page, "#compare")
    page.locator("#compare-go").click()
    page.locator("#bar", has_text="pictures 1 to 6 of 6, step").wait_for()
    page.locator("#cancel").click()
    page.locator("#bar", has_text="Cancelled after 0 pictures.").wait_for()
    set_number(page, "#steps", 2)
    generate(page)


def test_equalised_weights_are_offered_and_taken_only_when_wanted(open_page: Open, other_model: str) -> None:
    page = with_alpha(open_page)
    page.locator("#add-lora").click()
    choose_lora(page, 1, "loud")
    weights = [page.locator(f"#lora-{row} .lora-weight input[type=number]") for row in (0, 1)]
    page.locator("#equalise").click()
    page.locator("#offer", has_text="of one size at the weights alpha").wait_for()
    assert "loud is" in page.locator("#offer").inner_text(), "which of them drowns the other"
    assert [weight.input_value() for weight in weights] == ["0.8", "0.8"]
    choose_model(page, other_model)
    page.locator("#offer").wait_for(state="hidden")
    page.locator("#equalise").click()
    page.locator("#apply-equalised").click()
    page.locator("#offer").wait_for(state="hidden")
    alpha, loud = (float(weight.input_value()) for weight in weights)
    assert 3 < alpha / loud < 5


def test_everything_unfolded_fits_a_phone(open_page: Open) -> None:
    page = open_page(width=390, height=800)
    choose_lora(page, 0, "alpha")
    unfold(page, "#lora-0 .lora-more")
    unfold(page, "#compare")
    page.get_by_role("radio", name="grid of two LoRAs").check()
    page.locator("#axis-b").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
