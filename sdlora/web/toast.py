"""Errors as the app shows them: the same one line that the command line prints."""

from collections.abc import Iterator
from contextlib import contextmanager
from html import escape

import gradio as gr

from sdlora.errors import SdloraError


@contextmanager
def toasted() -> Iterator[None]:
    """Turn an SdloraError into a message on the page. All else is a fault of ours and goes to the terminal."""
    try:
        yield
    except SdloraError as error:
        raise gr.Error(escape(str(error), quote=False), title="That did not work", print_exception=False) from None
