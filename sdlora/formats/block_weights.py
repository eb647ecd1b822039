"""The blocks of Stable Diffusion's family, and the lists of factors by which people weigh a LoRA block by block.

The blocks have the names of block-weighted merging: IN00 to IN11 are the original code's input_blocks, M00 its
middle_block, OUT00 to OUT11 its output_blocks. The lists are those of the UI extension sd-webui-lora-block-weight,
typed there as `lbw=`; what is said of "lbw" here was read in its code.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from math import isfinite
from pathlib import Path

from sdlora.errors import SdloraError, nearest
from sdlora.formats.architectures import Architecture
from sdlora.formats.numbers import short

Factors = tuple[tuple[str, float], ...]  # block and factor, in the order of BLOCKS; blocks that are 1 are left out

BLOCKS: tuple[str, ...] = ("BASE", *(f"IN{i:02}" for i in range(12)), "M00", *(f"OUT{i:02}" for i in range(12)))

# The presets that lbw comes with: lists of 17.
PRESETS: Mapping[str, str] = {
    "NONE": "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "ALL": "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1",
    "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
    "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
    "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
    "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
    "ALL0.5": "0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5",
}

PRESET_FILE = "lbwpresets.txt"  # where people keep their own, as lbw does

_INS, _OUTS = BLOCKS[1:13], BLOCKS[14:]
# The blocks of a list by its length: those with attention in SDXL and in SD 1.x, then all of SDXL and of SD 1.x.
_LISTS = {
    12: ("BASE", "IN04", "IN05", "IN07", "IN08", "M00", *_OUTS[:6]),
    17: ("BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", *_OUTS[3:]),
    20: ("BASE", *_INS[:9], "M00", *_OUTS[:9]),
    26: BLOCKS,
}
_COUNTS = "12, 17, 20 or 26"
_FLUX = 61  # numbers of a list for Flux
# Each block is in one of these.
GROUPS: Mapping[str, tuple[str, ...]] = {"BASE": ("BASE",), "IN": _INS, "MID": ("M00",), "OUT": _OUTS}
_NAMED = {**GROUPS, "ALL": BLOCKS}
_NO_NAME = ':#@,">'  # what ends a name in lbw's file or in a tag, or makes a list of it

_LAYER = re.compile(r"unet\.(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)(?:\.|$)")
_DIGITS = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_NUMBER = re.compile(rf"[+-]?{_DIGITS}", re.ASCII)
_ITEM = re.compile(rf"[RU]|X(?:[+-]{_DIGITS})?|[+-]?{_DIGITS}", re.ASCII)


def block_of(path: str) -> str:
    """The block of a module or parameter (`.bias` allowed), by its diffusers path.

    Three numbers to a level, as in the original code: on the way down two layers and the downsampler, on the way up
    three layers, the upsampler with the last. So conv_in is IN00; down_blocks.i.{resnets,attentions}.j is
    IN(3i + j + 1), its downsampler IN(3i + 3); up_blocks.i.{resnets,attentions}.j is OUT(3i + j), its upsampler
    OUT(3i + 2). A level with fewer layers (toybox) keeps these numbers and leaves some out; layers beyond the third
    count as the third.
    What lies in no block is BASE: the text encoders, the time and label embeddings, conv_norm_out and conv_out. (To
    lbw BASE is the text encoders' layers alone; the rest it leaves at 1, whatever a list says.)
    """
    if path.startswith("unet.mid_block."):
        return "M00"
    if path.startswith("unet.conv_in"):
        return "IN00"
    layer = _LAYER.match(path)
    if not layer:
        return "BASE"
    side, level, kind, place = layer.groups()
    inside = 2 if kind in ("downsamplers", "upsamplers") else min(int(place), 2)
    number = 3 * int(level) + inside
    name = f"IN{number + 1:02}" if side == "down" else f"OUT{number:02}"
    return name if name in BLOCKS else "BASE"


def blocks_of(architecture: Architecture) -> tuple[str, ...]:
    """The blocks that an architecture has, in the order of BLOCKS: all 26 of SD 1.x and 2.x, 20 of SDXL."""
    there = {block_of(path) for path in (*architecture.shapes, *architecture.norms)}
    return tuple(block for block in BLOCKS if block in there)


def read_factors(text: str, presets: Mapping[str, str] = PRESETS, dynamic: float = 1.0) -> Factors:
    """The factors of an `lbw` list, of a preset by its name, or of named blocks.

    A list has 12, 17, 20 or 26 numbers. As in lbw, it says 0 for each block that it has no number for (see
    `unlisted`): "ALL", a list of 17, switches OUT00 to OUT02 off. X in a list stands for `dynamic`, X+0.2 and X-0.2
    for something more or less.
    Named blocks are "IN04:0.5,OUT03:0"; what is not named stays 1. A range "IN01-IN05:0.5" runs in the order of
    BLOCKS; BASE, IN, MID, OUT and ALL are groups. Of two that name the same block the later counts: "OUT:0,OUT03:1".
    SdloraError names what is wrong, and the nearest preset or block. lbw's random
    factors R and U are refused, since no picture could be made a second time with them.
    """
    where, told = _resolved(text, presets)
    return _ordered(_named(told, where) if ":" in told else _listed(told, where, dynamic))


def write_factors(factors: Factors) -> str:
    """As an `lbw` list, which `read_factors` and lbw read: the shortest of 12, 17, 20 or 26 that says them all."""
    told = dict.fromkeys(BLOCKS, 1.0) | _checked(factors)
    used = {block for block, factor in told.items() if factor}
    listed = next(blocks for blocks in _LISTS.values() if used <= set(blocks))
    return ",".join(short(told[block]) for block in listed)


def write_named(factors: Factors) -> str:
    """As named blocks, "IN04:0.5,OUT:0", which `read_factors` reads; "" where all are 1.

    Groups are called by their names where all of their blocks agree.
    """
    told = dict(_ordered(_checked(factors)))
    found: dict[str, float] = {}
    for name, group in GROUPS.items():
        values = {told.get(block, 1.0) for block in group}
        found |= {block: told[block] for block in group if block in told} if len(values) > 1 else {name: values.pop()}
    return ",".join(f"{name}:{short(factor)}" for name, factor in found.items() if factor != 1)


def absent(factors: Factors, architecture: Architecture) -> tuple[str, ...]:
    """The blocks with a factor that the architecture does not have: there the factor does nothing."""
    there = blocks_of(architecture)
    return tuple(block for block, _ in factors if block not in there)


def unlisted(text: str, architecture: Architecture, presets: Mapping[str, str] = PRESETS) -> tuple[str, ...]:
    """The architecture's blocks that a list, or a preset's list, has no number for and so switches off.

    Arguments and errors as of `read_factors`; named blocks switch nothing off unsaid.
    """
    where, told = _resolved(text, presets)
    if ":" in told:
        return ()
    listed = _blocks_listed(told.split(","), where)
    return tuple(block for block in blocks_of(architecture) if block not in listed)


def presets_in(folders: Iterable[Path]) -> dict[str, str]:
    """PRESETS, and those of lbw's file (PRESET_FILE) in each folder that has one; of one name, the file's counts.

    SdloraError: a file cannot be read, or two of them have different lists of one name.
    """
    found: dict[str, str] = {}
    for file in (folder / PRESET_FILE for folder in folders):
        if not file.exists():
            continue
        try:
            text = file.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise SdloraError(f"the presets {file} cannot be read ({error}); save them as text in UTF-8") from error
        for name, told in read_presets(text, str(file)).items():
            if found.setdefault(name, told) != told:
                raise SdloraError(f"{file} has another list for {name} than a folder before it; rename one of the two")
    return {**PRESETS, **found}


class PresetsIn(Mapping[str, str]):
    """`presets_in(folders)`, read when one is first asked for: a file that is wrong hinders only those who use it."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._folders = tuple(folders)

    @cached_property
    def _found(self) -> Mapping[str, str]:
        return presets_in(self._folders)

    def __getitem__(self, name: str) -> str:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def read_presets(text: str, where: str = "the presets") -> dict[str, str]:
    """Presets by name, from the text of lbw's file: a line NAME:1,0,0... each; those with "#" are comments, as in lbw.

    where: what to call the text in errors. Random factors, and lists of 61, for Flux, are kept for the sake of those
    who write the file again, and refused by name when they are used.
    SdloraError names the line that is no preset, or one that stands there twice with different lists.
    """
    presets: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or "#" in line:
            continue
        name, told = _preset(line, f"{where}, line {number}")
        if presets.setdefault(name, told) != told:
            raise SdloraError(
                f"{where}, line {number}: there is another list for {name} before; delete one or give it another name"
            )
    return presets


def write_presets(presets: Mapping[str, str]) -> str:
    """The text of lbw's file, which `read_presets` reads. SdloraError names a preset that the file cannot hold."""
    for name, told in presets.items():
        try:
            kept = read_presets(f"{name}:{told}")
        except SdloraError as error:
            raise SdloraError(f"preset {name!r} has no place in lbw's file: {error}") from None
        if kept != {name: told}:
            raise SdloraError(f"preset {name!r} has no place in lbw's file: a name has no : # or line breaks in it")
    return "".join(f"{name}:{told}\n" for name, told in presets.items())


def preset_name(text: str) -> str:
    """A name for a new preset, without spaces around it.

    SdloraError: none that lbw's file can hold and every tag can say, or one that means something else already.
    """
    name = text.strip()
    if not name or not name.isprintable() or set(_NO_NAME) & set(name):
        raise SdloraError(f"{name!r} is no name of a preset; write one without {' '.join(_NO_NAME)}")
    if is_number(name) or name.upper() in (*BLOCKS, *_NAMED):
        what = "a number" if is_number(name) else "the name of blocks"
        raise SdloraError(f"{name} is {what}; give the preset another name")
    return name


def is_number(text: str) -> bool:
    """Whether tags read it as a number, be it finite or not."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _preset(line: str, where: str) -> tuple[str, str]:
    """Name and list of a line."""
    name, _, told = (part.strip() for part in line.partition(":"))
    items = [item.strip() for item in told.split(",")]
    if not name or len(items) < 2 or not all(map(_ITEM.fullmatch, items)):
        raise SdloraError(f"{where}: {line.strip()[:60]!r} is no preset; write NAME:1,0,... or put # before it")
    if len(items) != _FLUX:
        _blocks_listed(items, f"{where}: {name}")
    return name, told


def _resolved(text: str, presets: Mapping[str, str]) -> tuple[str, str]:
    """What to call the list in an error, and the list."""
    text = text.strip()
    if text in presets:
        return f"preset {text}", presets[text].strip()
    if "," not in text and ":" not in text:
        raise SdloraError(f"no preset of block weights is called {text!r}{nearest(text, presets)}")
    return "block weights", text


def _listed(told: str, where: str, dynamic: float) -> dict[str, float]:
    parts = [part.strip() for part in told.split(",")]
    listed = _blocks_listed(parts, where)
    numbers = {block: _item(part, f"{where}: {block}", dynamic) for block, part in zip(listed, parts, strict=True)}
    return dict.fromkeys(BLOCKS, 0.0) | numbers


def _blocks_listed(parts: list[str], where: str) -> tuple[str, ...]:
    if len(parts) in _LISTS:
        return _LISTS[len(parts)]
    flux = f" ({_FLUX} are for Flux)" if len(parts) == _FLUX else ""
    raise SdloraError(f"{where}: {len(parts)} numbers{flux}; an lbw list has {_COUNTS}")


def _item(part: str, where: str, dynamic: float) -> float:
    """One entry of a list."""
    if part in ("R", "U"):
        raise SdloraError(f"{where} is {part}, a random factor, with which no picture is made twice; write a number")
    if part == "X":
        return float(dynamic)
    if part[:2] in ("X+", "X-"):
        return dynamic + _number(part[1:], where)
    return _number(part, where)


def _named(told: str, where: str) -> dict[str, float]:
    factors: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in told.split(","))):
        place, colon, number = (piece.strip() for piece in part.partition(":"))
        if not colon:
            raise SdloraError(f"{where}: {part!r} has no block and number; write as in IN04:0.5")
        factors |= dict.fromkeys(_places(place.upper(), where), _number(number, f"{where}: {place}"))
    return factors


def _places(place: str, where: str) -> tuple[str, ...]:
    """The blocks of a name, a group or a range."""
    if place in _NAMED:
        return _NAMED[place]
    ends = [end.strip() for end in place.split("-")]
    wrong = next((end for end in ends if end not in BLOCKS), None)
    if wrong is not None or len(ends) > 2:
        unknown = place if wrong is None else wrong
        raise SdloraError(f"{where}: there is no block {unknown!r}{nearest(unknown, (*BLOCKS, *_NAMED))}")
    first, last = sorted((BLOCKS.index(ends[0]), BLOCKS.index(ends[-1])))
    return BLOCKS[first : last + 1]


def _number(text: str, where: str) -> float:
    number = float(text) if _NUMBER.fullmatch(text) else float("nan")
    if not isfinite(number):
        raise SdloraError(f"{where} is {text!r}; write a number, such as 0.5")
    return number


def _checked(factors: Factors) -> dict[str, float]:
    for block, factor in factors:
        if block not in BLOCKS:
            raise SdloraError(f"there is no block {block!r}{nearest(block, BLOCKS)}")
        if not isfinite(factor):
            raise SdloraError(f"the factor of {block} is {factor}; it must be a finite number")
    return dict(factors)


def _ordered(factors: Mapping[str, float]) -> Factors:
    return tuple((block, factors[block]) for block in BLOCKS if factors.get(block, 1.0) != 1.0)
