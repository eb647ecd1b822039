"""The schedule of a row: the text box is what counts; two sliders, from and to, write into it."""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from sdlora.errors import SdloraError
from sdlora.mixing.schedule import parse_schedule, window
from sdlora.web import markup


@dataclass(frozen=True, eq=False)
class Timing:
    """The widgets. said: the error in the text, or the curve that it draws."""

    text: gr.Textbox
    start: gr.Slider
    stop: gr.Slider
    said: gr.HTML

    @property
    def defaults(self) -> dict[Any, Any]:
        """What an empty row shows."""
        return {self.text: "", self.start: 0.0, self.stop: 1.0, self.said: ""}


def build() -> Timing:
    """Lay the widgets out and wire them up."""
    with gr.Row():
        text = gr.Textbox(
            "", label="schedule", placeholder="0.2-0.8 or points 0:0, 0.5:1, 1:0", max_length=1000, min_width=120,
            elem_classes="schedule-text",
        )  # fmt: skip
        start, stop = (
            gr.Slider(
                0, 1, value=at, step=0.05, label=label, buttons=[], min_width=90, elem_classes=f"schedule-{label}"
            )
            for label, at in (("from", 0.0), ("to", 1.0))
        )
    said = gr.HTML("", elem_classes="said")
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "trigger_mode": "always_last"}
    gr.on([text.input, text.blur], shown, text, [start, stop], **quiet)  # pasting is seen when the box is left
    gr.on([start.input, stop.input], _slid, [start, stop], text, **quiet)
    return Timing(text, start, stop, said)


def shown(text: str) -> tuple[float, float]:
    """Where the sliders stand: the ends of a window; 0 and 1 for any other text."""
    try:
        points = parse_schedule(text).points
        ends = [position for position, factor in points if factor] or [0.0, 1.0]
        return (ends[0], ends[-1]) if window(ends[0], ends[-1]).points == points else (0.0, 1.0)
    except SdloraError:
        return 0.0, 1.0


def remark(text: str) -> str:
    """HTML: the error in the text, or its curve."""
    try:
        schedule = parse_schedule(text)
    except SdloraError as error:
        return markup.fault(str(error))
    points = schedule.points
    return markup.curve([(0.0, points[0][1]), *points, (1.0, points[-1][1])]) if points else ""


def _slid(start: float, stop: float) -> str:
    return "" if (start, stop) == (0, 1) else f"{start:g}-{stop:g}"
