"""What the app refuses, and what it escapes."""

import pytest

from sdlora.errors import SdloraError
from sdlora.generation.job import Job
from sdlora.mixing.plan import LoraWeight
from sdlora.web import markup
from sdlora.web.app import serve


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_others_may_reach_it_only_with_a_password(host: str) -> None:
    with pytest.raises(SdloraError, match="--password"):
        serve(host=host)


def test_nothing_from_files_or_people_becomes_markup() -> None:
    evil = "<img src=x onerror=alert(1)>"
    job = Job(prompt=evil, negative_prompt=evil, model=evil, loras=(LoraWeight(path=f"{evil}.safetensors"),))
    shown = markup.settings(job, evil) + markup.trigger_words((evil,), evil) + markup.note(evil) + markup.bar(0.5, evil)
    assert "<img" not in shown
