"""What a person does with the app, done in a real browser."""

from pathlib import Path

from tests.web.pages import Open, choose_lora, generate, pixels, set_number, unfold


def test_two_sliders_change_the_picture(open_page: Open) -> None:
    page = open_page()
    set_number(page, "#steps", 3)
    plain = generate(page)
    choose_lora(page, 0, "alpha")
    page.locator("#add-lora").click()
    choose_lora(page, 1, "beta")
    set_number(page, "#lora-0 .lora-weight", 0)
    set_number(page, "#lora-1 .lora-weight", 0)
    assert generate(page) == plain, "weights of 0 leave the base's picture"
    set_number(page, "#lora-0 .lora-weight", 1.2)
    set_number(page, "#lora-1 .lora-weight", -0.7)
    mixed = generate(page)
    assert mixed != plain
    assert "alpha 1.2; beta -0.7" in page.locator("#details").inner_text()
    page.locator("#lora-0 .lora-on input").uncheck()
    page.locator("#lora-1 .lora-remove").click()
    assert generate(page) == plain, "off is off"


def test_two_people_do_not_disturb_each_other(open_page: Open) -> None:
    pages = [open_page(), open_page()]
    for seed, page in enumerate(pages, start=5):
        set_number(page, "#steps", 4)
        set_number(page, "#seed", seed)
        choose_lora(page, 0, ("alpha", "beta")[seed - 5])
    alone = [generate(page) for page in pages]
    for page in pages:
        set_number(page, "#pictures", 2)
        page.locator("#generate").click()
    for page in pages:
        page.locator("#bar", has_text="2 pictures done.").wait_for()
    for seed, page, before in zip((5, 6), pages, alone, strict=True):
        assert pixels(page, 1) == before, "the picture of a seed does not depend on who else is generating"
        assert f"seed\n{seed + 1}" in page.locator("#details").inner_text()


def test_cancel_stops_ones_own_job_only(open_page: Open) -> None:
    mine, theirs = open_page(), open_page()
    set_number(mine, "#steps", 100)
    set_number(mine, "#pictures", 8)
    set_number(theirs, "#steps", 3)
    mine.locator("#generate").click()
    mine.locator("#bar", has_text="step").wait_for()
    theirs.locator("#generate").click()
    theirs.locator("#cancel").wait_for()
    mine.locator("#cancel").click()
    mine.locator("#bar", has_text="Cancelled after").wait_for()
    theirs.locator("#bar", has_text="1 picture done.").wait_for()


def test_a_second_job_of_a_page_is_refused_and_the_first_can_still_be_cancelled(open_page: Open) -> None:
    page = open_page()
    choose_lora(page, 0, "alpha")
    set_number(page, "#steps", 100)
    unfold(page, "#compare")
    page.locator("#compare-go").click()
    page.locator("#bar", has_text="step").wait_for()
    page.locator("#prompt textarea").press("Shift+Enter")
    page.locator(".toast-body", has_text="at work on another job").wait_for()
    page.locator("#cancel").click()
    page.locator("#bar", has_text="Cancelled after 0 pictures.").wait_for()


def test_a_file_that_cannot_be_read_is_told_in_its_row(open_page: Open, library: Path) -> None:
    broken = library / "broken.safetensors"
    broken.write_bytes(b"no header")
    page = open_page()
    choose_lora(page, 0, "alpha")
    page.locator("#lora-0 .lora-head input:not([type=checkbox])").click()
    page.get_by_role("option", name="broken").click()
    page.locator("#words-0 .fault", has_text="broken.safetensors").wait_for()
    assert "trigger words" not in page.locator("#words-0").inner_text()
    broken.unlink()


def test_an_error_is_one_line_and_the_page_goes_on(open_page: Open) -> None:
    page = open_page()
    set_number(page, "#steps", 2)
    size = page.get_by_label("Size")
    size.fill("12x")
    size.press("Enter")
    page.locator("#generate").click()
    page.get_by_text("size '12x' is not understood").wait_for()
    size.fill("64")
    size.press("Enter")
    generate(page)


def test_an_uploaded_file_goes_into_the_rack(open_page: Open, library: Path, tmp_path: Path) -> None:
    page = open_page()
    uploaded = tmp_path / "gamma.safetensors"
    uploaded.write_bytes((library / "alpha.safetensors").read_bytes())
    with page.expect_file_chooser() as chooser:
        page.locator("#upload-lora").click()
    chooser.value.set_files(uploaded)
    page.locator("#words-0", has_text="trigger words").wait_for()
    set_number(page, "#steps", 2)
    generate(page)
    assert "gamma 0.8" in page.locator("#details").inner_text()


def test_a_clicked_picture_shows_its_settings(open_page: Open) -> None:
    page = open_page()
    set_number(page, "#steps", 2)
    set_number(page, "#pictures", 2)
    set_number(page, "#seed", 40)
    generate(page, count=2)
    assert "seed\n41" in page.locator("#details").inner_text()
    page.locator("#gallery img").nth(1).click()
    page.locator("#details", has_text="seed40").wait_for()


def test_only_the_page_itself_is_served(open_page: Open, address: str) -> None:
    page = open_page()
    told = page.request.get(f"{address}gradio_api/info").json()
    assert not told["named_endpoints"] and not told["unnamed_endpoints"]
    assert not page.request.get(f"{address}gradio_api/file=/etc/hostname").ok


def test_it_fits_a_phone(open_page: Open) -> None:
    page = open_page(width=390, height=800)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#generate").is_visible()
