"""The one form of a LoRA in memory: parameters and their deltas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sdlora.lowrank.laws import Delta

if TYPE_CHECKING:
    from torch import Tensor

Vectors = Mapping[str, "Tensor"]  # (n, width) by name
Embeddings = Mapping[str, Vectors]


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA in memory, whatever file it came from.

    deltas: by diffusers module path led by its component, such as "unet.down_blocks.0.attentions.0.proj_in". That is
    the module's weight; a change to its bias has ".bias" behind the path.
    metadata: what a file says about itself, as text.
    embeddings: learned tokens (textual inversion): by token, then by text encoder: vectors (n, width).
    """

    deltas: Mapping[str, Delta]
    metadata: Mapping[str, str] = field(default_factory=dict)
    embeddings: Embeddings = field(default_factory=dict)

    def component(self, name: str) -> Mapping[str, Delta]:
        """The deltas of one component ("unet", "text_encoder", ...), still under their full paths."""
        return {path: delta for path, delta in self.deltas.items() if path.partition(".")[0] == name}


def same_vectors(one: Vectors, other: Vectors) -> bool:
    """Whether these are the same vectors under the same names: what two LoRAs that bring one token must agree in."""
    equal = (one[name].float().equal(other[name].float()) for name in one.keys() & other.keys())
    return one.keys() == other.keys() and all(equal)
