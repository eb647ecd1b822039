"""DoRA: a change of direction by another law, and a magnitude of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar

from sdlora.errors import SdloraError
from sdlora.lowrank.laws.delta import Delta, Shape, check_fit, times, wide, width_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class DoRA:
    """W' = magnitude * (W + inner) / |W + inner|, the norm taken for each output or each input (arXiv:2402.09353).

    The norm is that of the changed weight; loaders that divide by |W| are wrong. What is zero stays zero.
    inner: any law of a weight. magnitude: its shape says whose it is. (out,) and (out, 1[, 1, 1]) are of the outputs,
    (1, in[, 1, 1]) of the inputs. PEFT writes a convolution's outputs as (1, out, 1, 1), which for as many inputs as
    outputs looks the same as the inputs': only the key's name tells, so for `lora_magnitude_vector` give `by_output`,
    and leave it out for `dora_scale`.
    """

    linear: ClassVar[bool] = False

    inner: Delta
    magnitude: Tensor
    by_output: bool = False

    def __post_init__(self) -> None:
        shape = tuple(self.magnitude.shape)
        if width_of(shape) is None or any(size != 1 for size in shape[2:]):
            raise SdloraError(f"{shape} is no DoRA magnitude; (out,), (out, 1[, 1, 1]) or (1, in[, 1, 1]) is wanted")

    @property
    def name(self) -> str:
        return f"{self.inner.name} + dora"

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    @property
    def shape(self) -> Shape:
        return self.inner.shape

    def fits(self, shape: Sequence[int]) -> bool:
        return self.inner.fits(shape) and self._axis(shape) is not None

    def weight(self, base: Tensor) -> Tensor:
        """The delta W' - W in float32, in the shape of `base` and on its device."""
        import torch

        check_fit(self.inner, base.shape)
        axis = self._axis(base.shape)
        if axis is None:
            magnitude = tuple(self.magnitude.shape)
            raise SdloraError(f"a DoRA magnitude {magnitude} does not fit a weight of shape {times(base.shape)}")
        before = base.detach().float()
        turned = before + self.inner.weight(base)
        others = [other for other in range(base.dim()) if other != axis]
        norm = torch.linalg.vector_norm(turned, dim=others, keepdim=True)
        scale = torch.where(norm > 0, wide(self.magnitude, base).reshape(norm.shape) / norm, 0)
        return turned * scale - before

    def _axis(self, shape: Sequence[int]) -> int | None:
        """The axis that the magnitude runs along in a weight: 0 for outputs, 1 for inputs, None where neither fits."""
        sizes, width = tuple(self.magnitude.shape), prod(self.magnitude.shape)
        of_outputs = self.by_output or sizes[0] == width
        of_inputs = not self.by_output and sizes[1:2] == (width,)
        if len(shape) > 1 and of_outputs and shape[0] == width:
            return 0
        return 1 if len(shape) > 1 and of_inputs and shape[1] == width else None
