"""The files of a base model mapped into memory: what is read of them can be let go, and is not held a second time."""

from __future__ import annotations

import mmap
import os
import weakref
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sdlora.errors import SdloraError
from sdlora.formats.checkpoints import Checkpoint
from sdlora.formats.header import DTYPES
from sdlora.formats.stamp import Stamp, stamp_of

if TYPE_CHECKING:
    from torch import Tensor


class _Map(NamedTuple):
    """A file that stays open, so that it can be asked whether it has changed since it was mapped."""

    descriptor: int
    content: mmap.mmap
    stamp: Stamp


class Mapped:
    """The parameters of a checkpoint as views of its files, each mapped when first asked for.

    Another file put in a file's place changes nothing here. One that is written to itself is refused from then on.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._maps: dict[Path, _Map] = {}

    def __contains__(self, parameter: str) -> bool:
        return parameter in self._checkpoint.places

    def tensor(self, parameter: str) -> Tensor:
        """One parameter in the dtype of the file: to be read, never to be written to.

        SdloraError: the file has changed since the checkpoint was opened, cannot be had any more, or is so new that a
        change might not show.
        """
        import torch

        place = self._checkpoint.places[parameter]
        if place.file not in self._maps:
            header = self._checkpoint.files[place.file]
            self._maps[place.file] = _mapped(place.file, Stamp(header.size, header.modified))
        found = self._maps[place.file]
        _check(place.file, found.descriptor, found.stamp)
        shape, kind = self._checkpoint.files[place.file].tensors[place.key]
        dtype, begin = getattr(torch, DTYPES[kind]), self._checkpoint.begins[place.file][place.key]
        if not prod(shape):
            return place.view(torch.empty(shape, dtype=dtype))
        flat = torch.frombuffer(found.content, dtype=dtype, count=prod(shape), offset=begin)
        return place.view(flat.reshape(shape))

    def check(self) -> None:
        """SdloraError where a file in use has changed: for when all has been read, to know that it was the model."""
        for file, (descriptor, _, stamp) in self._maps.items():
            _check(file, descriptor, stamp)


def _mapped(file: Path, stamp: Stamp) -> _Map:
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise SdloraError(f"the base model's file {file} cannot be read any more ({error.strerror})") from error
    try:
        _check(file, descriptor, stamp)
        if not stamp.settled:
            raise SdloraError(f"the base model's file {file} was written just now; try again in a few seconds")
        # Private: nobody writes there, but who did would not damage the file.
        content = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        os.close(descriptor)
        raise SdloraError(f"the base model's file {file} cannot be mapped into memory ({error})") from error
    except SdloraError:
        os.close(descriptor)
        raise
    weakref.finalize(content, os.close, descriptor)
    return _Map(descriptor, content, stamp)


def _check(file: Path, descriptor: int, stamp: Stamp) -> None:
    """Before any access, since what was cut off of a mapped file can not even be looked at."""
    try:
        now = stamp_of(descriptor)
    except OSError as error:
        raise SdloraError(f"the base model's file {file} is gone ({error.strerror}); load the model again") from error
    if now != stamp:
        raise SdloraError(f"the base model's file {file} has changed while it was in use; load the model again")
