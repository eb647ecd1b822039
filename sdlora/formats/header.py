"""The container of a LoRA file: what a .safetensors file holds, its hashes, its tensors; or in one line why not.

The safetensors library alone parses headers. It refuses tensors that overlap, leave holes, lie about their size or have
an unknown dtype. What it leaves open is closed here: names told twice or that cannot be printed, headers that only
cost time, files that change while they are read.
"""

from __future__ import annotations

import hashlib
import re
import stat
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from safetensors import SafetensorError, safe_open

from sdlora.errors import SdloraError

if TYPE_CHECKING:
    from torch import Tensor

PICKLES = (".pt", ".ckpt", ".bin", ".pth", ".pkl", ".pickle")
LONGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it
LONGEST_NAME = 500  # characters of a tensor's name
LONGEST_TEXT = 4 * 2**20  # characters of one value of the metadata; the tags of 100,000 pictures fit
MOST_MARKS = 2_000_000  # quotes, and commas, in a header: 200,000 tensors, some 30 times a full checkpoint's
MOST_AXES = 8
LARGEST = 16 * 2**30  # bytes of a file that is read whole; SDXL as differences in float32 has 14
PATIENCE = 1.0  # seconds that a file may take to become whole
PAUSE = 0.05
CHUNK = 4 * 2**20
AHEAD = 8  # chunks that reading may be ahead of hashing

BREAKS = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")  # what ends a line or moves the cursor

# What damaged files turn out to be, by their first bytes.
DISGUISES = {
    b"<!": "it is a web page, as a download without login gives",
    b"<h": "it is a web page, as a download without login gives",
    b"version https://git-lfs": "it is a pointer of Git LFS to the file",
    b"PK\x03\x04": "it is a pickle of PyTorch under another name",
    b"\x80\x02": "it is a pickle under another name",
}
# By dtype as headers call it: torch's name.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}

T = TypeVar("T")


class Spec(NamedTuple):
    """A tensor as the header tells it; dtype: "F32", "F16", "BF16", "F8_E4M3", "I64", ..."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Header:
    """What a file says that it holds.

    size: in bytes; modified: when, in nanoseconds; cut: names of metadata that was too long to be kept whole.
    """

    path: Path
    size: int
    modified: int
    tensors: Mapping[str, Spec]
    metadata: Mapping[str, str]
    cut: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hashes:
    """Names that the web knows a file by, in hexadecimal.

    sha256: of the whole file; autov3: sha256 of all that follows the header, which A1111 calls the addnet hash and
    which metadata does not change.
    """

    sha256: str
    autov3: str

    @property
    def autov2(self) -> str:
        """The first 10 digits of the whole file's hash, as sites show it."""
        return self.sha256[:10]

    @property
    def autov3_short(self) -> str:
        """The first 12 digits of autov3, as sites show it and A1111 writes it into pictures."""
        return self.autov3[:12]


class _State(NamedTuple):
    inode: int
    size: int
    modified: int


class _Parsed(NamedTuple):
    """A header, the names in the order of their data, and where in the file that begins."""

    header: Header
    order: list[str]
    start: int


class _CutShort(SdloraError):
    """The file ends before its content does: damaged, or not yet whole."""


def read_header(path: Path | str) -> Header:
    """Names, shapes, dtypes and metadata of a .safetensors file; no tensor is read and torch is not needed.

    SdloraError: no such file, a pickle or another kind of file, damaged, cut short, or still being written.
    """
    path = _named(Path(path))
    return _steady(path, lambda state: _parsed(path, state).header)


def read_hashes(path: Path | str) -> Hashes:
    """The hashes of a .safetensors file, in a few MB of memory and without torch. SdloraError as `read_header`."""
    path = _named(Path(path))

    def read(state: _State) -> Hashes:
        start = 8 + len(_raw_header(path, state))
        try:
            with path.open("rb", buffering=0) as file:
                return _hashes(iter(lambda: file.read(CHUNK), b""), start)
        except OSError as error:
            raise _unreadable(path, error) from error

    return _steady(path, read)


