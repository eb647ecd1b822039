"""Where a LoRA lies: one file, a PEFT folder, or a folder with a part for each component."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
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
    found = tuple(map(_source, _weights(path)))
    components = [source.component for source in found]
    if not found or len(set(components)) < len(components):
        names = f" ({', '.join(source.path.name for source in found)})" if found else ""
        raise SdloraError(
            f"{path} is no folder of one LoRA{names}; name a .safetensors file, a PEFT folder with {CONFIG}, "
            "or a folder with one of them for each of unet, text_encoder and text_encoder_2"
        )
    return found


def loras_below(place: Path, *, inside: bool = False) -> Iterator[Path]:
    """Each LoRA below a folder: .safetensors files; as one, PEFT folders and those with one for each component.

    Hidden ones are left out. Links to folders are followed (inside: but for those that lead out of the place), after
    all else: each folder is looked at once, by its own path where it has one. A file is its own.
    """
    if not place.is_dir():
        yield place
    for folder, below, names in _folders(place, inside):
        parts = [name for name in COMPONENTS if name in below and Path(folder, name, CONFIG).is_file()]
        if parts and CONFIG not in names:
            yield Path(folder)
            below[:] = [name for name in below if name not in parts]
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith(SUFFIX):
                yield Path(folder) if name == WEIGHTS and CONFIG in names else Path(folder, name)


def files_of(path: Path) -> tuple[Path, ...]:
    """The files of a LoRA, as `sources_of` finds them, with their configs. A folder of anything else is given back."""
    weights = _weights(path)
    configs = (file.with_name(CONFIG) for file in weights if file.name == WEIGHTS)
    return (*weights, *(config for config in configs if config.is_file())) or (path,)


def name_of(path: Path, place: Path | None = None) -> str:
    """What a LoRA is called: its path below a place, or the last part of it alone, without .safetensors."""
    name = path.relative_to(place).as_posix() if place and path != place else path.name
    return name[: -len(SUFFIX)] if name.lower().endswith(SUFFIX) else name


def names_below(found: Iterable[tuple[Path, Path]]) -> dict[Path, str]:
    """What LoRAs are called, given with the places where they were found: their paths below these.

    Where that is the same for several, the place's own name stands before it.
    """
    places = dict(found)
    names = {path: name_of(path, place) for path, place in places.items()}
    several = {name for name, count in Counter(names.values()).items() if count > 1}
    folders = {path: (place if place != path else place.parent).resolve().name for path, place in places.items()}
    return {path: f"{folders[path]}/{name}" if name in several else name for path, name in names.items()}


def split_path(text: str) -> tuple[str, str]:
    """The path of a LoRA and what is said of it behind: "style.safetensors:0.8" is "style.safetensors" and ":0.8".

    Colons may stand in a path that ends in .safetensors, or lies there. What is said is "" or begins with a colon; if
    it does not, as in "style.safetensors0.8", it is a mistake for the caller to tell.
    """
    cut = text.lower().rfind(SUFFIX)
    ends = [*(colon.start() for colon in re.finditer(":", text)), len(text)]
    named = (end for end in ends[::-1] if text[:end].lower().endswith(SUFFIX) or os.path.exists(text[:end]))
    end = next(named, ends[0] if cut < 0 else cut + len(SUFFIX))
    return text[:end], text[end:]


def _folders(place: Path, inside: bool) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk: the folders of a place, each once. What is taken out of the list of those below is not looked at."""
    root = os.path.realpath(place)
    seen: set[str] = set()
    starts = [str(place)]
    for start in starts:  # which grows by the links that are met
        for folder, below, names in os.walk(start):
            real = os.path.realpath(folder)
            if real in seen or (inside and not Path(real).is_relative_to(root)):
                below.clear()
                continue
            seen.add(real)
            below[:] = sorted(name for name in below if not name.startswith("."))
            yield folder, below, names
            starts += filter(os.path.islink, (os.path.join(folder, name) for name in below))


def _weights(path: Path) -> tuple[Path, ...]:
    """The files with tensors of a LoRA at a path; none where it is a folder of anything else."""
    if not path.is_dir():
        return (path,)
    if (path / CONFIG).is_file():
        return (path / WEIGHTS,)
    parts = [one for one in sorted(path.iterdir()) if _component(one.name)]
    parts = [one for one in parts if one.suffix == SUFFIX or (one / CONFIG).is_file()]
    below = sorted(path.glob(f"*/{CONFIG}"))
    if not parts and len(below) == 1:
        return (below[0].with_name(WEIGHTS),)
    return tuple(one / WEIGHTS if one.is_dir() else one for one in parts)


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
