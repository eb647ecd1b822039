"""One mixer a pipeline, one after another: what a mixer did stays when it goes, and the next one finds the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from sdlora.errors import SdloraError
from sdlora.mixing.base import Base
from sdlora.mixing.live import Live
from sdlora.mixing.tokens import Vocabulary, put
from sdlora.models.families import tokenizer_of


@dataclass(frozen=True, eq=False)
class Word:
    """What it takes to undo what a mixer does to its pipeline. mixer: a weak reference, None when it is gone."""

    mixer: Callable[[], Any]
    live: Live
    base: Base
    own: Mapping[str, Vocabulary]


_left: WeakKeyDictionary[Any, Word] = WeakKeyDictionary()  # by pipeline


def leave_word(pipeline: Any, word: Word) -> None:
    """For the mixer that comes next."""
    _left[pipeline] = word


def take_over(pipeline: Any) -> None:
    """The base, as it was before a mixer that is gone; SdloraError where that is still there and has LoRAs."""
    word = _left.get(pipeline)
    if word is None:
        return
    other = word.mixer()
    if other and other.names:
        raise SdloraError("another mixer has LoRAs on this pipeline; use that one, or unload them from it")
    word.live.clear()
    word.base.restore()
    for component, vocabulary in word.own.items():
        if tokenizer_of(pipeline, component) is not vocabulary.tokenizer:
            put(pipeline, component, vocabulary)


def refuse_foreign(components: Mapping[str, nn.Module]) -> None:
    """What others have put into the pipeline would be taken for the base."""
    for name, part in components.items():
        if hasattr(part, "_orig_mod"):
            raise SdloraError(f"the {name} is compiled; make the mixer first and compile after")
        if any(path.endswith(".base_layer") for path, _ in part.named_modules()):
            raise SdloraError(
                f"the {name} has LoRAs of peft's; call pipeline.unload_lora_weights(), and load them here"
            )
