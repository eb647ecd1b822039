"""A text becomes conditioning: as many windows of the text encoder as it needs, and emphasis on what they make of it.

As in A1111 (modules/sd_hijack_clip.py, sd_emphasis.py "Original"). A text that fits into one window and has no emphasis
gets the very bits of `Family.encode`.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.generation.prompts.syntax import pieces_of
from sdlora.models.families import Conditioning, Family, device_of, family_of, side_by_side, spelled_out, tokenizer_of

BACKTRACK = 20  # a chunk that is full ends at a comma, if there is one among its last tokens
Unit = tuple[tuple[int, ...], float]  # token numbers that stay together, and their weight
Chunk = list[tuple[int, float]]  # token numbers and weights, at most a window without its start and end


@torch.no_grad()
def encode(pipeline: Any, text: str) -> Conditioning:
    """The conditioning of a text with emphasis and BREAK, by one batch of chunks: (1, 77 * chunks, width).

    SDXL's pooled projection (1, width) is that of the first chunk. SdloraError: emphasis beyond all bounds.
    """
    family = family_of(pipeline)
    by_encoder = [_chunks(pipeline, name, text) for name in family.text_encoders]
    count = max(map(len, by_encoder))  # they differ where a learned token has more vectors in one encoder
    by_encoder = [chunks + [[]] * (count - len(chunks)) for chunks in by_encoder]
    states, told = family.states(pipeline, _numbers(pipeline, family, by_encoder))
    weighted = [_emphasised(one, chunks) for one, chunks in zip(states, by_encoder, strict=True)]
    joined = side_by_side(weighted)
    if any(one is not other for one, other in zip(weighted, states, strict=True)) and not torch.isfinite(joined).all():
        raise SdloraError(f"the emphasis in {_short(text)!r} is too strong; use weights such as (word:1.2)")
    first = {name: value[:1] for name, value in told.items()}
    return {"encoder_hidden_states": joined.reshape(1, -1, joined.shape[-1]), **first}


@torch.no_grad()
def encode_negative(pipeline: Any, text: str) -> Conditioning:
    """The same for a negative prompt; an empty one is what the family makes of it."""
    return encode(pipeline, text) if text else family_of(pipeline).unconditional(pipeline, [""])


class Remembered:
    """Conditionings that were asked for lately, at most so many bytes of them.

    A key names all that a conditioning depends on: the weights of the text encoders, the text, whether it is negative.
    """

    def __init__(self, most: int = 256 * 2**20) -> None:
        self.most = most
        self.bytes = 0
        self._kept: OrderedDict[Hashable, Conditioning] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, make: Callable[[], Conditioning]) -> Conditioning:
        """What was made for this key, or is made now. Nobody may write into it."""
        found = self._kept.pop(key, None)
        if found is None:
            found = make()
            self.bytes += _bytes(found)
        self._kept[key] = found
        while self.bytes > self.most:
            _, oldest = self._kept.popitem(last=False)
            self.bytes -= _bytes(oldest)
        return found


def _bytes(conditioning: Conditioning) -> int:
    return sum(value.nbytes for value in conditioning.values())


def _chunks(pipeline: Any, text_encoder: str, text: str) -> list[Chunk]:
    """The text in chunks, as the tokenizer of a text encoder reads it; at least one, which may be empty."""
    tokenizer = tokenizer_of(pipeline, text_encoder)
    return chunked(_units(pipeline, tokenizer, text), _comma(tokenizer), tokenizer.model_max_length - 2)


def chunked(units: Iterable[Unit | None], comma: int | None, room: int) -> list[Chunk]:
    """Units in chunks of `room` tokens; None is BREAK. What a full chunk has behind a late comma moves to the next."""
    chunks: list[Chunk] = []
    chunk: Chunk = []
    after_comma: int | None = None  # where in the chunk the last comma ends
    for unit in units:
        if unit is None:
            chunks.append(chunk)
            chunk, after_comma = [], None
            continue
        numbers, weight = unit
        if numbers == (comma,):
            after_comma = len(chunk) + 1
        elif len(chunk) == room and after_comma and room - after_comma < BACKTRACK:
            chunks.append(chunk[:after_comma])
            chunk, after_comma = chunk[after_comma:], None
        if len(chunk) + len(numbers) > room:
            chunks.append(chunk)
            chunk, after_comma = [], None
        chunk += [(number, weight) for number in numbers]
    return [*chunks, chunk] if chunk or not chunks else chunks


def _units(pipeline: Any, tokenizer: Any, text: str) -> Iterator[Unit | None]:
    """The tokens of a text, those of a learned token of several vectors as one; None is BREAK."""
    pieces = pieces_of(text)
    spelled = spelled_out(pipeline, tokenizer, [piece.text for piece in pieces])
    read = tokenizer(spelled, add_special_tokens=False, truncation=False, verbose=False).input_ids
    following = _following(tokenizer)
    for piece, numbers in zip(pieces, read, strict=True):
        if piece.ends_chunk:
            yield None
        start = 0
        for end in range(1, len(numbers) + 1):
            if end == len(numbers) or following.get(numbers[end - 1]) != numbers[end]:
                yield tuple(numbers[start:end]), piece.weight
                start = end


def _following(tokenizer: Any) -> dict[int, int]:
    """Which token stands for the next vector of the same learned token: sks_1 behind sks, sks_2 behind that."""
    known = tokenizer.get_added_vocab()
    found = {}
    for word, number in known.items():
        token, _, place = word.rpartition("_")
        if place.isdecimal():
            before = known.get(token if place == "1" else f"{token}_{int(place) - 1}")
            if before is not None:
                found[before] = number
    return found


def _comma(tokenizer: Any) -> int | None:
    return tokenizer.get_vocab().get(",</w>")


def _numbers(pipeline: Any, family: Family, by_encoder: Sequence[Sequence[Chunk]]) -> list[Tensor]:
    """Token numbers (chunks, window) for each text encoder, on its device: start, the tokens, end, padding."""
    found = []
    for name, chunks in zip(family.text_encoders, by_encoder, strict=True):
        tokenizer = tokenizer_of(pipeline, name)
        start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        rows = [[start, *(number for number, _ in chunk), end] for chunk in chunks]
        window = tokenizer.model_max_length
        filled = [row + [pad] * (window - len(row)) for row in rows]
        found.append(torch.tensor(filled, device=device_of(pipeline, name)))
    return found


def _emphasised(states: Tensor, chunks: Sequence[Chunk]) -> Tensor:
    """States (chunks, window, width) times the weights of their tokens; then each chunk gets its own mean back.

    Computed in float32 and rounded once; a chunk whose weights are all 1 keeps its bits.
    """
    if all(weight == 1 for chunk in chunks for _, weight in chunk):
        return states
    window = states.shape[1]
    rows = [[1.0, *(weight for _, weight in chunk)] for chunk in chunks]
    weights = torch.tensor([row + [1.0] * (window - len(row)) for row in rows], device=states.device)[:, :, None]
    plain = states.float()
    weighted = plain * weights
    weighted = weighted / _change(plain, weighted, weights)
    touched = (weights != 1).any(dim=1, keepdim=True)
    return torch.where(touched, weighted.to(states.dtype), states)


def _change(plain: Tensor, weighted: Tensor, weights: Tensor) -> Tensor:
    """What weights (chunks, window, 1) have made of the mean of each chunk, as a factor (chunks, 1, 1).

    Means of one sign change by a factor between the lowest weight and the highest. Where the factor is far from that
    (twice), the means of the tokens cancel out, and what is left says nothing: A1111 would blow the states up there, or
    turn them round. Then it is 1.
    """
    before, after = (states.mean((1, 2), keepdim=True) for states in (plain, weighted))
    lowest, highest = weights.amin(1, keepdim=True), weights.amax(1, keepdim=True)
    factor = after / before
    rounding = 1e-6 * plain.abs().mean((1, 2), keepdim=True)
    sound = (before.abs() > rounding) & (factor > torch.clamp(lowest / 2, min=0.01)) & (factor < highest * 2)
    return torch.where(sound, factor, 1.0)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
