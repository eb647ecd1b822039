"""What a LoRA file is and how much it changes: the receipt, and the norms of its deltas by block.

Nothing here imports torch before a tensor is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlora.errors import SdloraError
from sdlora.formats.header import Hashes
from sdlora.formats.metadata import tags
from sdlora.formats.read import describe, read
from sdlora.formats.receipt import Receipt
from sdlora.lowrank.effect import norm_of

if TYPE_CHECKING:
    from sdlora.formats.checkpoints import Checkpoint
    from sdlora.lowrank.laws import Delta

LARGEST = 3.4e38  # in float32
REST = "rest"  # of the UNet: what is in none of its blocks


@dataclass(frozen=True)
class Inspected:
    """A receipt, and what was measured.

    norms: Frobenius norm of each change at weight 1, by path of the parameter; unmeasured: why there is none, by path.
    Both are empty where only the header was read.
    """

    receipt: Receipt
    norms: Mapping[str, float] = field(default_factory=dict)
    unmeasured: Mapping[str, str] = field(default_factory=dict)

    @property
    def hashes(self) -> Hashes:
        return Hashes(self.receipt.sha256, self.receipt.autov3)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all that is known."""
        return self.receipt.as_dict() | {
            "autov2": self.hashes.autov2,
            "autov3_short": self.hashes.autov3_short,
            "norms": dict(self.norms),
            "blocks": by_block(self.norms),
            "unmeasured": dict(self.unmeasured),
            "tags": tags(self.receipt.metadata),
        }


def inspect(
    path: Path | str, base: Checkpoint | None = None, partial: bool = False, header_only: bool = False
) -> Inspected:
    """What a LoRA is, and the norms of its changes.

    base: the model to hold it against, which also gives the weights that some laws depend on; None: the architecture
    that it was made for. partial: take what fits of a file that is for another one. header_only: no tensors, no norms.
    SdloraError: as `describe` and `read`.
    """
    if header_only:
        return Inspected(describe(path))
    adapter, receipt = read(path, base.architecture if base else None, partial)
    norms: dict[str, float] = {}
    unmeasured: dict[str, str] = {}
    for parameter, delta in adapter.deltas.items():
        try:
            norms[parameter] = _norm(parameter, delta, base)
        except SdloraError as error:
            unmeasured[parameter] = str(error)
    return Inspected(receipt, norms, unmeasured)


def _norm(parameter: str, delta: Delta, base: Checkpoint | None) -> float:
    there = base is not None and parameter in base.parameters
    size = norm_of(delta, base.tensor(parameter).float() if base and there and not delta.linear else None)
    if size is None:
        why = "which has no such parameter" if base else "which is not given; --base MODEL gives it"
        raise SdloraError(f"{delta.name} depends on the weights of the base model, {why}")
    if not size < LARGEST:
        raise SdloraError("numbers so large that float32 cannot hold the change; it cannot be applied")
    return size


def by_block(norms: Mapping[str, float]) -> dict[str, float]:
    """The norm of each block: the blocks of the UNet from input to output, the rest of it, each text encoder.

    The squares of the parameters' norms add.
    """
    squares = Counter[str]()
    for parameter, size in norms.items():
        squares[_block(parameter)] += size**2  # type: ignore[assignment]
    return {block: squares[block] ** 0.5 for block in sorted(squares, key=_place)}


def _block(parameter: str) -> str:
    component, first, second, *_ = [*parameter.split("."), "", ""]
    if component != "unet":
        return component
    side, _, kind = first.partition("_")
    if kind == "blocks":
        return f"unet {side} {second}"
    return "unet mid" if kind == "block" else f"unet {REST}"


def _place(block: str) -> tuple[int, str]:
    order = ("unet down", "unet mid", "unet up", f"unet {REST}", "text_encoder")
    return next((i for i, start in enumerate(order) if block.startswith(start)), len(order)), block
