"""Deltas as the tensors of a file: how each law is spelled, and which naming can hold it. The inverse of `parts`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import (
    BOFT,
    IA3,
    OFT,
    Delta,
    DoRA,
    Full,
    GLoRA,
    Hadamard,
    Kronecker,
    LowRank,
    OFTv2,
    Replacement,
    Rotation,
)

Tensors = dict[str, Tensor]  # of one delta: suffix -> tensor

# What these hold is what PEFT's LoRA holds: diffusers hands all that it reads to PEFT.
PLAIN = ("diffusers", "peft")
OF_PLAIN = {"down": "lora_A.weight", "up": "lora_B.weight"}
# PEFT drops the last word on disk; transformers, which diffusers hands the text encoders' keys as they are, wants it.
MAGNITUDES = {"peft": "lora_magnitude_vector", "diffusers": "lora_magnitude_vector.weight"}
BIAS = ".bias"


@dataclass(frozen=True)
class Spelling:
    """How a law is spelled in kohya's and ComfyUI's names. alpha: the field that goes into the key `alpha`."""

    suffixes: Mapping[str, str]  # field -> suffix
    alpha: str | None = None
    more: Callable[[Any], Tensors] = lambda _: {}


def _fields(law: type, prefix: str = "", suffix: str = "") -> dict[str, str]:
    return {field.name: f"{prefix}{field.name}{suffix}" for field in fields(law) if field.name != "alpha"}


_ROTATED = {"blocks": "oft_blocks", "rescale": "rescale"}
SPELLINGS: Mapping[type, Spelling] = {
    LowRank: Spelling({"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight"}, "alpha"),
    Hadamard: Spelling(_fields(Hadamard, "hada_"), "alpha"),
    Kronecker: Spelling(_fields(Kronecker, "lokr_"), "alpha"),
    GLoRA: Spelling(_fields(GLoRA, suffix=".weight"), "alpha"),
    OFT: Spelling(_ROTATED, "constraint"),
    BOFT: Spelling(_ROTATED, "constraint"),
    Rotation: Spelling({"blocks": "oft_diag", "rescale": "rescale"}),
    OFTv2: Spelling({"vectors": "oft_R.weight"}, None, lambda law: _flag("oft_R.scaled_oft", law.scaled)),
    IA3: Spelling({"vector": "weight"}, None, lambda law: {"on_input": torch.tensor(int(law.on_input))}),
    Replacement: Spelling({"value": "set_weight"}),
}


def tensors_of(adapter: Adapter, names: Mapping[str, str], naming: str) -> Tensors:
    """All keys of a file but those of learned tokens.

    names: of each module, by its path without ".bias". SdloraError: what the naming cannot hold, by name.
    """
    refuse(adapter, naming)
    spelled: Tensors = {}
    for parameter, delta in adapter.deltas.items():
        module = parameter.removesuffix(BIAS)
        if parameter != module:
            beside = adapter.deltas.get(module)
            held = {"b_norm" if beside is not None and _of_norm(beside) else "diff_b": _factor(delta, "diff")}
        elif naming in PLAIN:
            held = plain(delta, MAGNITUDES[naming])
        else:
            held = lycoris(delta)
        spelled |= {f"{names[module]}.{suffix}": tensor for suffix, tensor in held.items()}
    return spelled


def lycoris(delta: Delta) -> Tensors:
    """A change of a weight as LyCORIS spells it, which kohya's and ComfyUI's names share."""
    if isinstance(delta, DoRA):
        return lycoris(delta.inner) | {"dora_scale": _magnitude(delta)}
    if isinstance(delta, Full):
        return {"w_norm" if _of_norm(delta) else "diff": delta.diff}
    spelling = SPELLINGS[type(delta)]
    held = {suffix: getattr(delta, name) for name, suffix in spelling.suffixes.items()}
    if spelling.alpha and delta.rank is not None:
        held["alpha"] = torch.tensor(float(getattr(delta, spelling.alpha)))
    return {suffix: tensor for suffix, tensor in held.items() if tensor is not None} | spelling.more(delta)


def plain(delta: Delta, magnitude_key: str) -> Tensors:
    """A change of a weight as PEFT spells it; alpha is told beside the tensors. A Tucker core has no place there."""
    inner = delta.inner if isinstance(delta, DoRA) else delta
    assert isinstance(inner, LowRank)
    held = {suffix: getattr(inner, name) for name, suffix in OF_PLAIN.items()}
    if isinstance(delta, DoRA):
        magnitude = delta.magnitude.reshape(-1)
        ones = (1,) * (len(inner.shape) - 2)
        held[magnitude_key] = magnitude.reshape(1, -1, *ones) if ones else magnitude
    return held


def refuse(adapter: Adapter, naming: str) -> None:
    """SdloraError, naming modules and laws, where a naming cannot hold all of an adapter."""
    odd = {path: delta for path, delta in adapter.deltas.items() if not holds(naming, path, delta)}
    mixed = _mixed(adapter) if naming in PLAIN else {}
    if odd or mixed:
        told = odd or mixed
        path = next(iter(told))
        laws = ", ".join(dict.fromkeys(delta.name for delta in told.values()))
        why = "" if odd else " beside others without a magnitude in the same component"
        weights = [delta for delta in told.values() if len(delta.shape) > 1]
        with_base = "" if all(delta.linear for delta in weights) else " --base MODEL"
        advice = [f"convert it with --to-lora --rank 16{with_base}"] if weights else []
        advice += ["choose kohya or comfyui"] if naming in PLAIN else []
        what = f"{len(told)} changes ({laws}){why}, such as {path}"
        raise SdloraError(f"names of {naming} cannot hold {what}; {' or '.join(advice) or 'leave them out'}")
    if adapter.embeddings and naming in PLAIN:
        raise SdloraError(
            f"names of {naming} cannot hold learned tokens ({', '.join(adapter.embeddings)}); choose kohya or comfyui"
        )


def holds(naming: str, parameter: str, delta: Delta) -> bool:
    """Whether a naming can hold the change to a parameter."""
    if parameter.endswith(BIAS):
        return naming not in PLAIN and isinstance(delta, Full)
    inner = delta.inner if isinstance(delta, DoRA) else delta
    if naming in PLAIN:
        by_output = not isinstance(delta, DoRA) or _by_output(delta)
        return isinstance(inner, LowRank) and inner.mid is None and by_output
    if isinstance(inner, OFTv2):  # a file has no word for PEFT's ways of turning
        return not inner.peft and inner.series == OFTv2.series
    if isinstance(inner, Replacement):
        return naming == "comfyui" and inner is delta
    return isinstance(inner, Full) or type(inner) in SPELLINGS


def embeddings_of(adapter: Adapter) -> Tensors:
    """Learned tokens as LyCORIS bundles them: one text encoder has another key than two."""
    two = any(component == "text_encoder_2" for held in adapter.embeddings.values() for component in held)
    keys = {"text_encoder": "clip_l" if two else "string_to_param.*", "text_encoder_2": "clip_g"}
    return {
        f"bundle_emb.{token}.{keys[component]}": vectors
        for token, held in adapter.embeddings.items()
        for component, vectors in held.items()
    }


def _mixed(adapter: Adapter) -> dict[str, Delta]:
    """The changes with a magnitude in components where others have none: PEFT has one switch for all of them."""
    with_magnitude = {path: delta for path, delta in adapter.deltas.items() if isinstance(delta, DoRA)}
    without = {path.partition(".")[0] for path in adapter.deltas if path not in with_magnitude}
    return {path: delta for path, delta in with_magnitude.items() if path.partition(".")[0] in without}


def _of_norm(delta: Delta) -> bool:
    return len(delta.shape) == 1


def _by_output(delta: DoRA) -> bool:
    return delta.by_output or delta.magnitude.shape[0] == delta.magnitude.numel() > 1 or delta.inner.shape[0] == 1


def _magnitude(delta: DoRA) -> Tensor:
    """With an axis for each of the weight's: a vector alone would be spread along the wrong one by others."""
    if not _by_output(delta):
        return delta.magnitude
    return delta.magnitude.reshape(-1, *(1,) * max(len(delta.inner.shape) - 1, 1))


def _factor(delta: Delta, name: str) -> Tensor:
    factor = getattr(delta, name)
    assert isinstance(factor, torch.Tensor)
    return factor


def _flag(suffix: str, there: bool) -> Tensors:
    return {suffix: torch.tensor(1.0)} if there else {}
