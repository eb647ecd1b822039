"""Where a LoRA lies: one file, a PEFT folder, or a folder with a part for each component."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sdlora.errors import SdloraError
from sdlora.formats.header import refuse_odd_path
from sdlora.formats.peft_config import PeftConfig, parse

SUFFIX = ".safetensors"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
COMPONENTS = ("text_encoder_2", "text_encoder", "unet")  # longer names first: they are looked for at the start
LONGEST_CONFIG = 1_000_000  # bytes


@dataclass(frozen=True)
class Source:
    """A file of a LoRA. config: PEFT's, which lies beside; component: the one it is about, where its place tells.

    written: the config as it stands in its file.
    """

    path: Path
    config: PeftConfig | None = None
    written: bytes = b""
    component: str | None = None


def sources_of(path: Path | str) -> tuple[Source, ...]:
    """The files that a LoRA at `path` consists of.

    A file; PEFT's folder (adapter_config.json and adapter_model.safetensors), perhaps one level down in the folder of
    the adapter's name; or a folder with one of either for each component, called unet, text_encoder, text_encoder_2.
    SdloraError: a folder that is none of these; a path with line breaks in it.
    """
    path = Path(path)
    refuse_odd_path(path)
    if not path.is_dir():
        return (_source(path),)
    if (path / CONFIG).is_file():
        return (_source(path / WEIGHTS),)
    found = []
    for entry in sorted(path.iterdir()):
        if _component(entry.name) and (entry.suffix == SUFFIX or (entry / CONFIG).is_file()):
            found.append(_source(entry / WEIGHTS if entry.is_dir() else entry))
    below = sorted(path.glob(f"*/{CONFIG}"))
    if not found and len(below) == 1:
        return (_source(below[0].with_name(WEIGHTS)),)
    components = [source.component for source in found]
    if not found or len(set(components)) < len(components):
        names = f" ({', '.join(source.path.name for source in found)})" if found else ""
        raise SdloraError(
            f"{path} is no folder of one LoRA{names}; name a .safetensors file, a PEFT folder with {CONFIG}, "
            "or a folder with one of them for each of unet, text_encoder and text_encoder_2"
        )
    return tuple(found)


def loras_below(place: Path) -> Iterator[Path]:
    """Each LoRA below a folder: .safetensors files, PEFT folders as one; hidden ones left out. A file is its own."""
    if not place.is_dir():
        yield place
    for folder, below, names in os.walk(place):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith(SUFFIX):
                yield Path(folder) if name == WEIGHTS and CONFIG in names else Path(folder, name)


def files_of(path: Path) -> tuple[Path, ...]:
    """The files of one that `loras_below` has found."""
    return (path / WEIGHTS, path / CONFIG) if path.is_dir() else (path,)


def name_of(path: Path, place: Path | None = None) -> str:
    """What a LoRA is called: its path below a place, or the last part of it alone, without .safetensors."""
    name = path.relative_to(place).as_posix() if place and path != place else path.name
    return name[: -len(SUFFIX)] if name.lower().endswith(SUFFIX) else name


def _source(file: Path) -> Source:
    config = file.with_name(CONFIG)
    if file.name == WEIGHTS and config.is_file():
        component = _component(file.parent.name) or _component(file.parent.parent.name)
        return Source(file, *_config(config), component)
    return Source(file, component=_component(file.name) if file.stem.partition("-")[0] in COMPONENTS else None)


def _component(name: str) -> str | None:
    return next((component for component in COMPONENTS if name.startswith(component)), None)


def _config(path: Path) -> tuple[PeftConfig, bytes]:
    try:
        if path.stat().st_size > LONGEST_CONFIG:
            raise SdloraError(f"{path} is too long to be a PEFT config; save the adapter again")
        written = path.read_bytes()
        return parse(written.decode("utf-8"), str(path)), written
    except (OSError, UnicodeDecodeError) as error:
        raise SdloraError(f"{path} cannot be read ({error}); save the adapter again") from error
