"""A change in two parts: one law, and what it could not express, written out whole or as single numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar

from sdlora.errors import SdloraError
from sdlora.lowrank.laws.delta import Delta, Shape, wide

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sparse:
    """delta = the values at their places, all else being zero (LyCORIS' extraction keeps the largest residues so).

    indices: (axes, n), whole numbers; values: (n,); size: (axes,), whole numbers, the shape of the weight or of its
    flat form (out, in * kh * kw). Whether the size fits a weight is known when the numbers are there.
    """

    name: ClassVar[str] = "sparse"
    linear: ClassVar[bool] = True
    rank: ClassVar[None] = None

    indices: Tensor
    values: Tensor
    size: Tensor

    def __post_init__(self) -> None:
        indices, values, size = (tuple(part.shape) for part in (self.indices, self.values, self.size))
        if len(values) != 1 or size not in ((2,), (4,)) or indices != (*size, *values):
            raise SdloraError(f"indices {indices}, values {values} and size {size} are no sparse residual")

    @property
    def shape(self) -> Shape:
        sizes = self.size.tolist() if hasattr(self.size, "tolist") else ()
        return tuple(int(axis) for axis in sizes)

    def fits(self, shape: Sequence[int]) -> bool:
        size = self.shape
        return not size or (min(size) > 0 and size[0] == shape[0] and prod(size) == prod(shape))

    def weight(self, base: Tensor) -> Tensor:
        """The delta in float32, in the shape of `base` and on its device."""
        import torch

        size, indices = self.shape, self.indices.long()
        if not self.fits(base.shape):
            raise SdloraError(f"a residual of size {size} does not fit a weight of shape {tuple(base.shape)}")
        if indices.numel() and (indices.min() < 0 or (indices >= torch.tensor(size)[:, None]).any()):
            raise SdloraError(f"a residual of size {size} has indices beyond it; the file is damaged")
        sparse = torch.sparse_coo_tensor(indices, wide(self.values, self.values), size, device="cpu")
        return sparse.to_dense().to(base.device).reshape(base.shape)


@dataclass(frozen=True, eq=False)
class Sum:
    """delta = first + rest. first: the law by which the change is known; rest: a linear law."""

    first: Delta
    rest: Delta

    @property
    def name(self) -> str:
        return f"{self.first.name} + {self.rest.name}"

    @property
    def linear(self) -> bool:
        return self.first.linear and self.rest.linear

    @property
    def rank(self) -> int | None:
        return self.first.rank

    @property
    def shape(self) -> Shape:
        return self.first.shape

    def fits(self, shape: Sequence[int]) -> bool:
        return self.first.fits(shape) and self.rest.fits(shape)

    def weight(self, base: Tensor) -> Tensor:
        """The delta in float32, in the shape of `base` and on its device."""
        return self.first.weight(base) + self.rest.weight(base)
