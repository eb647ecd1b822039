"""The LoRAs that go into something, as people name them: files with weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import isfinite
from pathlib import Path
from typing import Any

from sdlora.errors import SdloraError, nearest
from sdlora.formats.architectures import LABELS, Architecture, known
from sdlora.formats.checkpoints import Checkpoint
from sdlora.formats.read import describe, read
from sdlora.formats.receipt import Receipt
from sdlora.formats.sources import name_of, split_path
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.blend import Weights


@dataclass(frozen=True)
class Part:
    """A file or PEFT folder, its weights in the UNet and the text encoders, and factors of blocks by pattern."""

    path: Path
    unet: float = 1.0
    text_encoder: float = 1.0
    blocks: Mapping[str, float] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """The weights, for metadata."""
        return {"unet": self.unet, "text_encoder": self.text_encoder} | ({"blocks": self.blocks} if self.blocks else {})


@dataclass(frozen=True, eq=False)
class Opened:
    """A part that is read: its adapter, receipt, and the weights that fit it."""

    part: Part
    adapter: Adapter
    receipt: Receipt
    weights: Weights


def parse_part(text: str) -> Part:
    """FILE, FILE:WEIGHT or FILE:UNET:TEXT_ENCODER; see `split_path`."""
    name, rest = split_path(text)
    weights = [_number(text, weight) for weight in rest.split(":")[1:]]
    if len(weights) > 2 or (rest and not rest.startswith(":")):
        raise SdloraError(f"{text} is not understood; write FILE:0.8 or FILE:0.8:0.5 (UNet, text encoder)")
    unet = weights[0] if weights else 1.0
    return Part(Path(name), unet, weights[1] if len(weights) > 1 else unet)


def with_blocks(parts: Sequence[Part], blocks: Sequence[str]) -> list[Part]:
    """The parts with the factors of FILE=PATTERN:FACTOR, FILE being a part's path, name, or name without the ending."""
    found = list(parts)
    for text in blocks:
        name, _, told = text.rpartition("=")
        pattern, _, factor = told.rpartition(":")
        if not (name and pattern):
            raise SdloraError(f"the factor {text} is not understood; write FILE=unet.down_blocks.*:0.5")
        names = [{str(part.path), part.path.name, name_of(part.path)} for part in parts]
        meant = [i for i, known_as in enumerate(names) if name in known_as]
        if len(meant) != 1:
            why = f"names {len(meant)} of the files" if meant else "names none of the files"
            raise SdloraError(f"the factor {text} {why}{nearest(name, [name_of(part.path) for part in parts])}")
        part = found[meant[0]]
        found[meant[0]] = replace(part, blocks={**part.blocks, pattern: _number(text, factor)})
    return found


def open_parts(parts: Sequence[Part], base: Checkpoint | None = None, partial: bool = False) -> list[Opened]:
    """Read the parts for the base's architecture, else for the one that all are made for. partial: as for `read`.

    SdloraError: none are given, one cannot be read, or they are for several architectures.
    """
    if not parts:
        raise SdloraError("no LoRA is given; name at least one file")
    architecture = base.architecture if base else shared_architecture([describe(part.path) for part in parts], partial)
    opened = []
    for part in parts:
        adapter, receipt = read(part.path, architecture, partial)
        opened.append(Opened(part, adapter, receipt, _weights(part, adapter)))
    return opened


def shared_architecture(receipts: Sequence[Receipt], partial: bool = False) -> Architecture | None:
    """The architecture that all are made for; None where the first fits none, so that reading it says why.

    partial: where there is none, the first one's will do. SdloraError: there is none.
    """
    first = receipts[0].made_for
    if not first:
        return None
    shared = [name for name in first if all(name in one.made_for for one in receipts if one.made_for)]
    if not shared and not partial:
        pairs = list(combinations([one for one in receipts if one.made_for], 2))
        # Three may share something two by two and nothing together.
        odd = next((pair for pair in pairs if not {*pair[0].made_for} & {*pair[1].made_for}), pairs[-1])
        here, there = map(_evident, odd)
        raise SdloraError(f"{here} and {there}; take LoRAs of one base model, or ask for partial ones")
    return next(one for one in known() if one.name == (shared or first)[0])


def _evident(receipt: Receipt) -> str:
    labels = " or ".join(LABELS[name] for name in receipt.made_for)
    return f"{receipt.path} is for {labels}" + (f" ({', '.join(receipt.evidence)})" if receipt.evidence else "")


def _weights(part: Part, adapter: Adapter) -> Weights:
    components = {"unet": part.unet} if adapter.component("unet") else {}
    return Weights(part.text_encoder, components, part.blocks)


def _number(text: str, weight: str) -> float:
    try:
        number = float(weight)
    except ValueError:
        number = float("nan")
    if not isfinite(number):
        raise SdloraError(f"{text}: {weight!r} is no weight; write a number, as in FILE:0.8 or FILE:0.8:0.5")
    return number
