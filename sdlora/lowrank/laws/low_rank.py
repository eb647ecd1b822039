"""LoRA and LoCon, with or without a Tucker core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sdlora.errors import SdloraError
from sdlora.lowrank.laws.delta import Shape, matches, times

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
        pointwise = len(up) == 2 or up[2:] == (1, 1)
        if len(down) not in (2, 4) or not pointwise or up[1] != down[0] or down[0] == 0:
            raise SdloraError(
                f"down {down} and up {up} are no low-rank pair; (rank, in[, kh, kw]) and (out, rank[, 1, 1]) are wanted"
            )
        if self.mid is not None:
            mid = tuple(self.mid.shape)
            if len(mid) != 4 or mid[:2] != (down[0], down[0]) or down[2:] not in ((), (1, 1)):
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
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the delta can be added to a weight of this shape: (out, in) fits (out, in, 1, 1) and the reverse."""
        return matches(self.shape, shape)

    def weight(self, base: Tensor) -> Tensor:
        """The delta in float32, in the shape of `base` and on its device."""
        if not self.fits(base.shape):
            raise SdloraError(
                f"a delta of shape {times(self.shape)} does not fit a weight of shape {times(base.shape)}"
            )
        up_or = self.up.detach().to(base.device).float().flatten(1) * self.scale
        down_ri = self.down.detach().to(base.device).float().flatten(1)
        if self.mid is None:
            return (up_or @ down_ri).reshape(base.shape)
        mid = self.mid.detach().to(base.device).float()
        rank, _, *kernel = mid.shape
        # (out, m) @ (m, n kh kw) first, then n with down: two products, no einsum over five indices.
        wide = (up_or @ mid.flatten(1)).reshape(-1, rank, kernel[0] * kernel[1])
        return (down_ri.T @ wide).reshape(base.shape)
