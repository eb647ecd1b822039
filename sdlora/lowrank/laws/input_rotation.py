"""OFTv2, and BOFT as PEFT has it: the inputs of a layer are rotated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt, prod
from typing import TYPE_CHECKING, ClassVar

from sdlora.errors import SdloraError
from sdlora.lowrank.laws.delta import Shape, check_fit, wide
from sdlora.lowrank.laws.rotation import butterfly, cayley, check_blocks, check_scale

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class OFTv2:
    """W' = W R^T for each of n blocks of inputs (arXiv:2506.19847): `oft_R.weight`, by OneTrainer and PEFT.

    vectors: (n, b * (b - 1) / 2), the upper triangle of Q = -Q^T row by row. n * b is the number of inputs,
    in * kh * kw for convolutions; a single vector for more inputs is shared by all blocks.
    scaled: `oft_R.scaled_oft` stands beside it, and Q is divided by 2 * sqrt(b - 1) (OneTrainer).
    series: the factors of Q, Q^2, ... in R = I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4, Cayley's formula by Neumann's series, as
    OneTrainer and PEFT from 0.18 on have it with 5 terms; before 0.18 PEFT ended in 2 Q^4. None is PEFT's
    `use_cayley_neumann` off: R = (I - Q) (I + Q)^-1.
    peft: whether PEFT wrote it. OneTrainer turns convolutions the other way, W' = W R.
    """

    name: ClassVar[str] = "oftv2"
    linear: ClassVar[bool] = False

    vectors: Tensor
    scaled: bool = False
    series: tuple[float, ...] | None = (2, 2, 2, 1)
    peft: bool = False

    def __post_init__(self) -> None:
        shape = tuple(self.vectors.shape)
        if len(shape) != 2 or not prod(shape) or self.rank * (self.rank - 1) // 2 != shape[1]:
            raise SdloraError(f"{shape} are no vectors of rotations; (n, b * (b - 1) / 2) is wanted")

    @property
    def rank(self) -> int:
        """The size of a block, which OneTrainer shows as the rank."""
        return (1 + isqrt(1 + 8 * self.vectors.shape[1])) // 2

    @property
    def shape(self) -> Shape:
        return (1, self.vectors.shape[0] * self.rank)

    def fits(self, shape: Sequence[int]) -> bool:
        if len(shape) < 2:
            return False
        inputs, shared = prod(shape[1:]), self.vectors.shape[0] == 1
        return inputs == self.shape[1] or (shared and inputs > 0 and inputs % self.rank == 0)

    def weight(self, base: Tensor) -> Tensor:
        """The delta W' - W in float32, in the shape of `base` and on its device."""
        check_fit(self, base.shape)
        turns = self._turns(base)
        if self.peft or base.dim() == 2:
            turns = turns.mT
        base_nob = base.detach().float().reshape(base.shape[0], -1, self.rank).transpose(0, 1)
        return (base_nob @ turns).transpose(0, 1).reshape(base.shape)

    def _turns(self, base: Tensor) -> Tensor:
        """R - I, (n, b, b)."""
        import torch

        vectors = wide(self.vectors, base)
        if self.scaled:
            vectors = vectors / (2 * (self.rank - 1) ** 0.5)
        rows, columns = torch.triu_indices(self.rank, self.rank, 1, device=base.device)
        upper = vectors.new_zeros(vectors.shape[0], self.rank, self.rank)
        upper[:, rows, columns] = vectors
        skew = upper - upper.mT
        if self.series is None:
            return cayley(-skew)
        turns, identity = torch.zeros_like(skew), torch.eye(self.rank, device=base.device)
        for factor in reversed(self.series):
            turns = skew @ (factor * identity + turns)
        return turns


@dataclass(frozen=True, eq=False)
class InputBOFT:
    """W' = scale * W B_1^T ... B_m^T, a butterfly of m block rotations (arXiv:2311.06243): PEFT's `boft_R`, `boft_s`.

    blocks: (m, n, b, b) with n * b the number of inputs, in * kh * kw for convolutions. Q = (blocks - blocks^T) / 2,
    R = (I - Q) (I + Q)^-1 for each block; the blocks of stage i turn inputs that lie 2^i * b / 2 apart.
    scale: (out, 1) or, for convolutions, (1, out), a factor for each output.
    """

    name: ClassVar[str] = "boft"
    linear: ClassVar[bool] = False

    blocks: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        check_blocks(tuple(self.blocks.shape), 4)
        check_scale(self.scale)

    @property
    def rank(self) -> int:
        """The size of a block."""
        return self.blocks.shape[2]

    @property
    def shape(self) -> Shape:
        return (prod(self.scale.shape), self.blocks.shape[1] * self.blocks.shape[2])

    def fits(self, shape: Sequence[int]) -> bool:
        return len(shape) > 1 and (shape[0], prod(shape[1:])) == self.shape

    def weight(self, base: Tensor) -> Tensor:
        """The delta W' - W in float32, in the shape of `base` and on its device."""
        check_fit(self, base.shape)
        blocks, scale = wide(self.blocks, base), wide(self.scale, base).reshape(-1, 1)
        base_oi = base.detach().float().flatten(1)
        change_io = butterfly(cayley((blocks.mT - blocks) / 2), base_oi.T, interleaved=False)
        return (scale * change_io.T + (scale - 1) * base_oi).reshape(base.shape)
