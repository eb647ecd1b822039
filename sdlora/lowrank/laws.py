"""The laws of a delta: one small class for each way of writing down a change to one module's weight."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sdlora.errors import SdloraError


@dataclass(frozen=True, eq=False)
class LowRank:
    """delta = alpha / rank * up @ down: LoRA (arXiv:2106.09685, section 4.1), and LoCon for convolutions.

    down: (rank, in) or (rank, in, kh, kw); up: (out, rank) or (out, rank, 1, 1).
    Factors that do not belong together raise SdloraError.
    """

    down: Tensor
    up: Tensor
    alpha: float

    def __post_init__(self) -> None:
        down, up = tuple(self.down.shape), tuple(self.up.shape)
        pointwise = len(up) == 2 or up[2:] == (1, 1)
        if len(down) not in (2, 4) or not pointwise or up[1] != down[0] or down[0] == 0:
            raise SdloraError(
                f"down {down} and up {up} are no low-rank pair; (rank, in[, kh, kw]) and (out, rank[, 1, 1]) are wanted"
            )

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the delta: (out, in) or (out, in, kh, kw)."""
        return (self.up.shape[0], *self.down.shape[1:])

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the delta can be added to a weight of this shape: (out, in) fits (out, in, 1, 1) and the reverse."""
        return _without_trailing_ones(self.shape) == _without_trailing_ones(shape)

    def weight(self, base: Tensor) -> Tensor:
        """The delta in float32, in the shape of `base` and on its device."""
        if not self.fits(base.shape):
            raise SdloraError(f"a delta of shape {self.shape} does not fit a weight of shape {tuple(base.shape)}")
        up_or = self.up.detach().to(base.device).float().flatten(1) * self.scale
        down_ri = self.down.detach().to(base.device).float().flatten(1)
        return (up_or @ down_ri).reshape(base.shape)


def _without_trailing_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """(o, i, 1, 1) -> (o, i); out and in always stay."""
    return tuple(shape[:2]) if all(size == 1 for size in shape[2:]) else tuple(shape)
