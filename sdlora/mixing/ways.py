"""Two ways to apply a plan: merged into the weights, at no cost per step, or live beside them, free to change."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import Delta
from sdlora.lowrank.merged import Terms
from sdlora.mixing.live import LiveTerms
from sdlora.mixing.plan import LoraWeight, Place, place_of

Row = Mapping[str, LoraWeight]  # what is mixed into one picture of a batch, by name
_place_of = cache(place_of)


@dataclass(frozen=True, eq=False)
class Ways:
    """What is merged, and what is live: deltas with slots.

    fixed: (rows, slots), the weights of the slots, schedules aside. scheduled: of each slot, the name of the adapter
    whose schedule it follows in each row, "" for none.
    """

    merged: Mapping[str, Terms]
    live: LiveTerms
    rows: tuple[Row, ...]
    fixed: Tensor
    scheduled: tuple[str, ...]

    @property
    def moves(self) -> bool:
        """Whether the weights depend on the step."""
        followed = {row[name].schedule for row in self.rows for name in set(self.scheduled) if name in row}
        return any(schedule.level is None for schedule in followed)

    def weights(self, progress: float) -> Tensor:
        """(rows, slots) at a progress of 0 to 1."""
        table = []
        for row in self.rows:
            factors = {name: lora.schedule.at(progress) for name, lora in row.items()}
            table.append([factors.get(name, 1.0) for name in self.scheduled])
        return self.fixed * torch.tensor(table).reshape(self.fixed.shape)


def ways(rows: Sequence[Row], adapters: Mapping[str, Adapter], live: Collection[str]) -> Ways:
    """How these rows are applied: live where they differ or a schedule moves, and in the components `live`.

    adapters: by name, in the order in which their terms are added.
    """
    merged: dict[str, Terms] = {}
    beside: dict[str, tuple[tuple[Delta, int], ...]] = {}
    slots: dict[tuple[str, Place], int] = {}
    for name, adapter in adapters.items():
        settings = [row.get(name) for row in rows]
        levels: dict[Place, set[float | None]] = {}
        for path, delta in adapter.deltas.items():
            place = _place_of(path)
            if place not in levels:
                levels[place] = {_level(lora, place) for lora in settings}
            found = levels[place]
            (level, *others) = found
            if level is None or others or (level and place[0] in live):
                slot = slots.setdefault((name, place), len(slots))
                beside[path] = (*beside.get(path, ()), (delta, slot))
            elif level:
                merged[path] = (*merged.get(path, ()), (delta, level))
    fixed = [_fixed(row.get(name), place) for row in rows for name, place in slots]
    scheduled = tuple(name if place[0] == "unet" else "" for name, place in slots)
    return Ways(merged, beside, tuple(rows), torch.tensor(fixed).reshape(len(rows), len(slots)), scheduled)


def _fixed(lora: LoraWeight | None, place: Place) -> float:
    return 0.0 if lora is None else lora.at(place)


def _level(lora: LoraWeight | None, place: Place) -> float | None:
    """The weight that a place has throughout, None where it moves."""
    weight = _fixed(lora, place)
    if lora is None or not weight or place[0] != "unet":
        return weight
    level = lora.schedule.level
    return None if level is None else weight * level
