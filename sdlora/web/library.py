"""The LoRAs that the app offers. Pages name them by opaque ids; paths never come from a browser."""

import hashlib
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sdlora.errors import SdloraError
from sdlora.formats.atomic import replace_file
from sdlora.formats.block_weights import (
    PRESET_FILE,
    PRESETS,
    Factors,
    preset_name,
    presets_in,
    read_presets,
    write_factors,
    write_presets,
)
from sdlora.formats.sources import SUFFIX, files_of, loras_below, name_of, names_below
from sdlora.generation.prompts.tags import Names


@dataclass(frozen=True)
class Entry:
    """A LoRA of the library, a file or a PEFT folder: what pages call it, what they show of it, where it lies."""

    id: str
    label: str
    path: Path


class Library:
    """LoRAs below some folders, and uploaded ones, which stay until the app ends.

    presets: of block weights, the built-in ones and those at the top of each folder, as they were at the last scan.
    problem: why they could not be read at the first one; empty where they could.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self.folders = tuple(folders)
        missing = next((folder for folder in self.folders if not os.path.isdir(folder)), None)
        if missing:
            raise SdloraError(f"library {missing} is no folder; make it, or name another one with --library")
        self._uploads: dict[str, Entry] = {}
        self._found: dict[str, Entry] = {}
        self._lock = threading.Lock()
        self.presets: Mapping[str, str] = PRESETS
        self.problem = ""
        try:
            self.scan()
        except SdloraError as error:
            self.problem = str(error)

    def scan(self) -> tuple[Entry, ...]:
        """Look at the folders anew: finished files only, and none that a link leads out of its folder.

        SdloraError: presets cannot be read; they, and they only, are left as they were.
        """
        found = [
            (path, root)
            for root in (folder.resolve() for folder in self.folders)
            for path in sorted(loras_below(root, inside=True))
            if all(file.is_file() and file.resolve().is_relative_to(root) for file in files_of(path))
        ]
        entries = [Entry(_id(path), label(name), path) for path, name in names_below(found).items()]
        with self._lock:
            self._found = {entry.id: entry for entry in entries}
        self.presets = presets_in(self.folders)
        return self.entries

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Uploads first, then the files of the last scan."""
        with self._lock:
            return (*self._uploads.values(), *self._found.values())

    @property
    def names(self) -> Names:
        """The files of the last scan, by the names that tags in a prompt call them: with their folders or without."""
        with self._lock:
            found = [(entry.path, (name_of(entry.path), entry.label)) for entry in self._found.values()]
            return Names([*((entry.path, (name_of(entry.path),)) for entry in self._uploads.values()), *found])

    def upload(self, path: Path) -> Entry:
        """Take in a file that a page has sent."""
        if path.suffix.lower() != SUFFIX:
            raise SdloraError(f"{path.name} is no {SUFFIX} file; LoRAs are taken in that form only")
        entry = Entry(_id(path), f"{label(path.stem)} (uploaded)", path)
        with self._lock:
            self._uploads[entry.id] = entry
        return entry

    def save_preset(self, name: str, factors: Factors) -> None:
        """Write block weights into the first folder's presets, in place of those that had the name there.

        SdloraError: the name is none, or another preset's; all factors are 1; the file cannot be read or written.
        """
        name = preset_name(name)
        if name in presets_in(self.folders[1:]):
            raise SdloraError(f"there is a preset {name} already; save yours under another name")
        if not factors:
            raise SdloraError("all blocks have the factor 1; set some of them, then save the preset")
        text = write_presets({name: write_factors(factors)})
        file = self.folders[0] / PRESET_FILE
        with self._lock:
            presets_in(self.folders)  # a file that cannot be read is told, not written over
            try:
                kept = _without(name, file.read_bytes().decode("utf-8-sig")) if file.exists() else ""
                replace_file(file, lambda partial: partial.write_bytes((kept + text).encode("utf-8")))
            except OSError as error:
                raise SdloraError(f"{file} cannot be written ({error.strerror}); make its folder writable") from error
            self.presets = presets_in(self.folders)

    def path(self, id: str) -> Path:
        """The file of an id; SdloraError for an id that is not (or no longer) in the library."""
        known = {entry.id: entry.path for entry in self.entries}
        if id not in known:
            raise SdloraError("that LoRA is not in the library any more; choose another one")
        return known[id]


def _without(name: str, text: str) -> str:
    """The lines of a presets file but for that preset's, each with its end."""
    kept = "".join(line for line in text.splitlines(keepends=True) if name not in read_presets(line))
    return kept if not kept or kept.endswith("\n") else f"{kept}\n"


def label(text: str) -> str:
    """A file name fit to be shown: what would break or reverse a line is replaced."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)[:120]


def _id(path: Path) -> str:
    return hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()[:16]
