"""A library of LoRAs: what lies below some folders, described from headers, and remembered for the next time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sdlora import __version__
from sdlora.errors import SdloraError
from sdlora.formats.atomic import replace_file
from sdlora.formats.layouts import Met
from sdlora.formats.read import describe
from sdlora.formats.receipt import Receipt
from sdlora.formats.sources import files_of, loras_below
from sdlora.formats.stamp import Stamp, stamp_of

FORMAT = f"{__version__} 1"  # of the cache; another one is not read


@dataclass(frozen=True)
class Described:
    """A LoRA of the library, as much as a list shows; or, in `problem`, the one line that says why it is none.

    size in bytes, modified in nanoseconds: of the file, or of the files of a folder, added.
    components, laws: how many parameters; ranks: in words; the last three: how many keys and modules do not apply.
    The other fields are those of a receipt.
    """

    path: Path
    size: int
    modified: int
    problem: str = ""
    made_for: tuple[str, ...] = ()
    components: Mapping[str, int] | None = None
    laws: Mapping[str, int] | None = None
    ranks: str = ""
    base_model: str = ""
    trigger_words: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    unknown: int = 0
    incomplete: int = 0
    misfit: int = 0


def scan(folders: Iterable[Path | str], cache: Path | None = None) -> tuple[Described, ...]:
    """Every LoRA below the folders, by path.

    cache: a file that keeps what was found, so that only what is new or has changed is looked at (see
    `default_cache`). One that is damaged or of another version is thrown away.
    SdloraError: a folder is not there.
    """
    places = [Path(folder).absolute() for folder in folders]
    missing = next((folder for folder in places if not folder.is_dir()), None)
    if missing:
        raise SdloraError(f"{missing} is no folder; name the folder where your LoRAs lie")
    known = _load(cache) if cache else {}
    met = Met()
    found: dict[str, Described] = {}
    lasting: dict[str, Described] = {}  # what is wrong with a file that was written just now may be over soon
    for folder in places:
        for path, stamps in _files(folder):
            size, modified = (sum(numbers) for numbers in zip(*stamps, strict=True))
            before = known.get(str(path))
            same = before is not None and (before.size, before.modified) == (size, modified)
            one = before if before and same else _described(path, size, modified, met)
            found[str(path)] = one
            if not one.problem or all(stamp.settled for stamp in stamps):
                lasting[str(path)] = one
    elsewhere = {path: one for path, one in known.items() if not any(_below(path, folder) for folder in places)}
    if cache and elsewhere | lasting != known:
        _save(cache, elsewhere | lasting)
    return tuple(found[path] for path in sorted(found))


def default_cache() -> Path:
    """Where a cache lies if nobody says otherwise."""
    place = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(place) / "sdlora" / "library.json"


def _files(folder: Path) -> Iterator[tuple[Path, list[Stamp]]]:
    """Each LoRA below a folder, and the stamps of its files. What goes away meanwhile is left out."""
    for path in loras_below(folder):
        try:
            yield path, [stamp_of(file) for file in files_of(path)]
        except OSError:
            continue


def _described(path: Path, size: int, modified: int, met: Met) -> Described:
    try:
        receipt = describe(path, met.header_of, met.plan)
    except SdloraError as error:
        return Described(path, size, modified, problem=" ".join(str(error).split()))
    return _shown(receipt, size, modified)


def _shown(receipt: Receipt, size: int, modified: int) -> Described:
    return Described(
        receipt.path,
        size,
        modified,
        made_for=receipt.made_for,
        components=dict(receipt.components),
        laws=dict(receipt.laws),
        ranks=receipt.ranks(),
        base_model=receipt.base_model,
        trigger_words=receipt.trigger_words,
        tokens=receipt.tokens,
        dtypes=receipt.dtypes,
        unknown=len(receipt.unknown),
        incomplete=len(receipt.incomplete),
        misfit=len(receipt.misfit),
    )


def _below(path: str, folder: Path) -> bool:
    return path == str(folder) or path.startswith(f"{folder}{os.sep}")


def _load(cache: Path) -> dict[str, Described]:
    """What the cache holds; nothing, where it is not there, of another version or damaged."""
    try:
        told = json.loads(cache.read_text("utf-8"))
        if told["format"] != FORMAT:
            return {}
        return {path: _from_json(path, one) for path, one in told["found"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _save(cache: Path, found: Mapping[str, Described]) -> None:
    told = {path: {name: value for name, value in asdict(one).items() if value} for path, one in found.items()}
    for one in told.values():
        del one["path"]
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, "found": told}, separators=(",", ":"))
        replace_file(cache, lambda partial: partial.write_text(text, "utf-8"))
    except OSError:
        pass  # without a cache the next scan takes longer, and that is all


_KINDS = {"tuple[str, ...]": list, "int": int, "str": str, "Mapping[str, int] | None": dict}


def _from_json(path: str, told: Mapping[str, Any]) -> Described:
    """TypeError or KeyError where the cache was written by something else."""
    kinds = {one.name: _KINDS[str(one.type)] for one in fields(Described) if one.name != "path"}
    for name, value in told.items():
        if type(value) is not kinds[name]:
            raise TypeError(name)
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    return Described(Path(path), **values)
