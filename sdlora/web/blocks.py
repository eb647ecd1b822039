"""Block weights of a row: the text box is what counts; presets, and a slider for each group, write into it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr

from sdlora.errors import SdloraError
from sdlora.formats.architectures import Architecture
from sdlora.formats.block_weights import GROUPS, PRESETS, Factors, read_factors, unlisted, write_named
from sdlora.generation.notes import in_vain
from sdlora.web import markup
from sdlora.web.events import LATEST
from sdlora.web.written import Written, wired

Presets = Mapping[str, str]  # lists of factors by name

LABELS = {"BASE": "text encoders", "MID": "M"}  # of groups that are not called as they are written
HIGHEST = 2.0  # of a slider; the text takes any number


def build(presets: Callable[[], Presets]) -> tuple[Written, gr.Dropdown, gr.Button]:
    """Lay the widgets out and wire them up, but for the button that saves the text under the name in the dropdown."""
    text = gr.Textbox(
        "", label="blocks", placeholder="IN04:0.5,OUT:0 or an lbw list", max_length=1000, elem_classes="blocks-text"
    )
    with gr.Row(elem_classes="preset-row"):
        preset = gr.Dropdown(
            list(presets()), value=None, label="preset", allow_custom_value=True, min_width=90, elem_classes="preset"
        )
        save = gr.Button("Save", size="sm", scale=0, min_width=64, elem_classes="save-preset")
    with gr.Row():
        sliders = tuple(
            gr.Slider(
                0,
                HIGHEST,
                value=1,
                step=0.05,
                label=LABELS.get(name, name),
                buttons=[],
                elem_classes=f"group group-{name}",
            )
            for name in GROUPS
        )

    def filled(name: str | None) -> list[Any]:
        told = presets().get(name or "")
        return [gr.skip()] * (1 + len(sliders)) if told is None else [told, *shown(told, presets())]

    def named(told: str, name: str | None) -> Any:
        new = name and name not in presets()  # typed in, to be saved under
        return gr.skip() if new else preset_of(told, presets(), name)

    written = wired(text, sliders, lambda told: shown(told, presets()), lambda told, *at: slid(told, at, presets()))
    preset.input(filled, preset, [text, *sliders], **LATEST)
    text.change(named, [text, preset], preset, **LATEST)
    return written, preset, save


def preset_of(text: str, presets: Presets = PRESETS, name: str | None = None) -> str | None:
    """The name of the preset that has the factors of a text; this one if several have them."""
    factors = _factors(text, presets)
    alike = [one for one in presets if factors and _factors(one, presets) == factors]
    return name if name in alike else next(iter(alike), None)


def shown(text: str, presets: Presets = PRESETS) -> list[float]:
    """Where the sliders stand: the mean factor of each group's blocks; 1 if the text cannot be read."""
    factors = dict(_factors(text, presets))
    means = (sum(factors.get(block, 1.0) for block in group) / len(group) for group in GROUPS.values())
    return [min(max(round(mean, 2), 0.0), HIGHEST) for mean in means]


def slid(text: str, at: Sequence[float], presets: Presets = PRESETS) -> str:
    """The text when the sliders have come to stand there: groups whose slider has moved get that factor throughout."""
    factors = dict(_factors(text, presets))
    for group, before, now in zip(GROUPS.values(), shown(text, presets), at, strict=True):
        if now != before:
            factors |= dict.fromkeys(group, float(now))
    return write_named(tuple(factors.items()))


def read(text: str, presets: Presets = PRESETS) -> Factors:
    """The factors of a text; none for no text."""
    return read_factors(text, presets) if text.strip() else ()


def remark(text: str, architecture: Architecture | None, presets: Presets = PRESETS) -> str:
    """A line of HTML: the error in the text, or which blocks it switches off unsaid or names in vain."""
    try:
        factors = read(text, presets)
    except SdloraError as error:
        return markup.fault(str(error))
    if not factors or architecture is None:
        return ""
    told = [("off, as the list has no number for them", unlisted(text, architecture, presets))]
    if ":" in text:  # a list may well mean blocks that only other models have
        told.append((f"no effect, as {architecture.label} has no such block", in_vain(factors, architecture)))
    line = "; ".join(f"{what}: {', '.join(blocks)}" for what, blocks in told if blocks)
    return markup.note(line) if line else ""


def _factors(text: str, presets: Presets) -> Factors:
    try:
        return read(text, presets)
    except SdloraError:
        return ()
