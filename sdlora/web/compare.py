"""Compare weights: a ladder of one LoRA's weights, or a grid of two LoRAs', in one batched run and on one sheet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from sdlora.errors import SdloraError
from sdlora.formats.sources import name_of
from sdlora.generation.composition import grid, ladder
from sdlora.generation.job import Job
from sdlora.generation.render import Picture
from sdlora.generation.sheet import compared
from sdlora.web.events import QUIET
from sdlora.web.rack import Rack

KINDS = [("ladder of one LoRA", "ladder"), ("grid of two LoRAs", "grid")]
# Label, value, bounds and step of an axis' numbers.
NUMBERS = {
    "start": ("from", 0.0, -4, 4, 0.05),
    "stop": ("to", 1.25, -4, 4, 0.05),
    "count": ("weights", 6, 2, 12, 1),
}


@dataclass(frozen=True, eq=False)
class Axis:
    """A LoRA, and its weights: `count` of them from `start` to `stop`. lora: the number of its row."""

    box: gr.Row
    lora: gr.Dropdown
    start: gr.Number
    stop: gr.Number
    count: gr.Number

    @property
    def inputs(self) -> tuple[Any, ...]:
        return (self.lora, self.start, self.stop, self.count)

    def weights(self, values: Mapping[Any, Any]) -> tuple[float, ...]:
        """Evenly spread, as short as numbers can be."""
        start, stop, count = (values[widget] for widget in (self.start, self.stop, self.count))
        if start is None or stop is None or count is None:
            raise SdloraError("weights to compare want three numbers: from, to, and how many")
        count = round(count)
        return tuple(round(start + (stop - start) * i / (count - 1), 4) for i in range(count))


@dataclass(frozen=True)
class Comparison:
    """Jobs, sheet by sheet and row by row: `columns` a row, `cells` a sheet.

    first, second: the numbers of the LoRAs that are compared, second -1 for a ladder.
    """

    jobs: tuple[Job, ...]
    columns: int
    cells: int
    first: int
    second: int

    @property
    def told(self) -> str:
        """ "style 0 to 1.25 × zib 0 to 1"."""
        first, last = self.jobs[0].loras, self.jobs[-1].loras
        places = (self.first, self.second) if self.second >= 0 else (self.first,)
        return " × ".join(f"{name_of(Path(first[i].path))} {first[i].unet:g} to {last[i].unet:g}" for i in places)

    def sheet(self, pictures: Sequence[Picture]) -> Image.Image:
        """Of the pictures of one seed."""
        made = [(picture.job, picture.image) for picture in pictures]
        return compared(made, self.columns, self.first, self.second)


@dataclass(frozen=True, eq=False)
class Compare:
    """The fold's widgets."""

    kind: gr.Radio
    axes: tuple[Axis, Axis]
    go: gr.Button

    @property
    def inputs(self) -> set[Any]:
        """What `comparison` wants the values of."""
        return {self.kind, *(widget for axis in self.axes for widget in axis.inputs)}

    def comparison(self, values: Mapping[Any, Any], job: Job, rack: Rack) -> Comparison:
        """What the widgets' values make of a job, once for each of its seeds. SdloraError where no LoRA is chosen."""
        axes = self.axes if values[self.kind] == "grid" else self.axes[:1]
        places = [_place(values[axis.lora], job, rack, values) for axis in axes]
        if len(set(places)) < len(places):
            raise SdloraError("a grid is of two LoRAs, and both axes have the same one; choose another for one of them")
        along = [axis.weights(values) for axis in axes]
        one, other = (places[0], along[0]), (places[1], along[1]) if len(axes) > 1 else None
        seeds = [replace(job, seed=job.seed + i, count=1) for i in range(job.count)]
        sheets = [grid(each, *one, *other) if other else ladder(each, *one) for each in seeds]
        jobs = tuple(job for sheet in sheets for job in sheet)
        return Comparison(jobs, len(along[0]), len(sheets[0]), places[0], places[1] if other else -1)


def build(rack: Rack) -> Compare:
    """Lay the fold out and wire it up."""
    with gr.Accordion("Compare weights", open=False, elem_id="compare", elem_classes="fold"):
        kind = gr.Radio(KINDS, value="ladder", show_label=False, container=False, elem_id="compare-kind")
        axes = (_axis("a"), _axis("b", visible=False))
        go = gr.Button("Compare", size="sm", elem_id="compare-go")
    kind.change(lambda chosen: gr.Row(visible=chosen == "grid"), kind, axes[1].box, **QUIET)
    lists = [axis.lora for axis in axes]
    rows = [row.lora for row in rack.rows]

    def offer(*values: Any) -> list[Any]:
        held, chosen = values[: len(rows)], values[len(rows) :]
        names = {entry.id: entry.label for entry in rack.studio.library.entries}
        pairs = [(names[lora], i) for i, lora in enumerate(held) if lora in names]
        return [gr.Dropdown(choices=pairs, value=_kept(at, pairs, i)) for i, at in enumerate(chosen)]

    gr.on([lora.change for lora in rows], offer, [*rows, *lists], lists, **QUIET)
    return Compare(kind, axes, go)


def _axis(name: str, visible: bool = True) -> Axis:
    with gr.Row(visible=visible, elem_classes="axis", elem_id=f"axis-{name}") as box:
        label = "LoRA" if visible else "LoRA, from row to row"
        lora = gr.Dropdown([], label=label, scale=3, min_width=140, elem_classes="axis-lora")
        start, stop, count = (
            gr.Number(
                value, label=label, minimum=low, maximum=high, step=step, min_width=64, elem_classes=f"axis-{name}"
            )
            for name, (label, value, low, high, step) in NUMBERS.items()
        )
    return Axis(box, lora, start, stop, count)


def _kept(at: int | None, pairs: Sequence[tuple[str, int]], axis: int) -> int | None:
    """The row that an axis has now, if it still holds a LoRA; else the first, or for the second axis the second."""
    held = [place for _, place in pairs]
    return at if at in held else next(iter(held[axis:]), None)


def _place(row: int | None, job: Job, rack: Rack, values: Mapping[Any, Any]) -> int:
    """The number in the job of the LoRA in a row."""
    if row is None:
        raise SdloraError("no LoRA is chosen to compare; put one into the rack, and choose it under Compare weights")
    held = rack.held(values)
    if row not in held:
        raise SdloraError(f"the LoRA to compare, in row {row + 1}, is off; switch it on")
    return [lora.path for lora in job.loras].index(str(held[row]))
