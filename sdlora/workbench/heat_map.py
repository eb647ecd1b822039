"""Conflicts as a picture: a panel for each pair, its blocks from top to bottom, their numbers from left to right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sdlora.errors import SdloraError
from sdlora.formats.atomic import replace_file
from sdlora.workbench.conflicts import Conflicts, Pair, letter, titles
from sdlora.workbench.meetings import Meeting

Colour = tuple[int, int, int]

MARGIN, ROW, COLUMN, NAMES = 28, 26, 92, 132  # pixels; NAMES: width of the names of blocks
GAP = 6  # before the last row
ACROSS = 3  # panels side by side
TEXT, SMALL, TITLE = 15, 13, 18  # sizes of the letters
LINE = TEXT + 4
WHITE, INK, FAINT, EMPTY = (255, 255, 255), (34, 34, 38), (120, 120, 126), (238, 238, 240)
SIZE, OVERLAP = (28, 84, 140), (122, 62, 146)  # the fullest colour of a size and of an overlap
OPPOSED, ALIKE = (190, 40, 34), (22, 118, 84)
STRONG = 0.5  # a cosine beyond it has the fullest colour
DARK = 3 * 130  # sum of red, green and blue below which ink is white


@dataclass(frozen=True)
class Cell:
    """A number as it is shown, "" for nothing, and its colour."""

    text: str
    colour: Colour


def refuse_picture(path: Path, overwrite: bool) -> None:
    """SdloraError where no picture can be written: better said before the work than after it."""
    if path.suffix.lower() != ".png":
        raise SdloraError(f"{path}: the picture is a PNG; name a .png file")
    if path.is_dir() or (path.exists() and not overwrite):
        raise SdloraError(f"{path} is there already; name another file, or ask to overwrite it")
    if not path.parent.is_dir():
        raise SdloraError(f"{path.parent} is no folder; name one that is there for the picture")


def save_heat_map(found: Conflicts, path: Path, overwrite: bool = False) -> None:
    """Write the picture of `heat_map`; SdloraError where that cannot be."""
    refuse_picture(path, overwrite)
    image = heat_map(found)
    try:
        replace_file(path, lambda partial: image.save(partial, "PNG"))
    except OSError as error:
        raise SdloraError(f"{path} cannot be written ({error.strerror or error}); name another place") from error


def heat_map(found: Conflicts) -> Image.Image:
    """The picture: sizes in one colour scale for all panels, cosines from red (against) to green (alike), overlaps."""
    across = min(len(found.pairs), ACROSS)
    down = ceil(len(found.pairs) / across)
    width = NAMES + 5 * COLUMN
    lines = max(len(_wrapped(pair.advice, width)) for pair in found.pairs)
    head = 2 * (TITLE + 8) + lines * LINE + ROW // 2
    height = head + ROW * (2 + max(len(pair.blocks) for pair in found.pairs)) + GAP
    size = MARGIN + across * (width + MARGIN), MARGIN + down * (height + MARGIN) + 2 * ROW
    image = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(image)
    told = [block.sizes(found.base is not None) for pair in found.pairs for block in pair.blocks]
    largest = max((size for sizes in told for size in sizes if size), default=1.0)
    for i, pair in enumerate(found.pairs):
        left, top = MARGIN + i % across * (width + MARGIN), MARGIN + i // across * (height + MARGIN)
        _names(draw, left, top, width, found, pair)
        _table(draw, left, top + head, pair, found.base is not None, largest)
    _legend(draw, MARGIN, size[1] - MARGIN - ROW, size[0] - 2 * MARGIN)
    return image


def _names(draw: ImageDraw.ImageDraw, left: int, top: int, width: int, found: Conflicts, pair: Pair) -> None:
    for which in (pair.first, pair.second):
        _text(draw, (left, top), _cut(f"{letter(which)}  {found.adapters[which].label}", width, TITLE), TITLE)
        top += TITLE + 8
    for i, line in enumerate(_wrapped(pair.advice, width)):
        _text(draw, (left, top + i * LINE), line, TEXT, FAINT)


def _table(draw: ImageDraw.ImageDraw, left: int, top: int, pair: Pair, relative: bool, largest: float) -> None:
    for i, title in enumerate(titles(pair, relative)):
        _text(draw, (left + NAMES + i * COLUMN + COLUMN // 2, top + ROW // 2), title, SMALL, FAINT, "mm")
    for row, block in enumerate((*pair.blocks, pair.whole), 1):
        y = top + row * ROW + (GAP if block is pair.whole else 0)
        _text(draw, (left, y + ROW // 2), block.name, TEXT, anchor="lm")
        for i, cell in enumerate(_cells(block, relative, largest)):
            _cell(draw, left + NAMES + i * COLUMN, y, cell)


def _cells(block: Meeting, relative: bool, largest: float) -> Iterator[Cell]:
    cosine = block.cosine or 0.0
    shares = (
        *((SIZE, (size or 0.0) / largest) for size in block.sizes(relative)),
        (ALIKE if cosine > 0 else OPPOSED, abs(cosine) / STRONG),
        *((OVERLAP, overlap or 0.0) for overlap in (block.columns, block.rows)),
    )
    for text, (colour, share) in zip(block.texts(relative), shares, strict=True):
        yield Cell(text, _mixed(colour, share) if text else EMPTY)


def _cell(draw: ImageDraw.ImageDraw, left: int, top: int, cell: Cell) -> None:
    draw.rectangle((left + 1, top + 1, left + COLUMN - 2, top + ROW - 2), fill=cell.colour)
    ink = WHITE if sum(cell.colour) < DARK else INK
    _text(draw, (left + COLUMN // 2, top + ROW // 2), cell.text, SMALL, ink, "mm")


def _legend(draw: ImageDraw.ImageDraw, left: int, top: int, width: int) -> None:
    told = (
        "sizes: the darker, the larger, one scale for all;  cosine: red against each other, green the same way;  "
        "columns, rows: how far both write to and read from the same directions, 0 (chance) to 1"
    )
    for i, line in enumerate(_wrapped(told, width, SMALL)):
        _text(draw, (left, top + i * (SMALL + 4)), line, SMALL, FAINT)


def _mixed(full: Colour, share: float) -> Colour:
    """From white to the full colour."""
    share = min(max(share, 0.0), 1.0)
    red, green, blue = (round(255 + (one - 255) * share) for one in full)
    return red, green, blue


def _text(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    size: int,
    colour: Colour = INK,
    anchor: str = "la",
) -> None:
    draw.text(place, text, fill=colour, font=ImageFont.load_default(size), anchor=anchor)


def _wide(text: str, size: int) -> float:
    return ImageFont.load_default(size).getlength(text)


def _cut(text: str, width: int, size: int) -> str:
    """In the middle, where names that are alike differ least."""
    text = "".join(one if one.isprintable() else "?" for one in text)
    if _wide(text, size) <= width:
        return text
    kept = next(n for n in range(len(text) - 1, -1, -1) if _wide(_middle(text, n), size) <= width)
    return _middle(text, kept)


def _middle(text: str, kept: int) -> str:
    return f"{text[: ceil(kept / 2)]}...{text[len(text) - kept // 2 :]}"


def _wrapped(text: str, width: int, size: int = TEXT) -> list[str]:
    """Lines that fit the width; words that are too long are cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _wide(longer, size) > width:
            lines.append(_cut(word, width, size))
        else:
            lines[-1] = _cut(longer, width, size)
    return lines
