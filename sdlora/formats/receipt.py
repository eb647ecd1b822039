"""The receipt of reading a LoRA file: what of it can be applied to a model, and what cannot."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SHOWN = 4


@dataclass(frozen=True)
class Receipt:
    """What became of a file's content.

    applied: paths of the modules that can be applied, with their ranks; unknown: the file's keys that name no module
    or say it in a way that is not known; misfit: a line for each module whose shape is not the model's.
    sha256: of the whole file.
    """

    path: Path
    sha256: str
    applied: Mapping[str, int]
    unknown: tuple[str, ...] = ()
    misfit: tuple[str, ...] = ()
    trigger_words: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether everything that the file holds can be applied."""
        return not (self.unknown or self.misfit)

    def summary(self) -> str:
        """One line: "style.safetensors: 96 modules applied (unet 72, text_encoder 24), rank 16; not applied: ..."."""
        components = Counter(path.partition(".")[0] for path in self.applied)
        ranks = sorted(set(self.applied.values()))
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no rank"
        held = ", ".join(f"{name} {count}" for name, count in components.items())
        line = f"{self.path.name}: {len(self.applied)} modules applied ({held}), {rank}"
        for what, names in (("keys not known", self.unknown), ("modules of another shape", self.misfit)):
            if names:
                line += f"; NOT applied: {len(names)} {what}: {_listed(names)}"
        return line


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
