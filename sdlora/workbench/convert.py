"""Converting: a LoRA of any kind, written anew in another naming, dtype or law."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import torch

from sdlora.errors import SdloraError
from sdlora.formats.architectures import Architecture, known
from sdlora.formats.checkpoints import Checkpoint
from sdlora.formats.read import read
from sdlora.formats.write import dtype_of, write
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import Delta, Full, LowRank
from sdlora.lowrank.laws.delta import Shape
from sdlora.lowrank.truncation import Keep, Kept, as_low_rank
from sdlora.workbench.bases import base_of
from sdlora.workbench.output import Step, Written, lasting, refuse_place

SOURCE, SOURCE_HASH = "sdlora_converted_from", "sdlora_converted_from_sha256"


def convert(
    source: Path,
    output: Path,
    naming: str = "kohya",
    dtype: torch.dtype | None = None,
    to_lora: Keep | None = None,
    base: Checkpoint | None = None,
    overwrite: bool = False,
    partial: bool = False,
) -> Generator[Step, None, Written]:
    """Read a LoRA and write it in a naming (see `write`); yields after each change that is made plain LoRA.

    dtype: None for that of the source, if all its factors share one that can be written, else float32.
    to_lora: make changes of other laws plain LoRA, at the ranks that it keeps; plain LoRA stays as it is. What that
    keeps is told.
    base: the model, needed then for laws that depend on its weights. partial: as for `read`. What does not apply is in
    the receipt and is not written. Source and output may be the same, given `overwrite`.
    SdloraError: the output is in the way; what `read` and `write` refuse; laws that need a base where none is given.
    """
    refuse_place(output, naming, overwrite)
    architecture = base.architecture if base else None
    adapter, receipt = read(source, architecture, partial)
    dtype = dtype or dtype_of(adapter)
    kept: dict[str, Kept] = {}
    if to_lora:
        architecture = architecture or next(one for one in known() if one.name == receipt.made_for[0])
        adapter, kept = yield from plain(adapter, architecture, to_lora, base)
    metadata = lasting(adapter.metadata)
    if kept:  # they tell of the law that was
        metadata.pop("ss_network_args", None)
    metadata |= {SOURCE: receipt.path.name, SOURCE_HASH: receipt.sha256}
    write(replace(adapter, metadata=metadata), output, naming, dtype, overwrite)
    return Written((receipt,), kept)


def plain(
    adapter: Adapter, architecture: Architecture, keep: Keep, base: Checkpoint | None = None
) -> Generator[Step, None, tuple[Adapter, dict[str, Kept]]]:
    """The adapter with every change of a weight as plain LoRA, and what those kept that were not; yields after each.

    Norms and biases have no low-rank form; changes of them that depend on the base are written out whole.
    SdloraError: a law needs the base's weights, and none are given or it has none of that name.
    """
    deltas: dict[str, Delta] = {}
    kept = {}
    for parameter, delta in adapter.deltas.items():
        shape = architecture.shape_of(parameter)
        assert shape is not None  # `read` has fitted it
        try:
            deltas[parameter], lost = _plain(parameter, delta, shape, keep, base)
        except SdloraError as error:
            raise SdloraError(f"{parameter}: {error}") from error
        if lost:
            kept[parameter] = lost
        yield Step(len(deltas), len(adapter.deltas), parameter, lost)
    return replace(adapter, deltas=deltas), kept


def _plain(
    parameter: str, delta: Delta, shape: Shape, keep: Keep, base: Checkpoint | None
) -> tuple[Delta, Kept | None]:
    if isinstance(delta, LowRank) and delta.mid is None:
        return delta, None
    if len(shape) > 1:
        return as_low_rank(delta, shape, keep, base_of(delta, parameter, base))
    weight = None if base is None else base_of(delta, parameter, base)
    return (delta if weight is None else Full(delta.weight(weight))), None
