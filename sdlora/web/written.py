"""A setting that is written in a text box, which counts: sliders write into it, and a line tells what it does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from sdlora.web.events import LATEST


@dataclass(frozen=True, eq=False)
class Written:
    """The widgets. said: what of the text cannot be read, has no effect, or looks like."""

    text: gr.Textbox
    sliders: tuple[gr.Slider, ...]
    said: gr.HTML

    @property
    def defaults(self) -> dict[Any, Any]:
        """What an empty row shows."""
        return {widget: widget.value for widget in (self.text, *self.sliders, self.said)}


def wired(
    text: gr.Textbox,
    sliders: tuple[gr.Slider, ...],
    shown: Callable[[str], Sequence[float]],
    slid: Callable[..., str],
) -> Written:
    """Let both follow each other, and put the line below. shown: where the sliders stand by a text; slid: the text
    when they have come to stand elsewhere, from that before and their values.
    """
    said = gr.HTML("", elem_classes="said")
    typed = [text.input, text.blur]  # what is pasted is no input to gradio; it is seen when the box is left
    gr.on(typed, shown, text, list(sliders), **LATEST)
    gr.on([slider.input for slider in sliders], slid, [text, *sliders], text, **LATEST)
    return Written(text, sliders, said)
