"""One mixer a model, one after another: what a mixer did stays when it goes, and the next one finds the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from sdlora.errors import SdloraError
from sdlora.mixing.base import Base
from sdlora.mixing.live import Live
from sdlora.mixing.tokens import Vocabulary, put_back


@dataclass(frozen=True, eq=False)
class Word:
    """What it takes to undo what a mixer does to its model; holds none of the model's modules, which would stay for it.

    mixer, pipeline: weak references, None when they are gone. By text encoder, own: the base's vocabulary; read: the
    one in force.
    """

    mixer: Callable[[], Any]
    pipeline: Callable[[], Any]
    live: Live
    base: Base
    own: Mapping[str, Vocabulary]
    read: Mapping[str, Vocabulary]


# By component, since pipelines share them, and one may be gone while another goes on with what a mixer did to it.
_left: WeakKeyDictionary[nn.Module, Word] = WeakKeyDictionary()
_one_at_a_time = Lock()


def take_over(word: Word, components: Mapping[str, nn.Module]) -> None:
    """The base, as it was before other mixers over these components, and one's word for the next.

    Of several mixers that try at once, one gets it if each holds its lock. SdloraError: another has LoRAs or is in use.
    """
    with _one_at_a_time:
        left = {name: held for name, part in components.items() if (held := _left.get(part)) and held is not word}
        for held in left.values():
            other = held.mixer()
            if other and (other.names or other.lock.locked()):
                raise SdloraError(
                    "another mixer has LoRAs on this model or is in use; use that one, or unload its LoRAs"
                )
        for name, held in left.items():
            _undo(held, name, word.pipeline())
        for part in components.values():
            _left[part] = word


def refuse_foreign(components: Mapping[str, nn.Module]) -> None:
    """What others have put into the pipeline would be taken for the base."""
    for name, part in components.items():
        if hasattr(part, "_orig_mod"):
            raise SdloraError(f"the {name} is compiled; make the mixer first and compile after")
        if any(path.endswith(".base_layer") for path, _ in part.named_modules()):
            raise SdloraError(
                f"the {name} has LoRAs of peft's; call pipeline.unload_lora_weights(), and load them here"
            )


def _undo(held: Word, component: str, comes: Any) -> None:
    """comes: the next pipeline."""
    held.live.clear()
    if component in held.own:
        for pipeline in filter(None, (held.pipeline(), comes)):
            put_back(pipeline, component, held.own[component], held.read[component])
    held.base.restore()
