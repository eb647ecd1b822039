"""Learned tokens (textual inversion): what adapters bring to a pipeline's tokenizers and text encoders, and take away.

The base's tokenizer is never edited: a copy that knows the tokens stands in for it until they leave. Their vectors are
rows behind those that the base's words have in the embedding; the base's own rows are never written to.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.lowrank.adapter import Adapter, Vectors, same_vectors
from sdlora.lowrank.laws.delta import times
from sdlora.mixing.placement import obstacle
from sdlora.models.families import tokenizer_name, tokenizer_of

MOST_VECTORS = 1024  # that a text encoder takes at once; files bring a handful, and checking them costs their square
LONGEST_TOKEN = 100  # characters

_taught: WeakSet[Any] = WeakSet()  # the tokenizers that stand in for a base's


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What a text encoder reads: a tokenizer and, for the tokens that this has learned, rows of the embedding.

    learned: what the rows were made of, by token; nothing for the base's own vocabulary. rows: (n, width), from row
    `start` on. size: how many rows the base has.
    """

    tokenizer: Any
    learned: Vectors
    rows: Tensor
    start: int
    size: int


def own_vocabulary(pipeline: Any, component: str) -> Vocabulary:
    """The vocabulary that the pipeline has now, as its base's."""
    tokenizer, weight = tokenizer_of(pipeline, component), _embedding(pipeline, component).weight.detach()
    return Vocabulary(tokenizer, {}, weight.new_empty(0, weight.shape[1]), len(tokenizer), len(weight))


def check_tokens(name: str, adapter: Adapter, vocabularies: Mapping[str, Vocabulary]) -> None:
    """SdloraError where the model cannot take the adapter's tokens; vocabularies: by text encoder."""
    count = sum(len(vectors) for one in adapter.embeddings.values() for vectors in one.values() if vectors.dim())
    if count > MOST_VECTORS:
        raise SdloraError(f"{name}: it brings {count} learned vectors, {MOST_VECTORS} are the most; use another file")
    for token, encoders in adapter.embeddings.items():
        if not (token.strip() and token.isprintable() and len(token) <= LONGEST_TOKEN):
            raise SdloraError(f"{name}: {token[:LONGEST_TOKEN]!r} can be no token; delete it from the file")
        for component, vectors in encoders.items():
            if component not in vocabularies:
                known = ", ".join(vocabularies)
                raise SdloraError(f"{name}: {token!r} is for {component!r}; the model's text encoders are {known}")
            fault = _fault(token, vectors, vocabularies[component])
            if fault:
                raise SdloraError(f"{name}: the token {token!r} {fault}")


def learned(adapters: Mapping[str, Adapter]) -> dict[str, Vectors]:
    """What the text encoders have to learn for these adapters, in an order that does not depend on theirs.

    Several may bring one token with the same vectors; with others, or as diffusers could not tell it from the next
    vector of another token, it is refused: SdloraError.
    """
    brought: dict[str, tuple[str, Mapping[str, Tensor]]] = {}
    for name in sorted(adapters):
        for token, vectors in adapters[name].embeddings.items():
            for spelling in _spellings(token):
                other, theirs = brought.setdefault(spelling, (name, vectors))
                if not same_vectors(vectors, theirs):
                    raise SdloraError(
                        f"{other} and {name} bring the token {token!r} with different vectors; unload one of the two"
                    )
    found: dict[str, dict[str, Tensor]] = {}
    for token in sorted(brought):
        for component, one in brought[token][1].items():
            found.setdefault(component, {})[token] = one
    for of_encoder in found.values():
        _check_apart(of_encoder)
    return dict(found)


def grown(own: Vocabulary, learned: Vectors) -> Vocabulary:
    """The base's vocabulary and these tokens. A token of n vectors becomes n words: token, token_1, token_2 ...

    (diffusers' naming; its `maybe_convert_prompt` spells prompts out so.) Capitals count nowhere else in CLIP, so a
    token that has some is known as it is written and in small letters.
    """
    from tokenizers import AddedToken

    if not learned:
        return own
    words = [word for token, vectors in learned.items() for word in _words(token, vectors)]
    rows = torch.cat([vectors.float() for vectors in learned.values()])
    tokenizer = _copied(own.tokenizer)
    tokenizer.add_tokens([AddedToken(word, normalized=word == word.lower()) for word in words])
    read = tokenizer(words, add_special_tokens=False).input_ids
    for i, (word, ids) in enumerate(zip(words, read, strict=True), start=own.start):
        if ids != [i]:
            raise SdloraError(f"the model's tokenizer cannot learn the token {word!r}; rename it in its file")
    _taught.add(tokenizer)
    return replace(own, tokenizer=tokenizer, learned=learned, rows=rows)


