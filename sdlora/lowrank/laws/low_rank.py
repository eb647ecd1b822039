"""LoRA and LoCon, with or without a Tucker core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sdlora.errors import SdloraError
from sdlora.lowrank.laws.delta import Shape, check_fit, matches, wide
from sdlora.lowrank.laws.product import product, product_shape

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """delta = alpha / rank * up @ down: LoRA (arXiv:2106.09685, section 4.1), and LoCon for convolutions.

    down: (rank, in) or (rank, in, kh, kw); up: (out, rank) or (out, rank, 1, 1).
    mid: (rank, rank, kh, kw), the core of a Tucker decomposition; down is (rank, in[, 1, 1]) then and
    delta = alpha / rank * sum over m, n of up[o, m] mid[m, n, h, w] down[n, i] (LyCORIS, arXiv:2309.14859).
    Factors that do not belong together raise SdloraError.
    """

    name: ClassVar[str] = "lora"
    linear: ClassVar[bool] = True

    down: Tensor
    up: Tensor
    alpha: float
    mid: Tensor | None = None

    def __post_init__(self) -> None:
        down, up = tuple(self.down.shape), tuple(self.up.shape)
        if product_shape(up, down) is None:
            raise SdloraError(
                f"down {down} and up {up} are no low-rank pair; (rank, in[, kh, kw]) and (out, rank[, 1, 1]) are wanted"
            )
        if self.mid is not None and product_shape(up, down, self.mid.shape) is None:
            mid = tuple(self.mid.shape)
            raise SdloraError(f"mid {mid} is no core for down {down}; (rank, rank, kh, kw) is wanted")

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> Shape:
        """Shape of the delta: (out, in) or (out, in, kh, kw)."""
        core = None if self.mid is None else self.mid.shape
        return product_shape(self.up.shape, self.down.shape, core) or ()

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the delta can be added to a weight of this shape: (out, in) fits (out, in, 1, 1) and the reverse."""
        return matches(self.shape, shape)

    def weight(self, base: Tensor) -> Tensor:
        """The delta in float32, in the shape of `base` and on its device."""
        check_fit(self, base.shape)
        mid = None if self.mid is None else wide(self.mid, base)
        return product(wide(self.up, base) * self.scale, wide(self.down, base), mid).reshape(base.shape)
