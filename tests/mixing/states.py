"""All that a mix can change in a pipeline, taken down and compared to the bit."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdlora.models.families import components_of, family_of

PROMPTS = ("a red cat", "a <s1> on an <0>", "ownY own0 MyChar", "", "\u00e9t\u00e9 \u2603 sks_1", "x " * 90)


@dataclass(frozen=True)
class State:
    """weights: by component and key, in order; words: what each tokenizer makes of PROMPTS, and the sizes of both."""

    weights: dict[str, Tensor]
    words: dict[str, Any]


def state_of(pipeline: Any) -> State:
    weights = {
        f"{name}.{key}": value.clone()
        for name, part in components_of(pipeline).items()
        for key, value in part.state_dict().items()
    }
    words: dict[str, Any] = {}
    for name in family_of(pipeline).text_encoders:
        tokenizer, encoder = getattr(pipeline, name.replace("text_encoder", "tokenizer")), getattr(pipeline, name)
        read = [tokenizer(prompt).input_ids for prompt in PROMPTS]
        embedding = encoder.get_input_embeddings()
        ends = [module.eos_token_id for module in encoder.modules() if hasattr(module, "eos_token_id")]
        words[name] = (
            read,
            [tokenizer.decode(ids) for ids in read],
            len(tokenizer),
            tokenizer.get_vocab(),
            (embedding.num_embeddings, encoder.config.vocab_size, ends),
        )
    return State(weights, words)


def same_state(pipeline: Any, before: State) -> bool:
    """The keys too, in their order."""
    now = state_of(pipeline)
    equal = list(now.weights) == list(before.weights) and now.words == before.words
    return equal and all(torch.equal(value, before.weights[key]) for key, value in now.weights.items())
