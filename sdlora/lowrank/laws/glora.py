"""GLoRA: a low-rank change, and a low-rank change of the weight by itself."""

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
class GLoRA:
    """delta = alpha / rank * (b1 @ b2 + W @ a1 @ a2), along the inputs of W (arXiv:2306.07967; LyCORIS 3 and later).

    a1: (in, rank); a2: (rank, in); b1: (out, rank); b2: (rank, in) or (rank, in, kh, kw); each may end in (1, 1).
    bm: (rank, rank, kh, kw), the core of a Tucker decomposition between b1 and b2.
    Before LyCORIS 3 the names of each pair were the other way round: a1 and b1 (rank, in), a2 (in, rank), b2 (out,
    rank). The shapes tell; where both orders would do, it is the one whose rank is not above `in`, the new one first.
    Factors that do not belong together raise SdloraError.
    """

    name: ClassVar[str] = "glora"
    linear: ClassVar[bool] = False

    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    alpha: float
    bm: Tensor | None = None

    def __post_init__(self) -> None:
        new, old = self._orders()
        if _change(new, self.bm) is None and _change(old, self.bm) is None:
            found = ", ".join(str(tuple(factor.shape)) for factor in (*new, self.bm) if factor is not None)
            raise SdloraError(
                f"a1, a2, b1, b2 of {found} are no GLoRA; (in, rank), (rank, in), (out, rank), (rank, in) is wanted,"
                " or each pair the other way round"
            )

    def _orders(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """In the new order and in the old one: (in, rank), (rank, in), (out, rank), (rank, in)."""
        return (self.a1, self.a2, self.b1, self.b2), (self.a2, self.a1, self.b2, self.b1)

    def _ordered(self) -> tuple[Tensor, ...]:
        new, old = self._orders()
        if _change(new, self.bm) is None:
            return old
        inputs, rank = new[0].shape[:2]
        return new if rank <= inputs or _change(old, self.bm) is None else old

    @property
    def rank(self) -> int:
        return self._ordered()[0].shape[1]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> Shape:
        """Shape of the delta: (out, in) or (out, in, kh, kw)."""
        return _change(self._ordered(), self.bm) or ()

    def fits(self, shape: Sequence[int]) -> bool:
        return matches(self.shape, shape) and shape[1] == self.shape[1]

    def weight(self, base: Tensor) -> Tensor:
        """The delta in float32, in the shape of `base` and on its device."""
        check_fit(self, base.shape)
        before, behind, up, down = (wide(factor, base) for factor in self._ordered())
        change = product(up, down, None if self.bm is None else wide(self.bm, base)).reshape(base.shape)
        base_oki = base.detach().float().flatten(2) if base.dim() > 2 else base.detach().float()[..., None]
        of_itself = base_oki.transpose(1, 2) @ before.flatten(1) @ behind.flatten(1)
        return (change + of_itself.transpose(1, 2).reshape(base.shape)) * self.scale


def _change(factors: Sequence[Tensor], core: Tensor | None) -> Shape | None:
    """Shape of the change by factors in the new order; None where they do not belong together."""
    before, behind, up, down = (tuple(factor.shape) for factor in factors)
    of_itself = product_shape(before, behind)
    change = product_shape(up, down, None if core is None else core.shape)
    if of_itself is None or change is None or before[1] != up[1]:
        return None
    inputs = change[1]
    return change if of_itself in ((inputs, inputs), (inputs, inputs, 1, 1)) else None
