"""The weights of a base model, for changes that depend on them, and how large a change may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sdlora.errors import SdloraError

if TYPE_CHECKING:
    from torch import Tensor

    from sdlora.formats.checkpoints import Checkpoint
    from sdlora.lowrank.laws import Delta

LARGEST = 3.4e38  # in float32


def bases_of(base: Checkpoint | None) -> Callable[[str], Tensor] | None:
    """The untouched parameters of a model by path; None without a model."""
    if base is None:
        return None

    def tensor(parameter: str) -> Tensor:
        if parameter not in base.parameters:
            raise SdloraError(f"{base.path} has no {parameter}; give the model that the LoRA was trained on")
        return base.tensor(parameter).float()

    return tensor


def base_of(delta: Delta, parameter: str, base: Checkpoint | None) -> Tensor | None:
    """The untouched parameter if the change depends on it, else None; SdloraError: it is needed and not to be had."""
    if delta.linear:
        return None
    if base is None or parameter not in base.parameters:
        how = "; give that model" if base is None else f", and {base.path} has none there; give the one it was made for"
        raise SdloraError(f"{delta.name} depends on the base model's weights{how}")
    return base.tensor(parameter).float()


def refuse_huge(norm: float) -> None:
    """SdloraError where a change of this norm is not finite, or would not be in float32."""
    if not norm < LARGEST:
        raise SdloraError("numbers so large that float32 cannot hold the change; it cannot be applied")
