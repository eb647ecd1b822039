"""How keys of LoRA files end, and the laws that their parts make: one row a part, one row a law."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sdlora.errors import SdloraError
from sdlora.formats.hcp import translated
from sdlora.lowrank.laws import (
    BOFT,
    IA3,
    OFT,
    Delta,
    DoRA,
    Full,
    GLoRA,
    Hadamard,
    InputBOFT,
    Kronecker,
    LowRank,
    OFTv2,
    Replacement,
    Rotation,
    Sparse,
    Sum,
)

# What keys end in, up to three names, and the part of a delta that they hold then.
SUFFIXES = {
    "lora_down.weight": "down",
    "lora.down.weight": "down",
    "lora_linear_layer.down.weight": "down",
    "lora_A.weight": "down",
    "lora_up.weight": "up",
    "lora.up.weight": "up",
    "lora_linear_layer.up.weight": "up",
    "lora_B.weight": "up",
    "lora_mid.weight": "mid",
    "alpha": "alpha",
    "lora_alpha": "alpha",
    "scale": "scale",
    "dora_scale": "magnitude",
    "lora_magnitude_vector": "magnitude_out",
    "lora_magnitude_vector.weight": "magnitude_out",
    "magnitude": "magnitude_out",
    "diff": "diff",
    "set_weight": "value",
    "set_bias": "bias_value",
    "bias": "bias",
    "scalar": "scalar",
    "weight": "weight",
    "on_input": "on_input",
    "ia3_l": "ia3_l",
    "w_norm": "w_norm",
    "diff_b": "diff_b",
    "b_norm": "diff_b",
    "lora_B.bias": "up_bias",
    "a1.weight": "a1",
    "a2.weight": "a2",
    "b1.weight": "b1",
    "b2.weight": "b2",
    "bm.weight": "bm",
    "oft_blocks": "oft_blocks",
    "oft_diag": "oft_diag",
    "oft_R.weight": "oft_r",
    "oft_R.scaled_oft": "scaled_oft",
    "rescale": "rescale",
    **{f"bias_{name}": f"sparse_{name}" for name in ("indices", "values", "size")},
    "boft_R": "boft_r",
    "boft_s": "boft_s",
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
NAMED = {"lora_A", "lora_B", "lora_magnitude_vector"}  # behind these the adapter's name may stand
WHOLE = {"sparse_indices", "sparse_size"}  # parts that hold whole numbers
NUMBERS = {"alpha", "scale", "scalar", "on_input", "scaled_oft"}  # parts that are one number, not a factor

Parts = Mapping[str, Any]  # part -> factor: a tensor, or what the header says of one


@dataclass(frozen=True)
class Form:
    """How a law is written down.

    marks: any of these parts tells it; needs: all of these; may: what else it has; scalable: alpha / rank, or a number
    that stands for it, multiplies the whole change.
    """

    marks: frozenset[str]
    needs: frozenset[str]
    may: frozenset[str]
    build: Callable[[Parts, float | None], Delta]
    scalable: bool = False

    @property
    def parts(self) -> frozenset[str]:
        return self.marks | self.needs | self.may


def _form(
    build: Callable[[Parts, float | None], Delta], marks: str, needs: str = "", may: str = "", scalable: bool = False
) -> Form:
    return Form(frozenset(marks.split()), frozenset(needs.split()), frozenset(may.split()), build, scalable)


def _renamed(parts: Parts, prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): factor for name, factor in parts.items() if name.startswith(prefix)}


def _low_rank(parts: Parts, alpha: float | None) -> LowRank:
    return LowRank(parts["down"], parts["up"], _or_rank(alpha, parts["down"].shape), parts.get("mid"))


def _loha(parts: Parts, alpha: float | None) -> Hadamard:
    return Hadamard(**_renamed(parts, "hada_"), alpha=_or_rank(alpha, parts["hada_w1_b"].shape))


def _lokr(parts: Parts, alpha: float | None) -> Kronecker:
    factors = _renamed(parts, "lokr_")
    narrow = factors.get("w2_b", factors.get("w1_b"))
    return Kronecker(**factors, alpha=1.0 if narrow is None else _or_rank(alpha, narrow.shape))


def _glora(parts: Parts, alpha: float | None) -> GLoRA:
    ranks = (factor.shape for name, factor in parts.items() if name in ("a1", "a2"))
    rank = min((size for shape in ranks for size in shape[:2]), default=1)
    alpha = float(rank) if alpha is None else alpha
    return GLoRA(parts["a1"], parts["a2"], parts["b1"], parts["b2"], alpha, parts.get("bm"))


def _oft(parts: Parts, alpha: float | None) -> OFT | BOFT:
    law = BOFT if len(parts["oft_blocks"].shape) == 4 else OFT
    return law(parts["oft_blocks"], 0.0 if alpha is None else alpha, parts.get("rescale"))


def _ia3_of_peft(parts: Parts, _: float | None) -> IA3:
    """PEFT multiplies, so that its nothing is 1. A convolution's vector looks the same for inputs and outputs."""
    vector = parts["ia3_l"]
    by_input = parts.get("by_input", len(vector.shape) == 2 and vector.shape[0] == 1)
    return IA3(vector.float() - 1 if hasattr(vector, "float") else vector, bool(by_input))


