"""OFT and BOFT: the outputs of a layer are rotated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sdlora.lowrank.laws.delta import Shape, check_fit, wide
from sdlora.lowrank.laws.rotation import butterfly, cayley, check_blocks, check_scale

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class OFT:
    """W' = R^T W for each of n blocks of outputs (arXiv:2306.07280), as kohya's `oft` and LyCORIS' diag-oft have it.

    blocks: (n, b, b) with n * b = out. Q = blocks - blocks^T, R = (I + Q) (I - Q)^-1.
    constraint: the file's alpha; where it is above zero, the norm of all Q together is clipped at constraint * out.
    rescale: (out, 1[, 1, 1]), a factor for each output of W'.
    """

    name: ClassVar[str] = "oft"
    linear: ClassVar[bool] = False

    blocks: Tensor
    constraint: float
    rescale: Tensor | None = None

    def __post_init__(self) -> None:
        check_blocks(tuple(self.blocks.shape), 3)
        check_scale(self.rescale, self.shape[0])

    @property
    def rank(self) -> int:
        """The number of blocks, which is kohya's dim."""
        return self.blocks.shape[0]

    @property
    def shape(self) -> Shape:
        return (self.blocks.shape[0] * self.blocks.shape[1], 1)

    def fits(self, shape: Sequence[int]) -> bool:
        return len(shape) > 1 and shape[0] == self.shape[0]

    def weight(self, base: Tensor) -> Tensor:
        """The delta W' - W in float32, in the shape of `base` and on its device."""
        check_fit(self, base.shape)
        turns = cayley(_skew(wide(self.blocks, base), self.constraint * base.shape[0]))
        return _rescaled(_turned(turns, base), base, self.rescale)


@dataclass(frozen=True, eq=False)
class BOFT:
    """W' = B_m ... B_1 W, a butterfly of m block rotations (arXiv:2311.06243), as LyCORIS has it.

    blocks: (m, n, b, b) with n * b = out. Q = blocks - blocks^T, R = (I + Q) (I - Q)^-1 for each block; the blocks of
    stage i turn outputs that lie 2^i * b / 2 apart. constraint, rescale: as for OFT, the norm being that of all stages.
    """

    name: ClassVar[str] = "boft"
    linear: ClassVar[bool] = False

    blocks: Tensor
    constraint: float
    rescale: Tensor | None = None

    def __post_init__(self) -> None:
        check_blocks(tuple(self.blocks.shape), 4)
        check_scale(self.rescale, self.shape[0])

    @property
    def rank(self) -> int:
        """The size of a block."""
        return self.blocks.shape[2]

    @property
    def shape(self) -> Shape:
        return (self.blocks.shape[1] * self.blocks.shape[2], 1)

    def fits(self, shape: Sequence[int]) -> bool:
        return len(shape) > 1 and shape[0] == self.shape[0]

    def weight(self, base: Tensor) -> Tensor:
        """The delta W' - W in float32, in the shape of `base` and on its device."""
        check_fit(self, base.shape)
        turns = cayley(_skew(wide(self.blocks, base), self.constraint * base.shape[0]))
        return _rescaled(butterfly(turns, base.detach().float(), interleaved=True), base, self.rescale)


@dataclass(frozen=True, eq=False)
class Rotation:
    """OFT whose blocks (n, b, b) are R itself: `oft_diag`, written by LyCORIS 2. W' = R^T W; rescale as for OFT."""

    name: ClassVar[str] = "oft"
    linear: ClassVar[bool] = False

    blocks: Tensor
    rescale: Tensor | None = None

    def __post_init__(self) -> None:
        check_blocks(tuple(self.blocks.shape), 3)
        check_scale(self.rescale, self.shape[0])

    @property
    def rank(self) -> int:
        return self.blocks.shape[0]

    @property
    def shape(self) -> Shape:
        return (self.blocks.shape[0] * self.blocks.shape[1], 1)

    def fits(self, shape: Sequence[int]) -> bool:
        return len(shape) > 1 and shape[0] == self.shape[0]

    def weight(self, base: Tensor) -> Tensor:
        """The delta W' - W in float32, in the shape of `base` and on its device."""
        import torch

        check_fit(self, base.shape)
        turns = wide(self.blocks, base) - torch.eye(self.blocks.shape[1], device=base.device)
        return _rescaled(_turned(turns, base), base, self.rescale)


def _skew(blocks: Tensor, limit: float) -> Tensor:
    """Skew-symmetric matrices whose norm, taken of all together, is at most `limit` where that is above zero."""
    skew = blocks - blocks.mT
    return skew * (limit / skew.norm()).clamp(max=1) if limit > 0 else skew


def _turned(turns: Tensor, base: Tensor) -> Tensor:
    """(R - I)^T W by blocks of outputs."""
    return (turns.mT @ base.detach().float().reshape(*turns.shape[:2], -1)).reshape(base.shape)


def _rescaled(change: Tensor, base: Tensor, rescale: Tensor | None) -> Tensor:
    """The change to W when what it makes of W is scaled, output by output."""
    if rescale is None:
        return change
    scale = wide(rescale, base).reshape(-1, *[1] * (base.dim() - 1))
    return scale * change + (scale - 1) * base.detach().float()
