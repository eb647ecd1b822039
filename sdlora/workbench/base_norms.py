"""The sizes of a base model's parameters, and a memory of them: reading gigabytes once is enough."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdlora import __version__
from sdlora.formats.atomic import replace_file
from sdlora.formats.checkpoints import Checkpoint
from sdlora.formats.header import Header
from sdlora.formats.library import default_cache as library_cache

FORMAT = f"{__version__} 1"  # of the cache; another one is not read
MOST = 16  # files of models that are remembered: the latest


def default_cache() -> Path:
    """Where the norms are remembered if nobody says otherwise."""
    return library_cache().with_name("norms.json")


def base_norms(base: Checkpoint, parameters: Iterable[str], cache: Path | None = None) -> dict[str, float]:
    """The Frobenius norm of each of these parameters of a model; those that it does not have are left out.

    Only these are read, one by one, and of them only what the cache does not know. cache: a file that keeps what was
    found, by path, size and time of the model's files (see `default_cache`); one that is damaged is thrown away.
    SdloraError: the model cannot be read any more.
    """
    known = _load(cache) if cache else {}
    norms = {file: _remembered(known, header) for file, header in base.files.items()}
    places = {parameter: base.places[parameter].file for parameter in parameters if parameter in base.places}
    new = [parameter for parameter, file in places.items() if parameter not in norms[file]]
    for parameter in new:
        norms[places[parameter]][parameter] = _norm(base.tensor(parameter))
    if cache and new:
        touched = {_key(header): _entry(header, norms[file]) for file, header in base.files.items() if norms[file]}
        _save(cache, known, touched)
    return {parameter: norms[file][parameter] for parameter, file in places.items()}


def _norm(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight, dtype=torch.float64))


def _key(header: Header) -> str:
    return str(header.path.resolve())


def _entry(header: Header, norms: dict[str, float]) -> dict[str, Any]:
    return {"size": header.size, "modified": header.modified, "norms": norms}


def _remembered(known: dict[str, Any], header: Header) -> dict[str, float]:
    """The norms that are known of a file as it is now."""
    try:
        entry = known[_key(header)]
        if (entry["size"], entry["modified"]) != (header.size, header.modified):
            return {}
        return {str(parameter): float(norm) for parameter, norm in entry["norms"].items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _load(cache: Path) -> dict[str, Any]:
    """What the cache holds, by file; nothing where it is not there, of another version or damaged."""
    try:
        told = json.loads(cache.read_text("utf-8"))
        return dict(told["files"]) if told["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _save(cache: Path, known: dict[str, Any], new: dict[str, Any]) -> None:
    kept = {file: entry for file, entry in known.items() if file not in new} | new  # the latest last
    told = {"format": FORMAT, "files": dict(list(kept.items())[-MOST:])}
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        replace_file(cache, lambda partial: partial.write_text(json.dumps(told, separators=(",", ":")), "utf-8"))
    except OSError:
        pass  # without a cache the next time takes longer, and that is all
