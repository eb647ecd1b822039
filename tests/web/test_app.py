"""What the app refuses, and what it escapes."""

from pathlib import Path

import pytest

from sdlora.errors import SdloraError
from sdlora.formats.block_weights import PRESET_FILE
from sdlora.generation.job import Job
from sdlora.mixing.plan import LoraWeight
from sdlora.web import markup
from sdlora.web.app import _studio, serve
from tests.web.pages import Open, generate


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_others_may_reach_it_only_with_a_password(host: str) -> None:
    with pytest.raises(SdloraError, match="--password"):
        serve(host=host)


def test_presets_that_cannot_be_read_are_told_and_the_app_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / PRESET_FILE).write_text("broken\n")
    _studio([], [str(tmp_path)], str(tmp_path / "out"))
    assert f"note: {tmp_path / PRESET_FILE}, line 1" in (told := capsys.readouterr().err) and told.count("\n") == 1


def test_presets_that_cannot_be_read_are_told_and_pictures_are_made(open_page: Open, library: Path) -> None:
    page = open_page()
    (library / PRESET_FILE).write_text("broken\n")
    try:
        assert generate(page)
        page.locator(".toast-body", has_text=f"{PRESET_FILE}, line 1").wait_for()
    finally:
        (library / PRESET_FILE).unlink()


def test_nothing_from_files_or_people_becomes_markup() -> None:
    evil = "<img src=x onerror=alert(1)>"
    job = Job(prompt=evil, negative_prompt=evil, model=evil, loras=(LoraWeight(path=f"{evil}.safetensors"),))
    shown = markup.settings(job, evil) + markup.trigger_words((evil,), evil) + markup.note(evil) + markup.bar(0.5, evil)
    assert "<img" not in shown
