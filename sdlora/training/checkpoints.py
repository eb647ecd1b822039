"""Checkpoints: a folder per step with the LoRA for use and the whole training state, complete or not there at all."""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdlora.errors import SdloraError

STATE = "training.state"  # a safetensors file; by that name no program takes it for a LoRA


@dataclass(frozen=True, eq=False)
class State:
    """What a run needs to go on: everything else follows from its config and the number of steps done.

    parameters: trained tensors by name; plain: optimizer state and the like, nested dicts, lists and tuples of
    numbers, texts and tensors; facts: what must be the same when the run goes on, as JSON.
    """

    step: int
    parameters: Mapping[str, Tensor]
    plain: Mapping[str, Any]
    facts: Mapping[str, Any]


def save(run: Path, state: State, write_lora: Callable[[Path], object]) -> Path:
    """Write checkpoints/NNNNNN with the training state and the LoRA file; one that is there already is kept.

    It is written under another name, flushed to the disk and renamed, so that a folder by its own name is complete.
    """
    final = run / "checkpoints" / f"{state.step:06d}"
    if final.exists():
        return final
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {f"parameter.{name}": tensor for name, tensor in state.parameters.items()}
    header = {"step": state.step, "facts": state.facts, "plain": _split(state.plain, tensors)}
    # safetensors refuses tensors that share memory; copies share none.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(copies, partial / STATE, metadata={"sdlora": json.dumps(header)})
    write_lora(partial / f"{run.resolve().name}-{final.name}.safetensors")
    for path in (*partial.iterdir(), partial):
        _flush(path)
    partial.rename(final)
    _flush(final.parent)
    return final


def latest(run: Path, before: float = math.inf) -> Path | None:
    """The checkpoint with the most steps, fewer than `before`; None where there is none."""
    folders = [path for path in (run / "checkpoints").glob("*") if path.name.isdigit() and (path / STATE).is_file()]
    return max((path for path in folders if int(path.name) < before), key=lambda path: int(path.name), default=None)


def load(checkpoint: Path) -> State:
    """The training state of a checkpoint; SdloraError where its file is damaged."""
    path = checkpoint / STATE
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["sdlora"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        parameters = {
            name.removeprefix("parameter."): t for name, t in tensors.items() if name.startswith("parameter.")
        }
        return State(header["step"], parameters, _join(header["plain"], tensors), header["facts"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        hint = f"delete {checkpoint} to resume from the one before"
        raise SdloraError(f"checkpoint {path} is damaged ({error}); {hint}") from error


def _split(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for nested Python values. Tensors move into `tensors`; dicts keep the type of their keys, tuples theirs."""
    if isinstance(value, Tensor):
        name = f"tensor.{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[key, _split(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_split(item, tensors) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise SdloraError(f"the optimizer keeps a {type(value).__name__} in its state, which cannot be saved; choose adamw")


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_split`."""
    if not isinstance(value, dict):
        return value
    ((kind, items),) = value.items()
    if kind == "tensor":
        return tensors[items]
    if kind == "dict":
        return {key: _join(item, tensors) for key, item in items}
    return {"list": list, "tuple": tuple}[kind](_join(item, tensors) for item in items)


def _flush(path: Path) -> None:
    """Make the system write a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
