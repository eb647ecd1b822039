"""What all laws have in common, and the shapes they speak of.

A law's factors are tensors, or anything else that has a `shape`: built from what a file's header says, a law tells its
rank and what it fits before a byte of a tensor is read. So nothing here imports torch before it computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from math import prod
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sdlora.errors import SdloraError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Shape = tuple[int, ...]


class Delta(Protocol):
    """A change to one parameter: a weight (out, in[, kh, kw]) or (width,) of a norm, or a bias (out,)."""

    @property
    def linear(self) -> bool:
        """Whether the change is the same whatever the base weight is."""

    @property
    def name(self) -> str:
        """Of the law, as receipts show it."""

    @property
    def rank(self) -> int | None:
        """The inner size, None for laws that have none."""

    @property
    def shape(self) -> Shape:
        """The shape of the change as far as the factors tell it, for messages; 1 stands where they tell nothing."""

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a parameter of this shape can take the change."""

    def weight(self, base: Tensor) -> Tensor:
        """The change W' - W in float32, in the shape of `base` and on its device; SdloraError where it does not fit."""


D = TypeVar("D", bound=Any)


def mapped(delta: D, change: Callable[[Any], Any]) -> D:
    """The same law with `change` applied to each of its factors, those of an inner law included."""
    values = {field.name: getattr(delta, field.name) for field in fields(delta)}
    changed = {
        name: change(value) if hasattr(value, "dtype") else mapped(value, change)
        for name, value in values.items()
        if hasattr(value, "dtype") or hasattr(value, "fits")
    }
    return replace(delta, **changed)


def factors(delta: Delta) -> dict[str, Any]:
    """The factors by the name of their field; those of an inner law under "inner." and theirs."""
    found = {}
    for field in fields(delta):  # type: ignore[arg-type]
        value = getattr(delta, field.name)
        if hasattr(value, "dtype"):
            found[field.name] = value
        elif hasattr(value, "fits"):
            found |= {f"{field.name}.{name}": factor for name, factor in factors(value).items()}
    return found


def squeezed(shape: Sequence[int]) -> Shape:
    """Pointwise convolutions and linear layers are the same: (o, i, 1, 1) is (o, i); out and in always stay."""
    return tuple(shape[:2]) if all(size == 1 for size in shape[2:]) else tuple(shape)


def matches(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether a change of `shape` is one of `wanted`: the same up to trailing ones, or flattened behind out."""
    if squeezed(shape) == squeezed(wanted):
        return True
    return len(shape) == 2 and len(wanted) > 2 and shape[0] == wanted[0] and shape[1] == prod(wanted[1:])


def width_of(vector: Sequence[int]) -> int | None:
    """The length of a vector, which may have ones beside it: (n,), (1, n), (n, 1, 1). None for what is no vector."""
    width = prod(vector)
    return width if vector and max(vector) == width > 0 else None


def check_fit(delta: Delta, shape: Sequence[int]) -> None:
    """Refuse a parameter that cannot take the change; before anything is multiplied, so that no factor costs much."""
    if not delta.fits(shape):
        raise SdloraError(f"a delta of shape {times(delta.shape)} does not fit a weight of shape {times(shape)}")


def wide(factor: Tensor, base: Tensor) -> Tensor:
    """A factor as it is computed with: in float32, beside the base."""
    return factor.detach().to(base.device).float()


def times(shape: Sequence[int]) -> str:
    """As people write it: 320x768."""
    return "x".join(map(str, shape))
