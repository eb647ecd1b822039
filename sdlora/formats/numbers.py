"""From a file's tensors to deltas: numbers checked, alphas and scales by the rules of who wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING, Any

from sdlora.errors import SdloraError
from sdlora.formats.architectures import has_bias
from sdlora.formats.parts import NUMBERS, WHOLE, build, form_of
from sdlora.formats.peft_config import PeftConfig
from sdlora.lowrank.laws import IA3, Delta, OFTv2

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_ALPHA = 1e6
# By dtype: integers of its width, what leaves out the sign, and the least that is infinite or nan (IEEE 754, OCP FP8).
BITS = {
    "float32": ("int32", 0x7FFFFFFF, 0x7F800000),
    "bfloat16": ("int16", 0x7FFF, 0x7F80),
    "float16": ("int16", 0x7FFF, 0x7C00),
    "float8_e5m2": ("int8", 0x7F, 0x7C),
    "float8_e4m3fn": ("int8", 0x7F, 0x7F),
}


def deltas_of_module(
    path: str, keys: Mapping[str, str], tensors: Mapping[str, Tensor], config: PeftConfig | None
) -> dict[str, Delta]:
    """The deltas of one module from the tensors of its parts: of its weight under "", of its bias under ".bias".

    path: the module's; keys: by part; config: PEFT's, if there is one, which knows alphas and more.
    SdloraError: numbers that are not finite or of the wrong kind, parts that do not belong together.
    """
    parts: dict[str, Any] = {}
    for part, key in keys.items():
        value = tensors[key]
        parts[part] = _number(key, value) if part in NUMBERS else checked(key, value, part in WHOLE)
    inner = path.partition(".")[2]
    if config and config.kind == "IA3":
        parts["by_input"] = config.is_feedforward(inner)
    form = form_of(parts)
    if form and form.scalable:
        alpha = _scaled(parts, inner, config)
    else:
        alpha = parts.pop("alpha", None)
    if alpha is not None and abs(alpha) > LARGEST_ALPHA:
        raise SdloraError(f"alpha is {alpha:g}, which no training gives; the file is damaged")
    deltas = build(parts, alpha)
    law = deltas.get("")
    if config and isinstance(law, OFTv2):
        deltas[""] = replace(law, peft=True, series=config.series)
    if "ia3_l" in parts and isinstance(law, IA3) and not law.on_input and has_bias(path):
        deltas[".bias"] = law  # PEFT scales what the layer gives, bias and all
    return deltas


def _scaled(parts: dict[str, Any], inner: str, config: PeftConfig | None) -> float | None:
    """The alpha of a law that alpha / rank scales, None where the scale is 1; of one without a rank, its factor scaled.

    "scale" stands for alpha / rank, as in A1111; "scalar" multiplies it, as in LyCORIS before it was folded in.
    """
    alpha, scale, scalar = (parts.pop(name, None) for name in ("alpha", "scale", "scalar"))
    law = build(parts, None).get("")
    rank = law.rank if law else None
    if rank is not None:
        if scale is not None:
            alpha = scale * rank
        elif alpha is None and config:
            alpha = config.alpha_of(inner, rank)
        return alpha if scalar is None else (rank if alpha is None else alpha) * scalar
    factor = (1.0 if scale is None else scale) * (1.0 if scalar is None else scalar)
    if config and config.kind == "LOKR":
        factor *= config.scale_of(inner)  # PEFT scales whole factors too
    for name in ("lokr_w1", "diff"):
        if name in parts and factor != 1:
            parts[name] = parts[name].float() * factor
    return None


def _number(key: str, value: Tensor) -> float:
    if value.numel() != 1 or value.is_complex():
        raise SdloraError(f"{key} is no single number; the file is damaged")
    number = float(value.item())
    if not isfinite(number):
        raise SdloraError(f"{key} is {number}, which is no finite number; use an earlier checkpoint")
    return number


def checked(key: str, value: Tensor, whole: bool = False) -> Tensor:
    """The value itself; SdloraError unless it holds finite numbers with a fraction, or whole numbers for `whole`."""
    if value.is_floating_point() == whole or value.is_complex():
        wanted = "whole numbers" if whole else "numbers with a fraction"
        raise SdloraError(f"{key} holds {str(value.dtype)[6:]} where {wanted} belong; save it again")
    if value.numel() and not whole and not _finite(value):
        raise SdloraError(f"{key} holds numbers that are nan or infinite; use an earlier checkpoint")
    return value


def _finite(value: Tensor) -> bool:
    """By the bits, in numpy: torch's threads would meet for each tensor, and wait long where a core is busy."""
    import torch

    name = str(value.dtype)[6:]
    if name not in BITS:
        return bool(torch.isfinite(value.double()).all())
    integers, signless, limit = BITS[name]
    return int((value.reshape(-1).view(getattr(torch, integers)).numpy() & signless).max()) < limit


def short(number: float) -> str:
    """In few digits that read back as the same number."""
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)
