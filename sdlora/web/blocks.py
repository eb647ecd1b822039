"""Block weights of a row: the text box is what counts; presets, and a slider for each group, write into it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from sdlora.errors import SdloraError
from sdlora.formats.architectures import Architecture
from sdlora.formats.block_weights import BLOCKS, PRESETS, Factors, absent, read_factors, unlisted, write_named
from sdlora.web import markup

# The name that a group has in the text, what the names of its blocks begin with, and its label.
GROUPS = (("BASE", "BASE", "text encoders"), ("IN", "IN", "IN"), ("MID", "M0", "M"), ("OUT", "OUT", "OUT"))
MEMBERS = tuple(tuple(block for block in BLOCKS if block.startswith(begins)) for _, begins, _ in GROUPS)
HIGHEST = 2.0  # of a slider; the text takes any number


@dataclass(frozen=True, eq=False)
class Blocks:
    """The widgets. said: what of the text cannot be read or has no effect."""

    text: gr.Textbox
    preset: gr.Dropdown
    sliders: tuple[gr.Slider, ...]
    said: gr.HTML

    @property
    def defaults(self) -> dict[Any, Any]:
        """What an empty row shows."""
        return {self.text: "", self.preset: None, **dict.fromkeys(self.sliders, 1.0), self.said: ""}


def build() -> Blocks:
    """Lay the widgets out and wire them up."""
    with gr.Row():
        text = gr.Textbox(
            "", label="blocks", placeholder="IN04:0.5,OUT:0 or an lbw list", max_length=1000, min_width=120,
            elem_classes="blocks-text",
        )  # fmt: skip
        preset = gr.Dropdown(list(PRESETS), value=None, label="preset", min_width=90, elem_classes="preset")
    with gr.Row():
        sliders = tuple(
            gr.Slider(0, HIGHEST, value=1, step=0.05, label=label, buttons=[], elem_classes=f"group group-{name}")
            for name, _, label in GROUPS
        )
    said = gr.HTML("", elem_classes="said")
    _wire(text, preset, sliders)
    return Blocks(text, preset, sliders, said)


def _wire(text: gr.Textbox, preset: gr.Dropdown, sliders: Sequence[gr.Slider]) -> None:
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "trigger_mode": "always_last"}

    def filled(name: str | None) -> list[Any]:
        told = PRESETS.get(name or "", "")
        return [told, *shown(told)]

    typed = [text.input, text.blur]  # what is pasted is no input to gradio; it is seen when the box is left
    gr.on(typed, lambda told: [preset_of(told), *shown(told)], text, [preset, *sliders], **quiet)
    preset.select(filled, preset, [text, *sliders], **quiet)
    moved = [slider.input for slider in sliders]
    gr.on(moved, lambda told, *at: [slid(told, at), None], [text, *sliders], [text, preset], **quiet)


def preset_of(text: str) -> str | None:
    """The name of the preset that a text is, by name or list."""
    return next((name for name, told in PRESETS.items() if text.strip() in (name, told)), None)


def shown(text: str) -> list[float]:
    """Where the sliders stand: the mean factor of each group's blocks; 1 if the text cannot be read."""
    factors = dict(_factors(text))
    means = (sum(factors.get(block, 1.0) for block in group) / len(group) for group in MEMBERS)
    return [min(max(round(mean, 2), 0.0), HIGHEST) for mean in means]


def slid(text: str, at: Sequence[float]) -> str:
    """The text when the sliders have come to stand there: groups whose slider has moved get that factor throughout."""
    factors = dict(_factors(text))
    for group, before, now in zip(MEMBERS, shown(text), at, strict=True):
        if now != before:
            factors |= dict.fromkeys(group, float(now))
    return _spelled(factors)


def read(text: str) -> Factors:
    """The factors of a text; none for no text."""
    return read_factors(text) if text.strip() else ()


def remark(text: str, architecture: Architecture | None) -> str:
    """A line of HTML: the error in the text, or which blocks it switches off unsaid or names in vain."""
    try:
        factors = read(text)
    except SdloraError as error:
        return markup.fault(str(error))
    if not factors or architecture is None:
        return ""
    told = [("off, as the list has no number for them", unlisted(text, architecture))]
    if ":" in text:  # a group or a list may well mean blocks that only other models have, a name may not
        named = tuple(block for block in absent(factors, architecture) if block in text.upper())
        told.append((f"no effect, as {architecture.label} has no such block", named))
    line = "; ".join(f"{what}: {', '.join(blocks)}" for what, blocks in told if blocks)
    return markup.note(line) if line else ""


def _factors(text: str) -> Factors:
    try:
        return read(text)
    except SdloraError:
        return ()


def _spelled(factors: dict[str, float]) -> str:
    """Groups by their names where all of their blocks agree, else block by block."""
    parts = []
    for (name, _, _), group in zip(GROUPS, MEMBERS, strict=True):
        values = {factors.get(block, 1.0) for block in group}
        told = write_named(tuple((block, factors[block]) for block in group if block in factors))
        parts.append(told if len(values) > 1 else "".join(f"{name}:{value:g}" for value in values if value != 1))
    return ",".join(filter(None, parts))
