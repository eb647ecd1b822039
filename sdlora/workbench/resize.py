"""Resizing a file: the same LoRA with fewer ranks."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from sdlora.formats.checkpoints import Checkpoint
from sdlora.formats.read import read
from sdlora.formats.write import dtype_of, write
from sdlora.lowrank.laws import Delta
from sdlora.lowrank.resize import resized
from sdlora.lowrank.truncation import Keep, Kept
from sdlora.workbench.bases import bases_of
from sdlora.workbench.output import Step, Written, lasting, refuse_place

RECORD = "sdlora.resized"


def resize_file(
    source: Path,
    output: Path,
    keep: Keep,
    base: Checkpoint | None = None,
    naming: str = "kohya",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    partial: bool = False,
) -> Generator[Step, None, Written]:
    """Write a LoRA with the ranks that `keep` leaves; yields after each parameter.

    base: the model, needed for laws that depend on its weights. dtype: None for the source's, or float32 if it has
    several. partial: as for `read`. Metadata stays, with a record of the source's hash. Output and source may be the
    same, given `overwrite`.
    SdloraError: the output is in the way, or the file cannot be read or resized.
    """
    refuse_place(output, naming, overwrite)
    adapter, receipt = read(source, base.architecture if base else None, partial)
    deltas: dict[str, Delta] = {}
    kept: dict[str, Kept] = {}
    for done, outcome in enumerate(resized(adapter, keep, bases_of(base)), 1):
        deltas[outcome.path] = outcome.delta
        if outcome.kept is not None:
            kept[outcome.path] = outcome.kept
        yield Step(done, len(adapter.deltas), outcome.path, outcome.kept)
    record = {"source": source.name, "sha256": receipt.sha256, "keep": asdict(keep)}
    metadata = lasting(adapter.metadata) | {RECORD: json.dumps(record, ensure_ascii=False)}
    small = replace(adapter, deltas=deltas, metadata=metadata)
    write(small, output, naming, dtype or dtype_of(adapter), overwrite)
    return Written((receipt,), kept)
