"""LoRA tags in prompts: <lora:name:0.8>, <lora:name:te:unet>, and more by name.

The words are A1111's (te, unet) and those of its extension sd-webui-lora-block-weight (lbw, start, stop, step); te2 and
schedule are our own. What A1111 passes over in silence is an error here: a word or a name that nobody knows, a weight
that is no number, a tag that never ends.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

from sdlora.errors import SdloraError, nearest
from sdlora.formats.block_weights import PRESETS, Factors, is_number, read_factors, write_factors
from sdlora.formats.numbers import short
from sdlora.formats.sources import SUFFIX, loras_below, name_of, names_below
from sdlora.generation.job import Job
from sdlora.mixing.plan import LoraWeight
from sdlora.mixing.schedule import Schedule, parse_schedule, progress_of, window

WORDS = ("te", "te2", "unet", "lbw", "x", "start", "stop", "step", "schedule")
_ALIASES = {"w": "lbw"}
_REFUSED = {
    "dyn": "the number of ranks cannot be set here; write a smaller file with sdlora resize",
    "lbwe": "rules for single layers are not known here; weigh blocks with lbw=",
}

_START = re.compile(r"<(?:lora|lyco):", re.IGNORECASE)
_ARGUMENT = re.compile(r'\s*(?:(\w+)\s*=\s*)?(?:"((?:[^"\\]|\\.)*)"\s*(?=[:>])|([^:>]*))', re.DOTALL)
_NAME = re.compile(r'\s*()(?:"((?:[^"\\]|\\.)*)"\s*(?=[:>])|([^:>]*))', re.DOTALL)
_STEP = re.compile(r"\s*([0-9]{1,9})\s*")
_STEPS = re.compile(r"\s*([0-9]{0,9})\s*-\s*([0-9]{0,9})\s*")


@dataclass(frozen=True)
class Tag:
    """A tag as it was typed: what it says by place and by word. text: all of it."""

    text: str
    name: str
    numbers: tuple[str, ...] = ()
    named: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return _short(self.text)


def _short(text: str) -> str:
    """For the one line of an error."""
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}..."


# Reading


def take_tags(prompt: str) -> tuple[str, tuple[Tag, ...]]:
    """The prompt without its tags, and these in their order. SdloraError for a tag that does not end, or names nothing.

    Where a tag goes between spaces, one of them goes too.
    """
    tags: list[Tag] = []
    texts = [""]
    position = 0
    while start := _START.search(prompt, position):
        tag, end = _tag(prompt, start)
        tags.append(tag)
        _add(texts, prompt[position : start.start()])
        position = end
    if not tags:
        return prompt, ()
    _add(texts, prompt[position:])
    return "".join(texts).rstrip(), tuple(tags)


def refuse_tags(job: Job) -> None:
    """SdloraError where a prompt has tags, which a text encoder would read as words: `resolved` makes LoRAs of them."""
    for prompt in (job.prompt, job.negative_prompt):
        if take_tags(prompt)[1]:
            raise SdloraError(f"the tags of {_short(prompt)!r} name LoRAs; call resolved(job, names_of(folders)) first")


def _add(texts: list[str], text: str) -> None:
    """Text behind a tag, without its first spaces where there are some already, or nothing."""
    text = text.lstrip() if not texts[-1] or texts[-1][-1].isspace() else text
    if text:
        texts.append(text)


def _tag(prompt: str, start: re.Match[str]) -> tuple[Tag, int]:
    """The tag that starts here, and where it ends."""
    found = _NAME.match(prompt, start.end())
    assert found
    arguments = [found]
    while prompt[found.end() : found.end() + 1] == ":":
        found = _ARGUMENT.match(prompt, found.end() + 1)
        assert found
        arguments.append(found)
    text = prompt[start.start() : found.end() + 1]
    tag = Tag(text, _value(arguments[0]))
    if not text.endswith(">"):
        raise SdloraError(f"the tag {tag} does not end; close it with >")
    if not tag.name:
        raise SdloraError(f"the tag {tag} names no LoRA; write it as in <lora:name:0.8>")
    numbers = tuple(_value(one) for one in arguments[1:] if not one[1])
    named: dict[str, str] = {}
    for one in (one for one in arguments[1:] if one[1]):
        word = _ALIASES.get(one[1].lower(), one[1].lower())
        if word in named:
            raise SdloraError(f"the tag {tag} says {_short(word)}= twice; say it once")
        named[word] = _value(one)
    return replace(tag, numbers=numbers, named=named), found.end() + 1


def _value(argument: re.Match[str]) -> str:
    quoted, plain = argument.group(2, 3)
    return re.sub(r"\\(.)", r"\1", quoted, flags=re.DOTALL) if quoted is not None else plain.strip()


# What tags mean


def lora_weights(
    tags: Iterable[Tag], library: Mapping[str, Path], steps: int, presets: Mapping[str, str] = PRESETS
) -> tuple[LoraWeight, ...]:
    """What tags ask for, as a plan takes it. library: files by name, see `names_of`; steps: of the denoising.

    presets: of block weights, those that lbw= names.

    Names count as they are written, else in any capitals. One number is both weights; the UNet's is by default that of
    the text encoders, and that is 1. start=A:stop=B applies the LoRA to the UNet in the steps A to B - 1, counted from
    0, as lbw does; step=A-B is the same. SdloraError names the tag, and what is wrong with it.
    """
    find = _finder(library)
    return tuple(_weight(tag, find(tag), steps, presets) for tag in tags)


def resolved(job: Job, library: Mapping[str, Path], presets: Mapping[str, str] = PRESETS) -> Job:
    """The job with the LoRAs of its prompt's tags behind those that it has; a job without tags is as it was."""
    _, misplaced = take_tags(job.negative_prompt)
    if misplaced:
        raise SdloraError(f"the negative prompt has the tag {misplaced[0]}; LoRAs belong in the prompt")
    prompt, tags = take_tags(job.prompt)
    if not tags:
        return job
    return replace(job, prompt=prompt, loras=(*job.loras, *lora_weights(tags, library, job.steps, presets)))


