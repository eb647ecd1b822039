"""What another law could not express, as single numbers: LyCORIS' extraction keeps the largest so on request."""

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
class Residual:
    """delta = inner + the numbers at their places, all others being zero (LyCORIS' sparse bias).

    inner: a linear law. indices: (axes, n), whole numbers; values: (n,); size: (axes,), whole numbers, the shape of
    the weight or of its flat form (out, in * kh * kw). Whether the size fits is known when the numbers are there.
    """

    linear: ClassVar[bool] = True

    inner: Delta
    indices: Tensor
    values: Tensor
    size: Tensor

    def __post_init__(self) -> None:
        indices, values, size = (tuple(part.shape) for part in (self.indices, self.values, self.size))
        if len(values) != 1 or size not in ((2,), (4,)) or indices != (*size, *values):
            raise SdloraError(f"indices {indices}, values {values} and size {size} are no sparse residual")

    @property
    def name(self) -> str:
        return f"{self.inner.name} + sparse"

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    @property
    def shape(self) -> Shape:
        return self.inner.shape

    def fits(self, shape: Sequence[int]) -> bool:
        return self.inner.fits(shape)

    def weight(self, base: Tensor) -> Tensor:
        """The delta in float32, in the shape of `base` and on its device."""
        import torch

        size = tuple(int(axis) for axis in self.size.tolist())
        if min(size) < 1 or prod(size) != base.numel() or size[0] != base.shape[0]:
            raise SdloraError(f"a residual of size {size} does not fit a weight of shape {tuple(base.shape)}")
        indices = self.indices.long()
        if indices.numel() and (indices.min() < 0 or (indices >= torch.tensor(size)[:, None]).any()):
            raise SdloraError(f"a residual of size {size} has indices beyond it; the file is damaged")
        sparse = torch.sparse_coo_tensor(indices, wide(self.values, self.values), size, device="cpu")
        return self.inner.weight(base) + sparse.to_dense().to(base.device).reshape(base.shape)