def read_tensors(path: Path | str, keys: Collection[str] | None = None) -> tuple[dict[str, Tensor], Hashes]:
    """The tensors of a file, or those named by `keys`, and its hashes, both of the same content: it is read once.

    The tensors are views of one block of memory, so that nothing is copied.
    SdloraError as `read_header`; also a key that the file lacks, a dtype that torch lacks, or no memory for it.
    """
    path = _named(Path(path))

    def read(state: _State) -> tuple[dict[str, Tensor], Hashes]:
        if state.size > LARGEST:
            raise SdloraError(f"{path} has {state.size / 2**30:.0f} GB; no LoRA has so much, choose another file")
        parsed = _parsed(path, state)
        absent = sorted(set(keys or ()) - parsed.header.tensors.keys())
        if absent:
            raise SdloraError(f"{path} has no tensor {absent[0]}; fetch or save it again")
        content, hashes = _content(path, state, parsed.start)
        return _tensors(parsed, content, keys), hashes

    return _steady(path, read)


def _named(path: Path) -> Path:
    """The path, if its name is that of a file that is read here."""
    refuse_odd_path(path)
    kind = path.suffix.lower()
    if kind in PICKLES:
        raise SdloraError(
            f"{path} is a pickle, which can run code when it is opened, and is not read; "
            "fetch it as .safetensors, or save it as that with a program that you trust it with"
        )
    if kind != ".safetensors":
        raise SdloraError(f"{path} is no .safetensors file; LoRAs and models are read in that form only")
    return path


def refuse_odd_path(path: Path) -> None:
    """SdloraError for a path that could not be shown in one line."""
    if BREAKS.search(str(path)):
        raise SdloraError(
            f"{ascii(str(path))} cannot be read: it has a line break or a control character in it; rename it"
        )


def _steady(path: Path, read: Callable[[_State], T]) -> T:
    """What `read` makes of the file while nobody changes it. One that is too short and young gets time to grow."""
    deadline = time.monotonic() + PATIENCE
    while True:
        before = _state(path)
        problem = None
        try:
            result = read(before)
        except SdloraError as error:
            problem = error
        unchanged = _state(path) == before
        if unchanged and problem is None:
            return result
        young = abs(time.time() - before.modified / 1e9) < PATIENCE
        if unchanged and problem and not (isinstance(problem, _CutShort) and young):
            raise problem
        if time.monotonic() > deadline:
            raise SdloraError(f"{path} is still being written; try again when it is done") from problem
        time.sleep(PAUSE)


def _state(path: Path) -> _State:
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
        raise SdloraError(f"{path} is a folder or a device; name a .safetensors file")
    return _State(found.st_ino, found.st_size, found.st_mtime_ns)


def _parsed(path: Path, state: _State) -> _Parsed:
    raw = _raw_header(path, state)
    try:
        with safe_open(path, framework="numpy") as opened:
            order = opened.offset_keys()
            slices = ((name, opened.get_slice(name)) for name in order)
            tensors = {name: Spec(tuple(one.get_shape()), one.get_dtype()) for name, one in slices}
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    _refuse_odd_names(path, raw, tensors, metadata)
    cut = tuple(name for name, text in metadata.items() if len(text) > LONGEST_TEXT)
    metadata |= {name: metadata[name][:LONGEST_TEXT] for name in cut}
    return _Parsed(Header(path, state.size, state.modified, tensors, metadata, cut), order, 8 + len(raw))


