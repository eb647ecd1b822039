"""The rack: rows of LoRAs, and how they come together."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from sdlora.errors import SdloraError
from sdlora.formats.architectures import Architecture
from sdlora.formats.read import read
from sdlora.mixing.plan import LoraWeight
from sdlora.web import blocks, markup
from sdlora.web import row as rows_
from sdlora.web.events import LATEST, QUIET, toasted, warned
from sdlora.web.row import Row
from sdlora.web.studio import Studio

ROWS = 8
CHOOSE = "Choose a LoRA."
EMPTY = "No LoRA here yet: train one with `sdlora train`, or upload a file."
TOGETHER = {
    "sum": "all in each step",
    "switch": "one after the other, in turns",
    "composite": "each by itself, then the mean of what they predict",
}


@dataclass(frozen=True, eq=False)
class Rack:
    """All rows. Those that are not shown hold no LoRA; shown: the indices of those that are.

    offer: the place under the rows for what comes of `equalise`.
    """

    studio: Studio
    model: gr.Dropdown
    rows: tuple[Row, ...]
    shown: gr.State
    add: gr.Button
    refresh: gr.Button
    upload: gr.UploadButton
    equalise: gr.Button
    offer: gr.Column
    compose: gr.Radio
    switch_every: gr.Slider

    @property
    def inputs(self) -> set[Any]:
        """What `settings` wants the values of."""
        return {self.model, self.compose, self.switch_every, *(widget for row in self.rows for widget in row.inputs)}

    def held(self, values: Mapping[Any, Any]) -> dict[int, Path]:
        """The files of the rows that are on and hold a LoRA."""
        library = self.studio.library
        on = ((i, values[row.lora]) for i, row in enumerate(self.rows) if values[row.on])
        return {i: library.path(lora) for i, lora in on if lora}

    def settings(self, values: Mapping[Any, Any]) -> dict[str, Any]:
        """What a job gets of it: LoRAs, and how they come together. The model is loaded if it is not yet."""
        held = self.held(values)
        components = self.studio.mixer(values[self.model]).architecture.components if held else ()
        loras: tuple[LoraWeight, ...] = tuple(
            self.rows[i].lora_weight(values, str(path), components) for i, path in held.items()
        )
        return {"loras": loras, "compose": values[self.compose], "switch_every": values[self.switch_every]}


def build(studio: Studio, model: gr.Dropdown) -> Rack:
    """Lay the rack out and wire it up. model: the widget that holds the base model's name."""
    rows = tuple(rows_.build(i, lambda: studio.library.presets) for i in range(ROWS))
    with gr.Row(elem_classes="rack-buttons"):
        add = gr.Button("Add a LoRA", size="sm", min_width=80, elem_id="add-lora")
        upload = gr.UploadButton("Upload", size="sm", min_width=80, file_types=[".safetensors"], elem_id="upload-lora")
        refresh = gr.Button("Refresh list", size="sm", min_width=80, elem_id="refresh")
        equalise = gr.Button("Equalise", size="sm", min_width=80, elem_id="equalise")
    offer = gr.Column(visible=False, elem_classes="offer", elem_id="offer")
    with gr.Group():
        compose = gr.Radio(
            list(TOGETHER), value="sum", label="How they come together", info=TOGETHER["sum"], elem_id="compose"
        )
        switch_every = gr.Slider(
            1, 20, value=1, step=1, label="steps each", buttons=[], visible=False, elem_id="switch-every"
        )
    rack = Rack(studio, model, rows, gr.State((0,)), add, refresh, upload, equalise, offer, compose, switch_every)
    _wire(rack)
    for row in rows:
        _wire_row(rack, row)
    return rack


def on_load(rack: Rack) -> list[Any]:
    """What a page that opens shows: the library as it is now."""
    return [*_found(rack), *(_invitation(rack) for _ in rack.rows)]