def put(pipeline: Any, component: str, vocabulary: Vocabulary) -> None:
    """Make this what the text encoder reads, whatever it was before. Its modules and parameters stay the same objects.

    Older configs call the end of a text number 2, and transformers then pools where the highest number is, which would
    be the learned token. While there is one, the end is what the tokenizer says.
    """
    encoder, embedding = getattr(pipeline, component), _embedding(pipeline, component)
    if "offloaded" in obstacle(encoder):
        raise SdloraError(f"the {component} is offloaded and cannot learn tokens; load LoRAs that bring some before")
    held, start = embedding.weight.data, vocabulary.start
    behind = start + len(held) - vocabulary.size  # where what is learned now ends
    embedding.weight.data = torch.cat([held[:start], vocabulary.rows.to(held), held[behind:]])
    embedding.num_embeddings = encoder.config.vocab_size = len(embedding.weight)
    end = vocabulary.tokenizer.eos_token_id if vocabulary.learned else encoder.config.eos_token_id
    for module in encoder.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = end
    setattr(pipeline, tokenizer_name(component), vocabulary.tokenizer)


def refuse_taught(pipeline: Any, component: str, read: Vocabulary) -> None:
    """SdloraError where the text encoder has learned from others since `read` was put: the next would take it away."""
    if len(_embedding(pipeline, component).weight) != read.size + len(read.rows):
        raise SdloraError(
            f"the {component} has learned other tokens since the mixer was made; unload them, make the mixer after them"
        )


def put_back(pipeline: Any, component: str, own: Vocabulary, read: Vocabulary) -> None:
    """The base's vocabulary where `read` was in force. A tokenizer that never stood in for the base's stays."""
    tokenizer = tokenizer_of(pipeline, component)
    taught = tokenizer in _taught
    if taught or read.learned:
        put(pipeline, component, own if taught else replace(own, tokenizer=tokenizer))


def _embedding(pipeline: Any, component: str) -> Any:
    return getattr(pipeline, component).get_input_embeddings()


def _fault(token: str, vectors: Tensor, own: Vocabulary) -> str:
    """What keeps a text encoder from learning a token, or ""."""
    tokenizer, width, dtype = own.tokenizer, own.rows.shape[1], own.rows.dtype
    room = tokenizer.model_max_length - 2  # start and end
    if own.start > own.size:
        return f"has no place: the model's tokenizer has {own.start} words, its text encoder {own.size}; mend the model"
    if vectors.dim() != 2 or vectors.shape[1] != width:
        return f"has vectors of shape {times(vectors.shape)}, the model's are {width} wide; wrong base model?"
    if not 0 < len(vectors) <= room:
        return f"has {len(vectors)} vectors, a prompt has room for 1 to {room}; the file cannot be used"
    if not torch.isfinite(vectors.to(dtype).float()).all():
        return f"holds numbers that are nan, infinite or too large for {str(dtype)[6:]}; use an earlier checkpoint"
    for word in (word for spelling in _spellings(token) for word in _words(spelling, vectors)):
        if tokenizer.convert_tokens_to_ids(word) != tokenizer.unk_token_id or len(tokenizer.tokenize(word)) < 2:
            return f"would take the place of {word!r}, which the model's tokenizer knows; rename it in the file"
    return ""


def _check_apart(vectors: Vectors) -> None:
    """Spelling out one token must not touch another, and no token may look like the next vector of another."""
    count = sum(map(len, vectors.values()))
    if count > MOST_VECTORS:
        raise SdloraError(f"the LoRAs bring {count} learned vectors, {MOST_VECTORS} are the most; unload some")
    for token, own in vectors.items():
        for other in vectors:
            if token in other and token != other and (len(own) > 1 or other == f"{token}_1"):
                raise SdloraError(f"prompts cannot tell {token!r} and {other!r} apart; unload the LoRA of one")


def _spellings(token: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((token, token.lower())))


def _words(token: str, vectors: Tensor) -> list[str]:
    return [token, *(f"{token}_{i}" for i in range(1, len(vectors)))]


def _copied(tokenizer: Any) -> Any:
    copied = copy.deepcopy(tokenizer)
    # CLIP's fast tokenizer hangs its decoding on the very object that a copy makes anew.
    if hasattr(copied, "_wrap_decode_method_backend_tokenizer"):
        copied._wrap_decode_method_backend_tokenizer()
    return copied
