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
from sdlora.workbench.bases import base_of, refuse_huge
from sdlora.workbench.blocks import block_or_encoder, place

if TYPE_CHECKING:
    from sdlora.formats.checkpoints import Checkpoint
    from sdlora.lowrank.laws import Delta


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
    size = norm_of(delta, base_of(delta, parameter, base))
    assert size is not None  # the base is there where it is needed
    refuse_huge(size)
    return size


def by_block(norms: Mapping[str, float]) -> dict[str, float]:
    """The norm of each block of the UNet, in their order, and of each text encoder; parameters' squares add."""
    squares = Counter[str]()
    for parameter, size in norms.items():
        squares[block_or_encoder(parameter)] += size**2  # type: ignore[assignment]
    return {block: squares[block] ** 0.5 for block in sorted(squares, key=place)}
