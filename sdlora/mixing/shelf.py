"""The shelf: adapters read from files, known by their content, in so many bytes of memory and no more."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from weakref import WeakKeyDictionary, WeakValueDictionary

from torch import Tensor, uint8

from sdlora.errors import SdloraError
from sdlora.formats.architectures import Architecture
from sdlora.formats.read import read
from sdlora.formats.receipt import Receipt
from sdlora.formats.sources import files_of
from sdlora.formats.stamp import Stamp, stamp_of
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws.delta import factors

STAMPS = 4096  # files whose content is known by their stamp; what is forgotten is read again

_Key = tuple[str, bool]  # content, and whether it was read in part


@dataclass(frozen=True, eq=False)
class Book:
    """An adapter and a hash of all that counts of it (see `Receipt`). receipt: None where it was not read."""

    adapter: Adapter
    content: str
    receipt: Receipt | None = None


@dataclass(frozen=True)
class _Seen:
    """What lay at a path, and whether a change since must show in the stamps of its files."""

    stamps: dict[Path, Stamp]
    content: str
    settled: bool


class Shelf:
    """Reads adapters for one architecture and keeps those used last, as long as they fit into `limit` bytes.

    The same content is the same adapter as long as it is kept, here or by whoever uses it, whatever its file is called;
    content that has changed under the same name is seen at once.
    """

    def __init__(self, architecture: Architecture, limit: int) -> None:
        self.architecture = architecture
        self.limit = limit
        self.size = 0  # bytes on the shelf
        self._kept: OrderedDict[_Key, Adapter] = OrderedDict()
        self._living: WeakValueDictionary[_Key, Adapter] = WeakValueDictionary()  # whoever keeps them
        self._receipts: WeakKeyDictionary[Adapter, Receipt] = WeakKeyDictionary()
        self._seen: OrderedDict[tuple[Path, bool], _Seen] = OrderedDict()

    def read(self, path: Path, partial: bool = False) -> Book:
        """What lies at the path now; partial as for `read` of sdlora.formats. SdloraError where that cannot be had."""
        stamps, seen = _stamps(path), self._seen.get((path, partial))
        known = seen.content if seen and seen.stamps == stamps and seen.settled else ""
        adapter = self._living.get((known, partial))
        if adapter is None:
            settled = all(stamp.settled for stamp in stamps.values())
            fresh, told = read(path, self.architecture, partial)
            known = told.content
            adapter = self._living.setdefault((known, partial), fresh)
            self._receipts.setdefault(adapter, told)
            self._remember((path, partial), _Seen(stamps, known, settled))
        self._keep((known, partial), adapter)
        receipt = self._receipts[adapter]
        return Book(adapter, known, receipt if receipt.path == path else replace(receipt, path=path))

    def _remember(self, place: tuple[Path, bool], seen: _Seen) -> None:
        self._seen[place] = seen
        self._seen.move_to_end(place)
        if len(self._seen) > STAMPS:
            self._seen.popitem(last=False)

    def _keep(self, key: _Key, adapter: Adapter) -> None:
        """As the one used last."""
        if key not in self._kept:
            if size_of(adapter) > self.limit:
                return
            self._kept[key] = adapter
            self.size += size_of(adapter)
        self._kept.move_to_end(key)
        while self.size > self.limit:
            _, leaving = self._kept.popitem(last=False)
            self.size -= size_of(leaving)


def size_of(adapter: Adapter) -> int:
    """Bytes of all its tensors."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in _tensors(adapter))


def content_of(adapter: Adapter) -> str:
    """A hash of all that an adapter changes, for one that was not read from a file."""
    digest = sha256()
    for path, delta in sorted(adapter.deltas.items()):
        digest.update(f"{path} {type(delta).__name__} {_numbers(delta)}".encode())
    for name, tensor in _tensors(adapter):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(uint8).numpy().data)
    return digest.hexdigest()


def _tensors(adapter: Adapter) -> list[tuple[str, Tensor]]:
    deltas = [(f"{path} {name}", one) for path, delta in adapter.deltas.items() for name, one in factors(delta).items()]
    tokens = [(f"{token} {name}", one) for token, by in adapter.embeddings.items() for name, one in by.items()]
    return sorted([*deltas, *tokens], key=lambda named: named[0])


def _numbers(delta: object) -> str:
    """What is no tensor in a law: its alpha, its axes, an inner law's own."""
    told = []
    for name, value in sorted(vars(delta).items()):
        if not hasattr(value, "dtype"):
            told.append(f"{name}={_numbers(value) if hasattr(value, 'fits') else value!r}")
    return f"{type(delta).__name__}({', '.join(told)})"


def _stamps(path: Path) -> dict[Path, Stamp]:
    """What tells whether any of the files of a LoRA has changed."""
    try:
        return {file: stamp_of(file) for file in files_of(path)}
    except (OSError, ValueError) as error:  # a null byte is a ValueError
        why = getattr(error, "strerror", error)
        raise SdloraError(f"LoRA {path} cannot be read ({why}); check the path") from error
