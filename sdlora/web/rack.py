"""The rack: rows of LoRAs, each with an on/off box, a weight slider and its trigger words."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from sdlora.formats.read import read
from sdlora.generation.job import LoraWeight
from sdlora.web import markup
from sdlora.web.studio import Studio
from sdlora.web.toast import toasted

ROWS = 8
CHOOSE = "Choose a LoRA."
EMPTY = "No LoRA here yet: train one with `sdlora train`, or upload a file."


@dataclass(frozen=True, eq=False)
class Row:
    """One LoRA's widgets."""

    box: gr.Column
    on: gr.Checkbox
    lora: gr.Dropdown
    weight: gr.Slider
    remove: gr.Button
    words: gr.HTML


@dataclass(frozen=True, eq=False)
class Rack:
    """All rows. Those that are not shown hold no LoRA; shown: the indices of those that are."""

    studio: Studio
    model: gr.Dropdown
    rows: tuple[Row, ...]
    shown: gr.State
    add: gr.Button
    refresh: gr.Button
    upload: gr.UploadButton

    @property
    def inputs(self) -> set[Any]:
        return {widget for row in self.rows for widget in (row.on, row.lora, row.weight)}

    def loras(self, values: Mapping[Any, Any]) -> tuple[LoraWeight, ...]:
        """What a job gets of it: the rows that are on and hold a LoRA."""
        return tuple(
            LoraWeight(
                path=str(self.studio.library.path(values[row.lora])),
                unet=values[row.weight],
                text_encoder=values[row.weight],
            )
            for row in self.rows
            if values[row.on] and values[row.lora]
        )


def build(studio: Studio, model: gr.Dropdown) -> Rack:
    """Lay the rack out and wire it up. model: the widget that holds the base model's name."""
    rows = tuple(_row(i) for i in range(ROWS))
    with gr.Row(elem_classes="rack-buttons"):
        add = gr.Button("Add a LoRA", size="sm", min_width=80, elem_id="add-lora")
        upload = gr.UploadButton("Upload", size="sm", min_width=80, file_types=[".safetensors"], elem_id="upload-lora")
        refresh = gr.Button("Refresh list", size="sm", min_width=80, elem_id="refresh")
    rack = Rack(studio, model, rows, gr.State((0,)), add, refresh, upload)
    _wire(rack)
    return rack


def _row(index: int) -> Row:
    with gr.Column(visible=index == 0, elem_classes="lora-row", elem_id=f"lora-{index}") as box:
        with gr.Row(elem_classes="lora-head"):
            on = gr.Checkbox(True, label="on", container=False, scale=0, min_width=56, elem_classes="lora-on")
            lora = gr.Dropdown([], label="LoRA", show_label=False, container=False, scale=5, min_width=140)
            remove = gr.Button("✕", size="sm", scale=0, min_width=40, elem_classes="lora-remove")
        weight = gr.Slider(-2, 2, value=0.8, step=0.05, label="weight", buttons=[], elem_classes="lora-weight")
        words = gr.HTML("", elem_classes="lora-words", elem_id=f"words-{index}")
    return Row(box, on, lora, weight, remove, words)


def _wire(rack: Rack) -> None:
    lists, boxes = [row.lora for row in rack.rows], [row.box for row in rack.rows]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

    def offer() -> list[Any]:
        rack.studio.library.scan()
        return _choices(rack)

    def add(shown: tuple[int, ...]) -> list[Any]:
        free = next((i for i in range(ROWS) if i not in shown), None)
        if free is None:
            gr.Info(f"The rack has {ROWS} rows; take one out first.")
        return _show(shown if free is None else (*shown, free))

    def upload(path: str, shown: tuple[int, ...], *held: str | None) -> list[Any]:
        with toasted():
            entry = rack.studio.library.upload(Path(path))
        place = next((i for i in range(ROWS) if not held[i]), None)
        if place is None:
            gr.Info(f"The rack's {ROWS} rows are taken; choose the file in one of them.")
            return [*_show(shown), *_choices(rack)]
        lists = _choices(rack)
        lists[place] = gr.Dropdown(choices=_pairs(rack), value=entry.id)
        return [*_show((*shown, place)), *lists]

    def describe(lora: str | None, model: str) -> str:
        if not lora:
            return _invitation(rack)
        with toasted():
            _, receipt = read(rack.studio.library.path(lora), rack.studio.mixer(model).architecture)
        return markup.trigger_words(receipt.trigger_words, receipt.summary())

    rack.refresh.click(offer, None, lists, **quiet)
    rack.add.click(add, rack.shown, [rack.shown, *boxes], **quiet)
    rack.upload.upload(upload, [rack.upload, rack.shown, *lists], [rack.shown, *boxes, *lists], **quiet)
    for index, row in enumerate(rack.rows):
        gr.on([row.lora.change, rack.model.change], describe, [row.lora, rack.model], row.words, **quiet)
        row.remove.click(
            lambda shown, index=index: [*_show(tuple(i for i in shown if i != index)), None, 0.8, True],
            rack.shown,
            [rack.shown, *boxes, row.lora, row.weight, row.on],
            **quiet,
        )


def on_load(rack: Rack) -> list[Any]:
    """What a page that opens shows: the library as it is now."""
    rack.studio.library.scan()
    return [*_choices(rack), *(_invitation(rack) for _ in rack.rows)]


def _invitation(rack: Rack) -> str:
    return markup.note(CHOOSE if rack.studio.library.entries else EMPTY)


def _pairs(rack: Rack) -> list[tuple[str, str]]:
    return [(entry.label, entry.id) for entry in rack.studio.library.entries]


def _choices(rack: Rack) -> list[Any]:
    return [gr.Dropdown(choices=_pairs(rack)) for _ in rack.rows]


def _show(shown: tuple[int, ...]) -> list[Any]:
    shown = tuple(dict.fromkeys(shown))
    return [shown, *(gr.Column(visible=i in shown) for i in range(ROWS))]
