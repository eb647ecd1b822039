"""Know before you mix: advice about the rack's LoRAs, and the weights at which they are of one size. An offer only."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from sdlora.errors import SdloraError
from sdlora.formats.checkpoints import Checkpoint, open_checkpoint
from sdlora.models.load import source_of
from sdlora.web import markup
from sdlora.web.events import QUIET, toasted
from sdlora.web.rack import Rack
from sdlora.web.row import LARGEST
from sdlora.web.studio import Studio
from sdlora.workbench.base_norms import default_cache
from sdlora.workbench.conflicts import Conflicts, at_present_size, conflicts


@dataclass(frozen=True, eq=False)
class Offer:
    """The widgets, unseen while nothing is offered. weights: what is offered, by row."""

    box: gr.Column
    told: gr.HTML
    apply: gr.Button
    weights: gr.State

    @property
    def gone(self) -> dict[Any, Any]:
        """What they show when there is no offer, or it is taken."""
        return {self.box: gr.update(visible=False), self.weights: {}}


def build(rack: Rack) -> None:
    """Lay the offer out at its place in the rack, and wire it to the rack's button."""
    with rack.offer as box:
        told = gr.HTML("", elem_classes="offer-told")
        with gr.Row(elem_classes="offer-buttons"):
            apply = gr.Button("Apply", size="sm", min_width=80, elem_id="apply-equalised")
            leave = gr.Button("Leave it", size="sm", min_width=80, elem_id="leave-equalised")
    offer = Offer(box, told, apply, gr.State({}))
    widgets = list(vars(offer).values())

    def ask(values: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
        yield {box: gr.update(visible=True), told: markup.note("comparing ..."), apply: gr.update(visible=False)}
        try:
            with toasted():
                yield _asked(rack, offer, values)
        except gr.Error:
            yield offer.gone
            raise

    def take(weights: Mapping[int, float]) -> dict[Any, Any]:
        return {**offer.gone, **{rack.rows[i].weight: weight for i, weight in weights.items()}}

    rack.equalise.click(ask, rack.inputs, widgets, trigger_mode="once", **QUIET)
    apply.click(take, offer.weights, [*widgets, *(row.weight for row in rack.rows)], **QUIET)
    ends = [leave.click, rack.model.change, *(row.lora.change for row in rack.rows)]
    gr.on(ends, lambda: offer.gone, None, widgets, **QUIET)


def _asked(rack: Rack, offer: Offer, values: Mapping[Any, Any]) -> dict[Any, Any]:
    held = rack.held(values)
    if len(held) < 2:
        raise SdloraError("the rack has no two LoRAs that are on; put in those that you want to compare")
    found = conflicts(list(held.values()), _base(rack.studio, values[rack.model]), cache=default_cache())
    now = [values[rack.rows[i].weight] for i in held]
    weights = dict(zip(held, at_present_size(found.equalised, now, LARGEST), strict=True)) if found.equalised else {}
    return {
        offer.told: _told(found, list(weights.values())),
        offer.apply: gr.update(visible=bool(weights)),
        offer.weights: weights,
    }


def _told(found: Conflicts, weights: list[float]) -> str:
    """A line of advice for each pair, and the weights or why there are none."""
    lines = [pair.advice for pair in found.pairs]
    if weights:
        named = ", ".join(f"{one.label} {weight:g}" for one, weight in zip(found.adapters, weights, strict=True))
        lines.append(f"of one size at the weights {named}")
    else:
        lines.append(f"no equalised weights: {found.why_not}")
    return "".join(map(markup.note, lines))


def _base(studio: Studio, model: str) -> Checkpoint | None:
    """The model to tell sizes against, where its weights lie on this machine."""
    source = source_of(studio.mixer(model).pipeline, model)
    return open_checkpoint(source) if source else None
