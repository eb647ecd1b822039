"""One mixer a model, one after another: what a mixer did stays when it goes, and the next one finds the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


def leave_word(word: Word, components: Mapping[str, nn.Module]) -> None:
    """For the mixer that comes next."""
    for part in components.values():
        _left[part] = word


def take_over(mixer: Any, components: Mapping[str, nn.Module]) -> None:
    """The base, as it was before other mixers over these components; SdloraError where one has LoRAs or is in use."""
    left = {name: word for name, part in components.items() if (word := _left.get(part)) and word.mixer() is not mixer}
    for word in left.values():
        other = word.mixer()
        if other and (other.names or other.lock.locked()):
            raise SdloraError("another mixer has LoRAs on this model or is in use; use that one, or unload its LoRAs")
    for name, word in left.items():
        word.live.clear()
        if name in word.own:
            for pipeline in filter(None, (word.pipeline(), mixer.pipeline)):
                put_back(pipeline, name, word.own[name], word.read[name])
        word.base.restore()


def refuse_foreign(components: Mapping[str, nn.Module]) -> None:
    """What others have put into the pipeline would be taken for the base."""
    for name, part in components.items():
        if hasattr(part, "_orig_mod"):
            raise SdloraError(f"the {name} is compiled; make the mixer first and compile after")
        if any(path.endswith(".base_layer") for path, _ in part.named_modules()):
            raise SdloraError(
                f"the {name} has LoRAs of peft's; call pipeline.unload_lora_weights(), and load them here"
            )
