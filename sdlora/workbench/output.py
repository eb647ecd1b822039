"""Where a LoRA is to be written, looked at before the work and not after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sdlora.errors import SdloraError
from sdlora.formats.names import NAMINGS
from sdlora.formats.receipt import Receipt
from sdlora.lowrank.truncation import Kept

if TYPE_CHECKING:
    from torch import Tensor

    from sdlora.formats.checkpoints import Checkpoint

# What metadata says of the content that it stood beside, and no longer does.
HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")


class Step(NamedTuple):
    """done of total parameters are made; kept: what `path`, the last, kept, None for what has no ranks."""

    done: int
    total: int
    path: str
    kept: Kept | None


@dataclass(frozen=True, eq=False)
class Written:
    """What became of the files read: their receipts, which name what did not apply, and what each module kept."""

    receipts: tuple[Receipt, ...]
    kept: Mapping[str, Kept]


def refuse_place(output: Path, naming: str, overwrite: bool) -> None:
    """SdloraError where the naming is unknown, the name is not that of such a file, or something is there already."""
    if naming not in NAMINGS:
        raise SdloraError(f"unknown naming {naming!r}; it is one of {', '.join(NAMINGS)}")
    single = output.suffix.lower() == ".safetensors"
    if single == (naming == "peft"):
        form = "a folder; name one" if naming == "peft" else "a .safetensors file; name one, or choose --naming peft"
        raise SdloraError(f"{output}: {naming} is written to {form}")
    if single and output.is_dir():
        raise SdloraError(f"{output} is a folder; name a file")
    if output.exists() and not overwrite:
        raise SdloraError(f"{output} is there already; name another place, or give --overwrite")


def lasting(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata that stays true when the content changes."""
    return {name: text for name, text in metadata.items() if name not in HASHES}


def bases_of(base: Checkpoint | None) -> Callable[[str], Tensor] | None:
    """The untouched parameters of a model by path; None without a model."""
    if base is None:
        return None

    def tensor(parameter: str) -> Tensor:
        if parameter not in base.parameters:
            raise SdloraError(f"{base.path} has no {parameter}; give the model that the LoRA was trained on")
        return base.tensor(parameter).float()

    return tensor
