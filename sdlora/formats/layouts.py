"""Headers and plans of many files, faster: what is the same in them is looked at once.

Files of one trainer, model and rank have the same names, shapes and offsets to the byte and differ in the metadata. A
header whose tensors were read before need only have its metadata read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from sdlora.formats.header import LONGEST_TEXT, Header, Spec, read_header, refuse_odd_path
from sdlora.formats.plan import Plan, plan

START = b'{"__metadata__":'
LONGEST = 32 * 2**20  # bytes of a header that is worth the look
MOST = 64  # layouts that are remembered, those met last; one of SDXL takes half a megabyte

Layout = tuple[bytes, int]  # a digest of the header's part about tensors, and the bytes that follow the header


@dataclass(frozen=True)
class Met:
    """The layouts that were met, and the plans of their tensors, by the identity of the mappings in `tensors`."""

    tensors: dict[Layout, Mapping[str, Spec]] = field(default_factory=dict)
    plans: dict[int, Plan] = field(default_factory=dict)

    def header_of(self, path: Path) -> Header:
        """As `read_header`, with the very mapping of tensors that an earlier file of the same layout had."""
        refuse_odd_path(path)
        before = _state(path)
        raw = _raw_header(path)
        after = _state(path)
        apart = _apart(raw) if raw and before == after else None
        if apart is None or before is None:
            return read_header(path)
        metadata, about_tensors = apart
        size, modified, _ = before
        layout = (blake2b(about_tensors).digest(), size - 8 - len(raw))
        if layout not in self.tensors:
            header = read_header(path)
            if (header.size, header.modified) == (size, modified):
                self._remember(layout, header.tensors)
            return header
        tensors = self.tensors[layout] = self.tensors.pop(layout)  # the last now
        return Header(path, size, modified, tensors, metadata)

    def _remember(self, layout: Layout, tensors: Mapping[str, Spec]) -> None:
        while len(self.tensors) >= MOST:
            oldest = self.tensors.pop(next(iter(self.tensors)))
            self.plans.pop(id(oldest), None)
        self.tensors[layout] = tensors

    def plan(self, tensors: Mapping[str, Spec]) -> Plan:
        """As `plan`, remembered for the tensors of the layouts that were met."""
        found = self.plans.get(id(tensors))
        if found is None:
            found = plan(tensors)
            if any(tensors is known for known in self.tensors.values()):  # they stay, so that no other takes their id
                self.plans[id(tensors)] = found
        return found


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def _raw_header(path: Path) -> bytes:
    """The header of a plain file; nothing where it is not there as it should be, for `read_header` to say why."""
    try:
        if path.suffix.lower() != ".safetensors" or not path.is_file():
            return b""
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            raw = file.read(length) if length <= LONGEST else b""
    except OSError:
        return b""
    return raw if len(raw) == length else b""


def _apart(raw: bytes) -> tuple[dict[str, str], bytes] | None:
    """The metadata of a header, and the part about tensors behind it; None where either asks for a closer look."""
    if not raw.startswith(START):
        return None
    try:
        text = raw.decode("utf-8")
        metadata, end = json.JSONDecoder().raw_decode(text, len(START))
        told = [*metadata, *metadata.values()]
        "".join(told).encode("utf-8")  # half a surrogate pair, which safetensors refuses, fails here
    except (ValueError, AttributeError, TypeError, RecursionError):
        return None
    rest = text[end:].rstrip(" ").encode("utf-8")
    if b'"__metadata__"' in rest or any(len(one) > LONGEST_TEXT for one in told):
        return None
    return metadata, rest
