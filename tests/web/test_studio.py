"""What visitors share, and what is each one's own."""

import threading
from pathlib import Path
from typing import Any

import pytest

from sdlora.errors import SdloraError
from sdlora.web import studio as studios
from sdlora.web.library import Library
from sdlora.web.studio import Studio


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(("fast", "slow"), Library([tmp_path]), tmp_path)


def test_a_page_has_one_job_at_a_time_and_can_cancel_it(studio: Studio) -> None:
    with studio.job_of("page") as asked, studio.job_of("other") as theirs:
        with pytest.raises(SdloraError, match="another job"), studio.job_of("page"):
            pass
        studio.cancel("page")
        assert asked.is_set() and not theirs.is_set()
    with studio.job_of("page") as again:
        assert not again.is_set()


def test_nobody_waits_for_a_model_that_others_load(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    loading, loaded = threading.Event(), threading.Event()

    def open_mixer(model: str) -> Any:
        if model == "slow":
            loading.set()
            assert loaded.wait(20)
        return object()

    monkeypatch.setattr(studios, "open_mixer", open_mixer)
    fast, found = studio.mixer("fast"), []
    others = threading.Thread(target=studio.mixer, args=("slow",))
    others.start()
    assert loading.wait(20)
    mine = threading.Thread(target=lambda: found.append(studio.mixer("fast")))
    mine.start()
    mine.join(5)
    waits = mine.is_alive()
    loaded.set()
    others.join(20)
    mine.join(20)
    assert found == [fast] and not waits
