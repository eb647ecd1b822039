"""How the page's events run: unseen, and with errors as the one line that the command line prints."""

from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import gradio as gr

from sdlora.errors import SdloraError

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
LATEST: dict[str, Any] = {**QUIET, "trigger_mode": "always_last"}  # for what comes in quick succession


@contextmanager
def toasted() -> Iterator[None]:
    """Turn an SdloraError into a message on the page. All else is a fault of ours and goes to the terminal."""
    try:
        yield
    except SdloraError as error:
        raise gr.Error(escape(str(error), quote=False), title="That did not work", print_exception=False) from None


@contextmanager
def warned() -> Iterator[None]:
    """The same, but what stands behind goes on."""
    try:
        yield
    except SdloraError as error:
        gr.Warning(escape(str(error), quote=False))
