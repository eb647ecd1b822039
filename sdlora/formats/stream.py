"""Writing large .safetensors files tensor after tensor, so that no more than one of them is in memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from sdlora.formats.header import DTYPES, Spec

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file or a folder that shall be whole or not there: it is flushed and renamed at the end.

    Whatever ends the block early, Ctrl-C and a generator that is not run to its end included, leaves nothing behind.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        _remove(partial)  # of a process that was killed
        yield partial
        for written in (partial, *partial.rglob("*")):
            if written.is_file():
                with written.open("rb") as file:
                    os.fsync(file.fileno())
        if path.is_dir():  # an empty one; a folder that holds something stays and raises OSError
            path.rmdir()
        partial.replace(path)
    except BaseException:
        _remove(partial)
        raise


def write_stream(
    path: Path, tensors: Mapping[str, Spec], metadata: Mapping[str, str], tensor_of: Callable[[str], Tensor]
) -> Iterator[str]:
    """Write a .safetensors file, asking for one tensor after the other; yields the name of each that is written.

    The order is that of `tensors`, except that wide dtypes come before narrow ones: readers map them where they lie.
    tensor_of must return what `tensors` says, else ValueError.
    """
    widths = {name: _dtype(spec).itemsize for name, spec in tensors.items()}
    order = sorted(tensors, key=lambda name: -widths[name])  # stable
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        shape, dtype = tensors[name]
        begin, end = end, end + prod(shape) * widths[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(_bytes(name, tensor_of(name), tensors[name]))
            yield name


def _bytes(name: str, tensor: Tensor, spec: Spec) -> memoryview:
    import torch

    if tuple(tensor.shape) != spec.shape or tensor.dtype != _dtype(spec):
        raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not as announced {spec}")
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _dtype(spec: Spec) -> torch.dtype:
    import torch

    return getattr(torch, DTYPES[spec.dtype])


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
