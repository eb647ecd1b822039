"""(IA)^3: every input or output of a layer is scaled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar

from sdlora.errors import SdloraError
from sdlora.lowrank.laws.delta import Shape, check_fit, wide, width_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class IA3:
    """delta = W * vector, along the inputs of W if `on_input`, else along its outputs (arXiv:2205.05638; LyCORIS).

    vector: (n,), or with ones beside n as writers lay it out: (1, n), (n, 1), (1, n, 1, 1). The axis is that of
    `on_input` whatever the layout: LyCORIS and PEFT both write (1, out, 1, 1) for a convolution's outputs.
    The delta of a vector of zeros is nothing. PEFT's `ia3_l` multiplies, so that its nothing is 1: hand in ia3_l - 1.
    On the outputs it also fits a bias (out,), which PEFT scales and LyCORIS leaves alone.
    """

    name: ClassVar[str] = "ia3"
    linear: ClassVar[bool] = False
    rank: ClassVar[None] = None

    vector: Tensor
    on_input: bool

    def __post_init__(self) -> None:
        shape = tuple(self.vector.shape)
        if width_of(shape) is None:
            raise SdloraError(f"{shape} is no (IA)^3 vector; (n,), or n with ones beside it, is wanted")

    @property
    def shape(self) -> Shape:
        width = prod(self.vector.shape)
        return (1, width) if self.on_input else (width, 1)

    def fits(self, shape: Sequence[int]) -> bool:
        axis = int(self.on_input)
        return len(shape) > axis and shape[axis] == prod(self.vector.shape)

    def weight(self, base: Tensor) -> Tensor:
        """The delta in float32, in the shape of `base` and on its device."""
        check_fit(self, base.shape)
        along = [1] * base.dim()
        along[int(self.on_input)] = -1
        return base.detach().float() * wide(self.vector, base).reshape(along)
