"""An adapter with fewer ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import Delta, Full, Replacement
from sdlora.lowrank.truncation import Keep, Outcome, as_low_rank


def resized(adapter: Adapter, keep: Keep, bases: Callable[[str], Tensor] | None = None) -> Iterator[Outcome]:
    """Every delta at the kept ranks as plain LoRA, one by one.

    What has no ranks is passed on unchanged, and its outcome's `kept` is None: deltas that are written out whole, norms
    and biases. LoRA that loses no rank is passed on too, its `kept` being whole.
    bases: the untouched weight of a path, needed where a law depends on it (DoRA, (IA)^3, OFT ...).
    SdloraError: such a law without `bases`, before anything is computed; factors that are not finite.
    """
    if bases is None:
        _refuse_what_needs_a_base(adapter)
    for path, delta in adapter.deltas.items():
        try:
            yield _outcome(path, delta, keep, bases)
        except SdloraError as error:
            raise SdloraError(f"{path}: {error}") from error


def _outcome(path: str, delta: Delta, keep: Keep, bases: Callable[[str], Tensor] | None) -> Outcome:
    if _stays(delta):
        return Outcome(path, delta, None)
    base = None if delta.linear or bases is None else bases(path)
    shape = delta.shape if base is None else tuple(base.shape)
    if len(shape) < 2:
        return Outcome(path, delta, None)
    return Outcome(path, *as_low_rank(delta, shape, keep, base))


def _stays(delta: Delta) -> bool:
    return isinstance(delta, Full | Replacement) or len(delta.shape) < 2


def _refuse_what_needs_a_base(adapter: Adapter) -> None:
    for path, delta in adapter.deltas.items():
        if not delta.linear and not _stays(delta):
            raise SdloraError(f"{path}: {delta.name} depends on the base model's weights; give that model to resize it")