def _wire(rack: Rack) -> None:
    lists, boxes, presets = ([getattr(row, name) for row in rack.rows] for name in ("lora", "box", "preset"))

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

    rack.refresh.click(lambda: _found(rack), None, [*lists, *presets], **QUIET)
    rack.add.click(add, rack.shown, [rack.shown, *boxes], **QUIET)
    rack.upload.upload(upload, [rack.upload, rack.shown, *lists], [rack.shown, *boxes, *lists], **QUIET)
    rack.compose.change(
        lambda chosen: [gr.Radio(info=TOGETHER[chosen]), gr.Slider(visible=chosen == "switch")],
        rack.compose,
        [rack.compose, rack.switch_every],
        **QUIET,
    )


def _wire_row(rack: Rack, row: Row) -> None:
    index = rack.rows.index(row)
    told = {*row.settings, row.lora, row.weight, rack.model}
    shows = [*row.encoders.values(), row.blocks.said, row.timing.said, row.more]

    def describe(lora: str | None, model: str) -> str:
        if not lora:
            return _invitation(rack)
        try:
            _, receipt = read(rack.studio.library.path(lora), rack.studio.mixer(model).architecture)
        except SdloraError as error:
            return markup.fault(str(error))
        return markup.trigger_words(receipt.trigger_words, receipt.summary())

    def tell(values: dict[Any, Any]) -> dict[Any, Any]:
        return row.told(values, _architecture(rack, values, row))

    def save(name: str | None, text: str) -> list[Any]:
        with toasted():
            library = rack.studio.library
            library.save_preset(name or "", blocks.read(text, library.presets))
        return _presets(rack)

    def remove(shown: tuple[int, ...]) -> dict[Any, Any]:
        left = tuple(i for i in shown if i != index)
        boxes = {other.box: gr.Column(visible=i in left) for i, other in enumerate(rack.rows)}
        return {rack.shown: left, **boxes, **row.defaults}

    chosen = gr.on([row.lora.change, rack.model.change], describe, [row.lora, rack.model], row.words, **QUIET)
    in_order = {"concurrency_id": f"tell-{index}"}  # else what is told late could be of an earlier state
    chosen.then(tell, told, shows, **QUIET, **in_order)
    encoders = list(row.encoders.values())  # those that no longer follow the weight begin where it stands
    begun = row.follows.input(lambda weight: [weight] * len(encoders), row.weight, encoders, **QUIET)
    begun.then(tell, told, shows, **QUIET, **in_order)
    gr.on([widget.change for widget in row.settings[1:]], tell, told, shows, **LATEST, **in_order)
    saved = row.save.click(save, [row.preset, row.blocks.text], [one.preset for one in rack.rows], **QUIET)
    saved.then(tell, told, shows, **QUIET, **in_order)
    row.remove.click(remove, rack.shown, [rack.shown, *(one.box for one in rack.rows), *row.defaults], **QUIET)


def _architecture(rack: Rack, values: Mapping[Any, Any], row: Row) -> Architecture | None:
    """The model's, once a LoRA has been chosen: until then nothing is loaded."""
    mixer = rack.studio.loaded(values[rack.model]) if values[row.lora] else None
    return mixer.architecture if mixer else None


def _invitation(rack: Rack) -> str:
    return markup.note(CHOOSE if rack.studio.library.entries else EMPTY)


def _pairs(rack: Rack) -> list[tuple[str, str]]:
    return [(entry.label, entry.id) for entry in rack.studio.library.entries]


def _choices(rack: Rack) -> list[Any]:
    return [gr.Dropdown(choices=_pairs(rack)) for _ in rack.rows]


def _presets(rack: Rack) -> list[Any]:
    return [gr.Dropdown(choices=list(rack.studio.library.presets)) for _ in rack.rows]


def _found(rack: Rack) -> list[Any]:
    """What the rows have to choose from, looked for anew."""
    with warned():
        rack.studio.library.scan()
    return [*_choices(rack), *_presets(rack)]


def _show(shown: tuple[int, ...]) -> list[Any]:
    shown = tuple(dict.fromkeys(shown))
    return [shown, *(gr.Column(visible=i in shown) for i in range(ROWS))]
