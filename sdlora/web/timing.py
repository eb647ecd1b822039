"""The schedule of a row: the text box is what counts; two sliders, from and to, write into it."""

import gradio as gr

from sdlora.errors import SdloraError
from sdlora.mixing.schedule import parse_schedule, window
from sdlora.web import markup
from sdlora.web.written import Written, wired


def build() -> Written:
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
    return wired(text, (start, stop), shown, slid)


def shown(text: str) -> tuple[float, float]:
    """Where the sliders stand: the ends of a window; 0 and 1 for any other text."""
    try:
        points = parse_schedule(text).points
        ends = [position for position, factor in points if factor] or [0.0, 1.0]
        return (ends[0], ends[-1]) if window(ends[0], ends[-1]).points == points else (0.0, 1.0)
    except SdloraError:
        return 0.0, 1.0


def slid(_: str, start: float, stop: float) -> str:
    """The text when the sliders have come to stand there, whatever it was."""
    return "" if (start, stop) == (0, 1) else f"{start:g}-{stop:g}"


def remark(text: str) -> str:
    """HTML: the error in the text, or its curve."""
    try:
        schedule = parse_schedule(text)
    except SdloraError as error:
        return markup.fault(str(error))
    points = schedule.points
    return markup.curve([(0.0, points[0][1]), *points, (1.0, points[-1][1])]) if points else ""
