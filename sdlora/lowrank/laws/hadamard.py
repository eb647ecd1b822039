"""LoHa: the Hadamard product of two low-rank products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sdlora.errors import SdloraError
from sdlora.lowrank.laws.delta import Shape, check_fit, matches
from sdlora.lowrank.laws.product import pair_product, pair_shape

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Hadamard:
    """delta = alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b), element by element (arXiv:2108.06098; LyCORIS).

    w1_a, w2_a: (out, rank); w1_b, w2_b: (rank, in), for convolutions (rank, in * kh * kw).
    t1, t2: (rank, rank, kh, kw), both or none, the cores of Tucker decompositions; the others are (rank, out) and
    (rank, in) then, and each product is the sum over i, j of w_a[i, o] t[i, j, h, w] w_b[j, n].
    Factors that do not belong together raise SdloraError.
    """

    name: ClassVar[str] = "loha"
    linear: ClassVar[bool] = True

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float
    t1: Tensor | None = None
    t2: Tensor | None = None

    def __post_init__(self) -> None:
        first, second = pair_shape(self.w1_a, self.w1_b, self.t1), pair_shape(self.w2_a, self.w2_b, self.t2)
        if first is None or first != second or (self.t1 is None) != (self.t2 is None):
            factors = (self.w1_a, self.w1_b, self.t1, self.w2_a, self.w2_b, self.t2)
            found = ", ".join("none" if factor is None else str(tuple(factor.shape)) for factor in factors)
            raise SdloraError(
                f"w1_a, w1_b, t1, w2_a, w2_b, t2 of {found} are no LoHa; twice (out, rank), (rank, in), none is wanted,"
                " or (rank, out), (rank, in), (rank, rank, kh, kw)"
            )

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> Shape:
        """Shape of the delta: (out, in), (out, in * kh * kw), or (out, in, kh, kw) with cores."""
        return pair_shape(self.w1_a, self.w1_b, self.t1) or ()

    def fits(self, shape: Sequence[int]) -> bool:
        return matches(self.shape, shape)

    def weight(self, base: Tensor) -> Tensor:
        """The delta in float32, in the shape of `base` and on its device."""
        check_fit(self, base.shape)
        first = pair_product(self.w1_a, self.w1_b, self.t1, base)
        return (first * pair_product(self.w2_a, self.w2_b, self.t2, base) * self.scale).reshape(base.shape)