def _finder(library: Mapping[str, Path]) -> Callable[[Tag], Path]:
    small: dict[str, list[str]] = {}
    for name in library:
        small.setdefault(name.casefold(), []).append(name)

    def find(tag: Tag) -> Path:
        for wanted in (tag.name, tag.name.removesuffix(SUFFIX)):
            alike = [wanted] if wanted in library else small.get(wanted.casefold(), [])
            if len({library[name] for name in alike}) > 1:
                raise SdloraError(f"{tag}: the name may be {' or '.join(sorted(alike))}; write it with its capitals")
            if alike:
                return library[alike[0]]
        raise SdloraError(f"{tag}: the library has no LoRA {_short(tag.name)!r}{nearest(tag.name, library)}")

    return find


def _weight(tag: Tag, path: Path, steps: int, presets: Mapping[str, str]) -> LoraWeight:
    for word in tag.named:
        if word not in WORDS:
            why = _REFUSED.get(word, f"it is none of {', '.join(WORDS)}{nearest(word, WORDS)}")
            raise SdloraError(f"{tag}: {_short(word)}=: {why}")
    numbers, named = list(tag.numbers), dict(tag.named)
    second = numbers[1] if len(numbers) == 2 and not is_number(numbers[1]) else ""
    if "lbw" not in named and ("," in second or (second and second in presets)):
        named["lbw"] = numbers.pop()  # as it was written before A1111 1.5
    if len(numbers) > 2:
        raise SdloraError(f"{tag}: {_short(numbers[2])!r} is one number too many; {_REFUSED['dyn']}")
    text_encoder = _number(tag, named.get("te", numbers[0] if numbers else "1"))
    return LoraWeight(
        path=str(path),
        unet=_number(tag, named.get("unet", numbers[1] if len(numbers) > 1 else str(text_encoder))),
        text_encoder=text_encoder,
        text_encoder_2=_number(tag, named["te2"]) if "te2" in named else None,
        blocks=_blocks(tag, named, presets),
        schedule=_schedule(tag, named, steps),
    )


def _number(tag: Tag, text: str) -> float:
    number = float(text) if is_number(text) else float("nan")
    if not isfinite(number):
        raise SdloraError(f"{tag}: the weight {_short(text)!r} is no number; write one such as 0.8")
    return number


def _blocks(tag: Tag, named: Mapping[str, str], presets: Mapping[str, str]) -> Factors:
    dynamic = _number(tag, named.get("x", "1"))
    try:
        return read_factors(named["lbw"].replace("@", ":"), presets, dynamic) if "lbw" in named else ()
    except SdloraError as error:
        raise SdloraError(f"{tag}: {error}") from None


