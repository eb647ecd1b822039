"""A dataset folder ▶ records, with a receipt of everything that was passed over or made up."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sdlora.data import pictures
from sdlora.errors import SdloraError


@dataclass(frozen=True)
class Record:
    """One picture and its caption. name: path below the dataset folder; width and height: after EXIF rotation."""

    path: Path
    name: str
    caption: str
    width: int
    height: int
    sha256: str


@dataclass(frozen=True)
class ScanReceipt:
    """What scanning passed over or made up, by name.

    skipped: (picture, reason); fallbacks: pictures without a caption, which got the trigger phrase;
    orphans: caption files that belong to no picture.
    """

    skipped: tuple[tuple[str, str], ...] = ()
    fallbacks: tuple[str, ...] = ()
    orphans: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """The pictures of a folder in the order of their names."""

    folder: Path
    records: tuple[Record, ...]
    receipt: ScanReceipt
    trigger: str | None = None

    def summary(self) -> str:
        """What was found, one line a subject."""
        lines = [f"{len(self.records)} pictures in {self.folder}"]
        if self.receipt.fallbacks:
            named = listed(self.receipt.fallbacks)
            lines.append(f'{len(self.receipt.fallbacks)} without a caption use the trigger "{self.trigger}": {named}')
        lines += [f"skipped {name}: {reason}" for name, reason in self.receipt.skipped]
        if self.receipt.orphans:
            lines.append(f"{len(self.receipt.orphans)} captions without a picture: {listed(self.receipt.orphans)}")
        return "\n".join(lines)


def scan(folder: Path, trigger: str | None = None) -> Dataset:
    """Every picture below the folder with the caption from `<name>.txt` beside it, or the trigger where there is none.

    Pictures that cannot be read are skipped and named in the receipt, and so are hidden files. SdloraError: no such
    folder, no readable picture in it, a picture without caption and no trigger, a caption that cannot be read.
    """
    if not os.path.isdir(folder):
        found = "is a file" if os.path.exists(folder) else "does not exist"
        raise SdloraError(f"dataset folder {folder} {found}; name a folder of pictures with captions in .txt files")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in pictures.SUFFIXES and path.is_file())
    records: list[Record] = []
    skipped: list[tuple[str, str]] = []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in Path(name).parts):
            skipped.append((name, "hidden"))
            continue
        try:
            width, height = pictures.load(path).size
        except SdloraError as error:
            skipped.append((name, str(error).removeprefix(f"{path} ")))
        else:
            records.append(Record(path, name, _caption(path), width, height, pictures.content_hash(path)))
    if not records:
        raise SdloraError(_nothing(folder, skipped))
    return _with_trigger(Dataset(folder, tuple(records), ScanReceipt(tuple(skipped), (), _orphans(folder))), trigger)


def listed(names: Sequence[str], count: int = 5) -> str:
    """The first names and how many more there are."""
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest


def _caption(picture: Path) -> str:
    """The caption beside a picture on one line; "" where there is none or it is empty."""
    path = picture.with_suffix(".txt")
    try:
        return " ".join(path.read_text("utf-8-sig").split())
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise SdloraError(f"caption {path} cannot be read ({error.strerror}); mend or remove it") from error
    except UnicodeDecodeError as error:
        raise SdloraError(f"caption {path} is not UTF-8 text; save it as UTF-8") from error


def _with_trigger(dataset: Dataset, trigger: str | None) -> Dataset:
    bare = tuple(record.name for record in dataset.records if not record.caption)
    if bare and not trigger:
        raise SdloraError(
            f"{len(bare)} pictures in {dataset.folder} have no caption: {listed(bare)}; "
            "write one into a .txt of the same name, or give --trigger to use one phrase for all of them"
        )
    records = tuple(replace(record, caption=record.caption or trigger or "") for record in dataset.records)
    return replace(dataset, records=records, receipt=replace(dataset.receipt, fallbacks=bare), trigger=trigger or None)


def _orphans(folder: Path) -> tuple[str, ...]:
    stems = {path.with_suffix("") for path in folder.rglob("*") if path.suffix.lower() in pictures.SUFFIXES}
    texts = sorted(path for path in folder.rglob("*.txt") if path.with_suffix("") not in stems)
    return tuple(path.relative_to(folder).as_posix() for path in texts)


def _nothing(folder: Path, skipped: Sequence[tuple[str, str]]) -> str:
    if not skipped:
        return f"no pictures in {folder} (looked for {', '.join(pictures.SUFFIXES)}); check the path or add pictures"
    reasons = listed([f"{name}: {reason}" for name, reason in skipped], 3)
    return f"none of the {len(skipped)} pictures in {folder} can be read ({reasons}); replace them"