def _raw_header(path: Path, state: _State) -> bytes:
    """The header's bytes, if they are all there and not too many to be parsed in a moment."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if state.size == 0:
                raise _CutShort(f"{path} is empty; fetch or save it again")
            if length > LONGEST_HEADER:
                start += file.read(32)
                disguise = next((what for begin, what in DISGUISES.items() if start.startswith(begin)), None)
                raise _damaged(path, disguise or f"its header would have {length} bytes")
            raw = file.read(length)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(start) < 8 or len(raw) < length:
        raise _damaged(path, f"its header needs {8 + length} bytes, there are {state.size}", _CutShort)
    if max(raw.count(b'"'), raw.count(b",")) > MOST_MARKS:
        raise SdloraError(f"{path} has a header with more names than any model has; choose another file")
    return raw


def _damaged(path: Path, reason: str, kind: type[SdloraError] = SdloraError) -> SdloraError:
    if "not fully covered" in reason:
        kind, reason = _CutShort, "it has more or fewer bytes than its header says"
    reason = " ".join(reason.removeprefix("Error while deserializing header: ").split())
    return kind(f"{path} is damaged or cut short ({reason[:200]}); fetch or save it again")


def _unreadable(path: Path, error: Exception) -> SdloraError:
    return SdloraError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); check the path")


def _refuse_odd_names(path: Path, raw: bytes, tensors: Mapping[str, Spec], metadata: Mapping[str, str]) -> None:
    """Names told twice, of which the library would keep the last, and what would break the lines that show it."""
    # Each tensor has the word once. Inside other text it would be written with backslashes.
    word = "data_offsets"
    told = raw.count(b'"data_offsets"') - sum(word in names for names in (tensors, metadata, metadata.values()))
    if told > len(tensors):
        raise SdloraError(f"{path} is damaged: its header tells {told - len(tensors)} tensors twice; save it again")
    odd = [name for name in tensors if len(name) > LONGEST_NAME or not name.isprintable() and BREAKS.search(name)]
    if odd:
        raise SdloraError(f"{path} is damaged: it has a tensor named {ascii(odd[0][:40])}; save it again")
    deep = [name for name, spec in tensors.items() if len(spec.shape) > MOST_AXES]
    if deep:
        axes = len(tensors[deep[0]].shape)
        raise SdloraError(f"{path} is damaged: its tensor {deep[0]} has {axes} axes; save it again")


def _content(path: Path, state: _State, start: int) -> tuple[Tensor, Hashes]:
    """All bytes of the file, as one tensor, and their hashes, computed while the next bytes are read."""
    import torch

    try:
        content = torch.empty(state.size, dtype=torch.uint8)  # bytearray would write zeros first
    except RuntimeError as error:
        raise SdloraError(f"{path} has {state.size / 2**30:.1f} GB, for which there is no memory") from error
    view = content.numpy().data

    def chunks() -> Iterator[memoryview]:
        with path.open("rb", buffering=0) as file:
            done = 0
            while done < state.size:
                count = file.readinto(view[done : done + CHUNK])
                if not count:
                    raise _CutShort(f"{path} is damaged or cut short; fetch or save it again")
                yield view[done : done + count]
                done += count

    try:
        return content, _hashes(chunks(), start)
    except OSError as error:
        raise _unreadable(path, error) from error


def _hashes(chunks: Iterator[bytes | memoryview], start: int) -> Hashes:
    """Of what the chunks are together, and of what begins at `start`. Each has its thread: hashing outlasts reading."""
    whole, body = hashlib.sha256(), hashlib.sha256()
    done, waiting = 0, deque[Future[None]]()
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        for chunk in chunks:
            waiting.append(first.submit(whole.update, chunk))
            waiting.append(second.submit(body.update, chunk[max(start - done, 0) :]))
            done += len(chunk)
            while len(waiting) > 2 * AHEAD:
                waiting.popleft().result()
    return Hashes(whole.hexdigest(), body.hexdigest())


def _tensors(parsed: _Parsed, content: Tensor, keys: Collection[str] | None) -> dict[str, Tensor]:
    """Views of the content. The library has made sure that the tensors follow each other without holes."""
    import torch

    header, order, start = parsed
    wanted = header.tensors.keys() if keys is None else set(keys)
    found = {}
    for name in order:
        shape, kind = header.tensors[name]
        dtype = getattr(torch, DTYPES.get(kind, ""), None)
        if dtype is None:
            raise SdloraError(f"{header.path}: {name} is in {kind}, which is not read; save the file in float16")
        end = start + prod(shape) * dtype.itemsize
        if name in wanted:
            part = content[start:end]
            aligned = part if start % dtype.itemsize == 0 else part.clone()
            found[name] = aligned.view(dtype).reshape(shape)
        start = end
    return found