# The marks of different rows are disjoint, so a module's parts tell its law whatever else they are.
FORMS = (
    _form(_low_rank, "down up", "down up", "mid", scalable=True),
    _form(_loha, "hada_w1_a hada_w2_a", "hada_w1_a hada_w1_b hada_w2_a hada_w2_b", "hada_t1 hada_t2", scalable=True),
    _form(_lokr, "lokr_w1 lokr_w1_a lokr_w2 lokr_w2_a", "", "lokr_w1_b lokr_w2_b lokr_t2", scalable=True),
    _form(lambda parts, _: Full(parts["diff"]), "diff", "diff", scalable=True),
    _form(lambda parts, _: Full(parts["w_norm"]), "w_norm", "w_norm"),
    _form(lambda parts, _: Replacement(parts["value"]), "value", "value"),
    _form(lambda parts, _: IA3(parts["weight"], bool(parts["on_input"])), "on_input weight", "on_input weight"),
    _form(_ia3_of_peft, "ia3_l", "ia3_l", "by_input"),
    _form(_glora, "a1 a2 b1 b2", "a1 a2 b1 b2", "bm", scalable=True),
    _form(_oft, "oft_blocks", "oft_blocks", "rescale"),
    _form(lambda parts, _: Rotation(parts["oft_diag"], parts.get("rescale")), "oft_diag", "oft_diag", "rescale"),
    _form(lambda parts, _: InputBOFT(parts["boft_r"], parts["boft_s"]), "boft_r boft_s", "boft_r boft_s"),
    _form(lambda parts, _: OFTv2(parts["oft_r"], "scaled_oft" in parts), "oft_r", "oft_r", "scaled_oft"),
)
# Parts that stand beside any law.
BESIDE = frozenset({"alpha", "magnitude", "magnitude_out", "diff_b", "up_bias", "bias_value", "bias"})
SCALES = frozenset({"scale", "scalar"})  # beside a scalable law
SPARSE = frozenset({"sparse_indices", "sparse_values", "sparse_size"})  # all three
ONLY_BIAS = frozenset({"diff_b", "bias_value"})  # parts that need no law beside


@lru_cache(maxsize=2**17)
def split(key: str) -> tuple[str, str] | None:
    """The module's name in a key, and the part that the key holds; None for a key that holds none."""
    names = translated(key).rsplit(".", 3)
    if len(names) == 4:
        stem, first, second, last = names
        if first in NAMED and f"{first}.{last}" in SUFFIXES:
            return stem, SUFFIXES[f"{first}.{last}"]
        if first.endswith("_lora") and last == "weight" and second in ("down", "up"):  # diffusers before 0.21
            return f"{stem}.{first.removesuffix('_lora')}", second
    for count in (3, 2, 1):
        part = SUFFIXES.get(".".join(names[-count:])) if len(names) > count else None
        if part:
            return ".".join(names[:-count]), part
    return None


def lacking(parts: Parts) -> str | None:
    """What is wrong with the set of parts of one module, None if they make a delta (or only change a bias)."""
    found = [form for form in FORMS if form.marks & parts.keys()]
    if len(found) > 1:
        return f"has parts of {len(found)} laws: {', '.join(sorted(parts))}"
    if not found:
        return None if len(parts) == 1 and parts.keys() <= ONLY_BIAS else f"has only {', '.join(sorted(parts))}"
    beside = BESIDE | SPARSE | (SCALES if found[0].scalable else frozenset())
    odd = sorted(parts.keys() - found[0].parts - beside)
    missing = sorted((found[0].needs | (SPARSE if SPARSE & parts.keys() else set())) - parts.keys())
    if missing:
        return f"lacks {', '.join(missing)}"
    return f"has {', '.join(odd)}, which do not belong to its law" if odd else None


def build(parts: Parts, alpha: float | None) -> dict[str, Delta]:
    """The deltas that the parts of one module make: of its weight under "", of its bias under ".bias".

    parts: tensors, or what a header says of them; alpha: None where the file gives none, the scale is 1 then.
    Parts that are not whole (see `lacking`) or do not belong together: SdloraError.
    """
    wrong = lacking(parts)
    if wrong:
        raise SdloraError(wrong)
    deltas: dict[str, Delta] = {}
    form = form_of(parts)
    if form:
        delta = form.build(parts, alpha)
        scale = float(getattr(delta, "scale", 1.0)) if form.scalable else 1.0
        if "sparse_values" in parts:
            delta = Sum(delta, Sparse(parts["sparse_indices"], parts["sparse_values"], parts["sparse_size"]))
        if "bias" in parts:  # A1111's: of the weight, or of the outputs, by its shape; scaled like the change
            bias = Full(_times(parts["bias"], scale))
            if len(bias.shape) > 1:
                delta = Sum(delta, bias)
            else:
                deltas[".bias"] = bias
        for name in ("magnitude", "magnitude_out"):
            if name in parts:
                delta = DoRA(delta, parts[name], by_output=name == "magnitude_out")
        deltas[""] = delta
        if "up_bias" in parts:
            deltas[".bias"] = Full(_times(parts["up_bias"], scale))
    if "diff_b" in parts:
        deltas[".bias"] = Full(parts["diff_b"])
    if "bias_value" in parts:
        deltas[".bias"] = Replacement(parts["bias_value"])
    return deltas


def form_of(parts: Parts) -> Form | None:
    """The row of the law that the parts of one module tell; None where they only change a bias."""
    return next((form for form in FORMS if form.marks & parts.keys()), None)


def _times(factor: Any, scale: float) -> Any:
    """The factor scaled; what the header says of it as it is."""
    return factor.float() * scale if hasattr(factor, "float") else factor


def _or_rank(alpha: float | None, narrow: tuple[int, ...]) -> float:
    """Without an alpha the scale is 1. A factor that is a single number has no rank, and its law refuses it."""
    return float((*narrow, 1)[0]) if alpha is None else alpha