def _schedule(tag: Tag, named: Mapping[str, str], steps: int) -> Schedule:
    said = [words for words in (("start", "stop"), ("step",), ("schedule",)) if named.keys() & set(words)]
    if len(said) > 1:
        raise SdloraError(f"{tag}: {said[0][0]}= and {said[1][0]}= say when twice; keep one")
    if "schedule" in named:
        try:
            return parse_schedule(named["schedule"].replace("@", ":"))
        except SdloraError as error:
            raise SdloraError(f"{tag}: {error}") from None
    start, stop = named.get("start", ""), named.get("stop", "")
    if "step" in named:
        both = _STEPS.fullmatch(named["step"])
        if not both or not any(both.groups()):
            raise SdloraError(f"{tag}: step={_short(named['step'])!r} is no pair of steps; write it as in step=5-10")
        start, stop = both.groups()
    first, end = _step(tag, start, 0), _step(tag, stop, steps)
    if start and stop and first >= end:
        raise SdloraError(f"{tag}: no step is between {first} and {end}; the first must be the lower")
    return _between(first, min(end, steps), steps)


def _step(tag: Tag, text: str, default: int) -> int:
    whole = _STEP.fullmatch(text)
    if text and not whole:
        raise SdloraError(f"{tag}: {_short(text)!r} is no step; write a whole number, or shares as in schedule=0.2-0.8")
    return int(whole[1]) if whole else default


def _between(first: int, end: int, steps: int) -> Schedule:
    """In force in the steps from `first` on, before `end`; nowhere, if there are none."""
    if first >= end:
        return Schedule(((0.0, 0.0),))
    return window(first / steps, end / steps)


# Writing


def tag_of(lora: LoraWeight, steps: int) -> str:
    """The tag that asks for this; `lora_weights` reads the same from it, but for factors that differ in no step.

    Both weights are in it by place, as A1111 reads them. It knows nothing of te2 and schedule, which stand there only
    where they are needed, and reads no name with : or >.
    """
    said = [_quoted(name_of(Path(lora.path))), short(lora.of("text_encoder")), short(lora.of("unet"))]
    if lora.of("text_encoder_2") != lora.of("text_encoder"):
        said.append(f"te2={short(lora.of('text_encoder_2'))}")
    if lora.blocks:
        said.append(f"lbw={write_factors(lora.blocks)}")
    return f"<lora:{':'.join([*said, *_when(lora.schedule, steps)])}>"


def _when(schedule: Schedule, steps: int) -> list[str]:
    factors = [schedule.at(progress_of(step, steps)) for step in range(steps)]
    if all(factor == 1 for factor in factors):
        return []
    first = factors.index(1.0) if 1.0 in factors else steps
    end = steps - factors[::-1].index(1.0) if first < steps else steps
    if factors == [float(first <= step < end) for step in range(steps)]:
        return [f"start={first}"] * (first > 0) + [f"stop={end}"] * (end < steps)
    return [f"schedule={str(schedule).replace(':', '@').replace(' ', '')}"]


def _quoted(name: str) -> str:
    if name == name.strip() and not name.startswith('"') and not re.search("[:>]", name):
        return name
    return '"' + re.sub(r'(["\\])', r"\\\1", name) + '"'


# Names


class Names(Mapping[str, Path]):
    """Files by name. Asking for a name that several have raises SdloraError, which lists what they are called else."""

    def __init__(self, files: Iterable[tuple[Path, Iterable[str]]]) -> None:
        self._files: dict[str, dict[Path, str]] = {}
        for path, names in files:
            *_, longest = names = tuple(names)
            for name in names:
                self._files.setdefault(name, {})[path] = longest

    def __getitem__(self, name: str) -> Path:
        found = self._files[name]
        if len(found) > 1:
            others = ", ".join(other if other != name else str(path) for path, other in found.items())
            raise SdloraError(f"several LoRAs are called {name!r}: {others}; write one of these, or rename one")
        return next(iter(found))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: Any) -> bool:
        return name in self._files


def names_of(places: Iterable[Path | str]) -> Names:
    """The LoRAs at these places and below them, by name and by their path below the place, with / and no suffix.

    places: files, PEFT folders, and folders that hold such; hidden ones are left out. What lies below two of them under
    one name, has the place's name before it; what is found twice, counts once.
    """
    found: dict[tuple[str, str], tuple[Path, Path]] = {}
    for place in map(Path, places):
        for path in loras_below(place):
            found.setdefault((os.path.realpath(path), name_of(path)), (path, place))
    return Names((path, dict.fromkeys((name_of(path), name))) for path, name in names_below(found.values()).items())
