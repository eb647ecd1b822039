"""A row of the rack: a LoRA, its weight, and in a fold all that can be said of it besides."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from sdlora.formats.architectures import Architecture
from sdlora.mixing.plan import LoraWeight
from sdlora.mixing.schedule import parse_schedule
from sdlora.web import blocks, markup, timing
from sdlora.web.blocks import Presets
from sdlora.web.written import Written

WEIGHT = 0.8  # of a LoRA that has just been chosen
LARGEST = 2.0  # that a slider can show, up and down
ENCODERS = {"text_encoder": "text encoder", "text_encoder_2": "text encoder 2"}
MORE = "more"


@dataclass(frozen=True, eq=False)
class Row:
    """One LoRA's widgets. follows: whether the text encoders have the weight of the UNet; presets: of block weights."""

    box: gr.Column
    on: gr.Checkbox
    lora: gr.Dropdown
    remove: gr.Button
    weight: gr.Slider
    words: gr.HTML
    more: gr.Accordion
    follows: gr.Checkbox
    encoders: Mapping[str, gr.Slider]
    blocks: Written
    preset: gr.Dropdown
    save: gr.Button
    timing: Written
    presets: Callable[[], Presets]

    @property
    def settings(self) -> tuple[Any, ...]:
        """The widgets in the fold that say something of the LoRA."""
        return (self.follows, *self.encoders.values(), self.blocks.text, self.timing.text)

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What `lora_weight` wants the values of."""
        return (self.on, self.lora, self.weight, *self.settings)

    @property
    def defaults(self) -> dict[Any, Any]:
        """What an empty row shows."""
        own = {self.on: True, self.lora: None, self.weight: WEIGHT, self.follows: True}
        encoders = {slider: gr.update(value=WEIGHT, visible=False) for slider in self.encoders.values()}
        return {
            **own, **encoders, **self.blocks.defaults, self.preset: None, **self.timing.defaults,
            self.more: gr.update(label=MORE, open=False),
        }  # fmt: skip

    def lora_weight(self, values: Mapping[Any, Any], path: str, components: tuple[str, ...]) -> LoraWeight:
        """What the widgets' values say of the LoRA at this path. SdloraError for what cannot be.

        components: the model's.
        """
        weight = values[self.weight]
        own = {} if values[self.follows] else {name: values[slider] for name, slider in self.encoders.items()}
        return LoraWeight(
            path=path,
            unet=weight,
            text_encoder=own.get("text_encoder", weight),
            text_encoder_2=own.get("text_encoder_2") if "text_encoder_2" in components else None,
            blocks=blocks.read(values[self.blocks.text], self.presets()),
            schedule=parse_schedule(values[self.timing.text]),
        )

    def told(self, values: Mapping[Any, Any], architecture: Architecture | None) -> dict[Any, Any]:
        """What the fold shows of its values: the weights that are in force, remarks, and its label.

        architecture: the model's, None as long as no LoRA has been chosen.
        """
        there = architecture.components if architecture else ("text_encoder",)
        apart = {one for name, one in self.encoders.items() if name in there and not values[self.follows]}
        presets, listed, times = self.presets(), values[self.blocks.text].strip(), values[self.timing.text].strip()
        texts = {"blocks": blocks.preset_of(listed, presets) or listed, "schedule": times}
        changed = [f"{ENCODERS[name]} {values[one]:g}" for name, one in self.encoders.items() if one in apart]
        changed += [f"{name} {markup.cut(text)}" for name, text in texts.items() if text]
        return {
            **{slider: gr.Slider(visible=slider in apart) for slider in self.encoders.values()},
            self.blocks.said: blocks.remark(listed, architecture, presets),
            self.timing.said: timing.remark(times),
            self.more: gr.Accordion(label=" · ".join((MORE, *changed))),
        }


def build(index: int, presets: Callable[[], Presets]) -> Row:
    """Lay a row out; only the first is seen."""
    with gr.Column(visible=index == 0, elem_classes="lora-row", elem_id=f"lora-{index}") as box:
        with gr.Row(elem_classes="lora-head"):
            on = gr.Checkbox(True, label="on", container=False, scale=0, min_width=56, elem_classes="lora-on")
            lora = gr.Dropdown([], label="LoRA", show_label=False, container=False, scale=5, min_width=140)
            remove = gr.Button("✕", size="sm", scale=0, min_width=40, elem_classes="lora-remove")
        weight = _weight("weight", "lora-weight")
        words = gr.HTML("", elem_classes="lora-words", elem_id=f"words-{index}")
        with gr.Accordion(MORE, open=False, elem_classes="lora-more") as more:
            follows = gr.Checkbox(
                True, label="text encoders have the same weight", container=False, elem_classes="follows"
            )
            encoders = {name: _weight(label, name, visible=False) for name, label in ENCODERS.items()}
            written, preset, save = blocks.build(presets)
            times = timing.build()
    return Row(
        box, on, lora, remove, weight, words, more, follows, encoders, written, preset, save, times, presets
    )  # fmt: skip


def _weight(label: str, kind: str, visible: bool = True) -> gr.Slider:
    return gr.Slider(
        -LARGEST, LARGEST, value=WEIGHT, step=0.05, label=label, buttons=[], elem_classes=kind, visible=visible
    )
