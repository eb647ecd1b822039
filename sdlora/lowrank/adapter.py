"""The one form of a LoRA in memory: module paths and their deltas."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sdlora.lowrank.laws import LowRank


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA in memory, whatever file it came from.

    deltas: by diffusers module path led by its component, such as "unet.down_blocks.0.attentions.0.proj_in".
    metadata: what a file says about itself, as text.
    """

    deltas: Mapping[str, LowRank]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def component(self, name: str) -> Mapping[str, LowRank]:
        """The deltas of one component ("unet", "text_encoder", ...), still under their full paths."""
        return {path: delta for path, delta in self.deltas.items() if path.partition(".")[0] == name}
