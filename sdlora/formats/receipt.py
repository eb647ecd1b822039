"""The receipt of a LoRA file: what it is, what of it can be applied to a model, and what cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sdlora.formats.names import component_in

SHOWN = 4


class Applied(NamedTuple):
    """What is known of the change to one parameter; alpha is None where the law has none, or it was not read yet."""

    law: str
    rank: int | None
    alpha: float | None


@dataclass(frozen=True)
class Receipt:
    """What a file is, and what became of its content.

    made_for: names of the architectures it fits, best first, mostly one, none if it is not known; evidence: what tells.
    applied: by path of the parameter; unknown: keys that name no module or mean nothing known; incomplete: a line for
    each module whose parts make no delta; misfit: a line for each module whose shape is not the model's.
    sha256, autov3: of the whole file and of what follows its header, "" where only the header was read.
    content: a hash of all that counts of it, of a plain file its sha256; of a PEFT folder its config counts too.
    finite: None where only the header was read (a file with nan or infinite numbers is never applied).
    """

    path: Path
    size: int
    sha256: str = ""
    autov3: str = ""
    content: str = ""
    made_for: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()
    applied: Mapping[str, Applied] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    incomplete: tuple[str, ...] = ()
    misfit: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    finite: bool | None = None
    trigger_words: tuple[str, ...] = ()
    base_model: str = ""
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether everything that the file holds can be applied."""
        return not (self.unknown or self.incomplete or self.misfit)

    @property
    def components(self) -> Mapping[str, int]:
        """How many parameters of each component are changed."""
        return Counter(path.partition(".")[0] for path in self.applied)

    @property
    def left_out(self) -> Mapping[str, Mapping[str, int]]:
        """By component, how many keys and modules do not apply, and why; as far as their names tell the component."""
        counts: dict[str, dict[str, int]] = {}
        for what, names in self._left_out():
            for component, count in Counter(map(component_in, names)).items():
                counts.setdefault(component, {})[what] = count
        return counts

    @property
    def laws(self) -> Mapping[str, int]:
        """How many parameters are changed by which law, the most frequent first."""
        return dict(Counter(one.law for one in self.applied.values()).most_common())

    def summary(self) -> str:
        """One line: "style.safetensors: 96 modules applied (unet 72, text_encoder 24), rank 16; NOT applied: ..."."""
        held = ", ".join(f"{name} {count}" for name, count in self.components.items())
        line = f"{self.path.name}: {len(self.applied)} modules applied ({held or 'none'}), {self.ranks()}"
        if set(self.laws) - {"lora"}:
            line += f", {_counted(self.laws)}"
        if self.tokens:
            line += f", tokens {', '.join(self.tokens)}"
        for what, names in self._left_out():
            line += f"; NOT applied: {len(names)} {what}: {_listed(names)}"
        return line + "".join(f"; {note}" for note in self.notes)

    def ranks(self) -> str:
        """ "rank 16", "ranks 4 to 32" or "no rank"."""
        return _spread("rank", {one.rank for one in self.applied.values() if one.rank is not None})

    def alphas(self) -> str:
        """ "alpha 8", "alphas 1 to 16" or "no alpha"."""
        return _spread("alpha", {one.alpha for one in self.applied.values() if one.alpha is not None})

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all that is known."""
        told = asdict(self)
        told["path"] = str(self.path)
        told["applied"] = {path: one._asdict() for path, one in self.applied.items()}
        told |= {"complete": self.complete, "components": dict(self.components), "laws": dict(self.laws)}
        return told | {"left_out": dict(self.left_out)}

    def _left_out(self) -> Iterable[tuple[str, tuple[str, ...]]]:
        kinds = (
            ("keys not known", self.unknown),
            ("modules not whole", self.incomplete),
            ("modules of another shape", self.misfit),
        )
        return ((what, names) for what, names in kinds if names)


def _spread(word: str, values: set[Any]) -> str:
    if not values:
        return f"no {word}"
    low, high = min(values), max(values)
    return f"{word} {low:g}" if low == high else f"{word}s {low:g} to {high:g}"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
