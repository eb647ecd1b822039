"""What verbs that write have in common: their steps, the place they write to, and the metadata that stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sdlora.errors import SdloraError
from sdlora.formats.names import NAMINGS
from sdlora.formats.receipt import Receipt
from sdlora.lowrank.truncation import Kept

# What metadata says of the content that it stood beside, and no longer does.
HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")


class Step(NamedTuple):
    """done of total parameters, or tensors of a model, are made, `path` the last; kept: see Outcome."""

    done: int
    total: int
    path: str
    kept: Kept | None = None


@dataclass(frozen=True, eq=False)
class Written:
    """What became of the files read: their receipts, which name what did not apply, and what each module kept."""

    receipts: tuple[Receipt, ...]
    kept: Mapping[str, Kept]


def refuse_place(output: Path, naming: str, overwrite: bool) -> None:
    """SdloraError where the naming is unknown, the name is not that of such a file, or something is there already.

    Better said before the work than after it.
    """
    if naming not in NAMINGS:
        raise SdloraError(f"unknown naming {naming!r}; it is one of {', '.join(NAMINGS)}")
    single = output.suffix.lower() == ".safetensors"
    if single == (naming == "peft"):
        form = "a folder; name one" if naming == "peft" else "a .safetensors file; name one, or choose peft"
        raise SdloraError(f"{output}: {naming} is written to {form}")
    if single and output.is_dir():
        raise SdloraError(f"{output} is a folder; name a file")
    if output.exists() and not overwrite:
        raise SdloraError(f"{output} is there already; name another place, or ask to overwrite it")


def lasting(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata that stays true when the content changes."""
    return {name: text for name, text in metadata.items() if name not in HASHES}
