"""What all visitors of the app share: base models with their mixers, the library, and whose job is running."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sdlora.errors import SdloraError
from sdlora.generation.open import open_mixer
from sdlora.mixing.mixer import Mixer
from sdlora.web.library import Library


@dataclass(frozen=True, eq=False)
class Studio:
    """models: names of base models, the first is the default; output: folder where pictures are saved."""

    models: tuple[str, ...]
    library: Library
    output: Path
    _mixers: dict[str, Mixer] = field(default_factory=dict)
    _loading: threading.Lock = field(default_factory=threading.Lock)
    _running: dict[str, threading.Event] = field(default_factory=dict)

    def mixer(self, model: str) -> Mixer:
        """The mixer over a base model, which is loaded when it is first asked for."""
        if found := self.loaded(model):  # nobody waits here while another model is loaded
            return found
        with self._loading:
            if model not in self._mixers:
                self._mixers[model] = open_mixer(model)
            return self._mixers[model]

    def loaded(self, model: str) -> Mixer | None:
        """The same, but nothing is loaded."""
        return self._mixers.get(model)

    @contextmanager
    def job_of(self, session: str) -> Iterator[threading.Event]:
        """While a session's job runs: an event that tells it to stop. SdloraError where the session has one already."""
        asked = threading.Event()
        if self._running.setdefault(session, asked) is not asked:
            raise SdloraError("this page is at work on another job; wait for its end, or cancel it")
        try:
            yield asked
        finally:
            del self._running[session]

    def cancel(self, session: str) -> None:
        """Stop the session's own job, and nobody else's."""
        asked = self._running.get(session)
        if asked:
            asked.set()
