"""Changes that are written out whole: added to the parameter, or put in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sdlora.errors import SdloraError
from sdlora.lowrank.laws.delta import Shape, check_fit, matches, wide

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Full:
    """delta = diff, in the shape of the parameter: a weight, the weight of a norm (width,), or a bias (out,)."""

    name: ClassVar[str] = "full"
    linear: ClassVar[bool] = True
    rank: ClassVar[None] = None

    diff: Tensor

    def __post_init__(self) -> None:
        _check_dimensions(self.diff)

    @property
    def shape(self) -> Shape:
        return tuple(self.diff.shape)

    def fits(self, shape: Sequence[int]) -> bool:
        return matches(self.shape, shape)

    def weight(self, base: Tensor) -> Tensor:
        """The delta in float32, in the shape of `base` and on its device."""
        check_fit(self, base.shape)
        return wide(self.diff, base).reshape(base.shape)


@dataclass(frozen=True, eq=False)
class Replacement:
    """W' = value, in the shape of the parameter: what files bring whole (`set_weight`; PEFT's modules_to_save)."""

    name: ClassVar[str] = "replacement"
    linear: ClassVar[bool] = False
    rank: ClassVar[None] = None

    value: Tensor

    def __post_init__(self) -> None:
        _check_dimensions(self.value)

    @property
    def shape(self) -> Shape:
        return tuple(self.value.shape)

    def fits(self, shape: Sequence[int]) -> bool:
        return matches(self.shape, shape)

    def weight(self, base: Tensor) -> Tensor:
        """The delta W' - W in float32, in the shape of `base` and on its device."""
        check_fit(self, base.shape)
        return wide(self.value, base).reshape(base.shape) - base.detach().float()


def _check_dimensions(value: Tensor) -> None:
    if not value.shape:
        raise SdloraError("a single number is no change to a weight; a tensor in the weight's shape is wanted")
