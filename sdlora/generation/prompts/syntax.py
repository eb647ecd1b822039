"""The language of A1111's prompts: AND, editing and alternation over the steps, emphasis, BREAK.

It reads as A1111 1.6 and later read it (its modules/prompt_parser.py), a step early or late where that is. Brackets
that are of no such form are text. Every function takes time in proportion to the text, however deep it is nested.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import isfinite

Spans = tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Part:
    """A part of a prompt with AND. weight: of its guidance; spans: (first step, from 0, and the text from then on)."""

    weight: float
    spans: Spans

    def text_at(self, step: int) -> str:
        """The text of a step, from 0."""
        return self.spans[bisect_right(self.spans, step, key=lambda span: span[0]) - 1][1]


@dataclass(frozen=True)
class Piece:
    """A run of text with the weight of its emphasis; `ends_chunk`: no text but BREAK, which fills the chunk up."""

    text: str
    weight: float = 1.0
    ends_chunk: bool = False


BREAK = Piece("", ends_chunk=True)
DEEPEST = 100  # of brackets in one another; what is deeper weighs no more: 1.1 ** 100 is 13781

_AND = re.compile(r"\bAND\b")
_AND_WEIGHT = re.compile(r"\s*[-+]?(?:\d+\.?|\d*\.\d+)")
_BREAK = re.compile(r"\bBREAK\b")
_UNIT = re.compile(r"[^\\\[\]():|]+|\\.|[\[\]():|]")  # a run of text, an escaped character, or a sign of the grammar
_WHEN = re.compile(r"\s*([-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)\s*")
_EMPHASIS = re.compile(
    r"\\([()\[\]\\]?)"  # an escaped sign; a backslash before anything else is nothing
    r"|:\s*([-+]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)"
    r"|[()\[\]:]|[^\\()\[\]:]+"
)


def parts_of(prompt: str, steps: int) -> tuple[Part, ...]:
    """What a prompt asks for, one part if it has no AND. steps: how often the UNet is asked.

    A number behind a colon at the end is the weight of a part, also of the only one.
    """
    return tuple(Part(weight, _spans(text, steps)) for text, weight in map(_weighted, _AND.split(prompt)))


def negative_of(prompt: str, steps: int) -> Part:
    """The same for a negative prompt, where AND is a word and a number at the end is text."""
    return Part(1.0, _spans(prompt, steps))


def _weighted(text: str) -> tuple[str, float]:
    text = text.rstrip()
    before, colon, number = text.rpartition(":")
    if colon and _AND_WEIGHT.fullmatch(number) and isfinite(float(number)):
        return before.rstrip(), float(number)
    return text, 1.0


def _spans(text: str, steps: int) -> Spans:
    """A1111 asks for the text of step s while its own count, from 0, is at most s: a text ends one step late."""
    spans: list[tuple[int, str]] = []
    begins = 0
    for end, shown in schedule_of(text, steps):
        if begins < steps and not (spans and spans[-1][1] == shown):
            spans.append((begins, shown))
        begins = end + 1
    return tuple(spans)


# Editing and alternation


@dataclass(frozen=True, eq=False)
class _Edit:
    """[before:after:when]; the last step, from 1, of `before` is `end`."""

    before: "Sequence[_Node]"
    after: "Sequence[_Node]"
    end: int

    def at(self, step: int) -> "Sequence[_Node]":
        return self.before if step <= self.end else self.after


@dataclass(frozen=True, eq=False)
class _Turns:
    """[one|other|...], each for a step."""

    options: "Sequence[Sequence[_Node]]"

    def at(self, step: int) -> "Sequence[_Node]":
        return self.options[(step - 1) % len(self.options)]


_Node = str | _Edit | _Turns


@dataclass
class _Open:
    """A bracket that is open: where it stands among the nodes, and the signs right inside it."""

    start: int
    colons: list[int] = field(default_factory=list)
    bars: list[int] = field(default_factory=list)


def schedule_of(text: str, steps: int) -> Spans:
    """The texts that prompt editing and alternation make, each with the step, from 1, up to which it was written for.

    [a:b:0.5] and [a:b:12] are a, then b: a number with a dot is a share of the steps, one without a step. [a:0.5] is
    nothing, then a; [a::0.5] a, then nothing. [a|b] is a at step 1, b at step 2 and so on. All nest.
    """
    nodes = _nodes(text, steps)
    if nodes is None:
        return ((steps, text),)
    ends = {steps}
    for node in _all(nodes):
        if isinstance(node, _Turns):
            ends.update(range(1, steps + 1))
        elif isinstance(node, _Edit) and node.end >= 1:
            ends.add(node.end)
    return tuple((end, _text(nodes, end)) for end in sorted(ends))


def _nodes(text: str, steps: int) -> list[_Node] | None:
    """The text with what changes in it; None where it has a | that is in no alternation or a stray backslash.

    A bracket is of the grammar if all brackets in it are. So when one is not, those around it are text too.
    """
    nodes: list[_Node] = []
    around: list[_Open] = []
    position = 0
    for unit in _UNIT.finditer(text):
        if unit.start() != position:
            return None
        position, sign = unit.end(), unit[0]
        if sign in ("(", "["):
            around.append(_Open(len(nodes)))
        elif sign == ":" and around:
            around[-1].colons.append(len(nodes))
        elif sign == "|":
            if not around:
                return None
            around[-1].bars.append(len(nodes))
        nodes.append(sign)
        if sign in (")", "]") and around:
            bracket = around.pop()
            if not _close(nodes, bracket, steps):
                if bracket.bars or any(one.bars for one in around):
                    return None
                around.clear()
    unclosed = any(one.bars for one in around)
    return None if unclosed or position != len(text) else nodes


def _close(nodes: list[_Node], bracket: _Open, steps: int) -> bool:
    """Make one node of the bracket that ends here if it changes anything; False where it is not of the grammar."""
    opening, closing = nodes[bracket.start], nodes[-1]
    colons, bars = bracket.colons, bracket.bars
    if (opening, closing) == ("(", ")"):
        return len(colons) <= 1 and not bars
    if (opening, closing) != ("[", "]") or (colons and bars) or len(colons) > 2:
        return False
    if bars:
        borders = [bracket.start, *bars, len(nodes) - 1]
        options = [nodes[left + 1 : right] for left, right in zip(borders, borders[1:], strict=False)]
        nodes[bracket.start :] = [_Turns(options)]
    elif colons:
        *_, number = nodes[colons[-1] + 1 : -1] or [""]
        when = _WHEN.fullmatch(number) if isinstance(number, str) and len(nodes) == colons[-1] + 3 else None
        if not when:
            return False
        before = nodes[bracket.start + 1 : colons[0]] if len(colons) == 2 else []
        after = nodes[(colons[0] if len(colons) == 2 else bracket.start) + 1 : colons[-1]]
        nodes[bracket.start :] = [_Edit(before, after, _end(when[1], steps))]
    return True


def _end(number: str, steps: int) -> int:
    when = float(number) * steps if "." in number else float(number)
    return int(max(0.0, min(when, float(steps))))


def _all(nodes: Sequence[_Node]) -> Iterator[_Node]:
    waiting = [nodes]
    while waiting:
        for node in waiting.pop():
            yield node
            if isinstance(node, _Edit):
                waiting += [node.before, node.after]
            elif isinstance(node, _Turns):
                waiting += node.options


def _text(nodes: Sequence[_Node], step: int) -> str:
    shown: list[str] = []
    waiting = [iter(nodes)]
    while waiting:
        node = next(waiting[-1], None)
        if node is None:
            waiting.pop()
        elif isinstance(node, str):
            shown.append(node)
        else:
            waiting.append(iter(node.at(step)))
    return "".join(shown)


# Emphasis and BREAK


def pieces_of(text: str) -> tuple[Piece, ...]:
    r"""The text in runs of one weight, BREAK between them; at least one.

    (x) weighs 1.1, (x:1.3) 1.3, [x] 1 / 1.1, and nested ones the product; \( \) \[ \] \\ are the signs themselves. A
    bracket that is never closed counts to the end, and one that was never opened is text.
    """
    texts: list[str | None] = []  # None is BREAK
    weights: list[float] = []
    opened: dict[str, list[int | None]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        for i in range(len(weights) if start is None else start, len(weights)):
            weights[i] *= factor

    for unit in _EMPHASIS.finditer(text):
        sign, escaped, number = unit.group(0, 1, 2)
        if sign in opened:
            depth = len(opened["("]) + len(opened["["])
            opened[sign].append(len(weights) if depth < DEEPEST else None)
        elif number and opened["("]:
            close("(", float(number))
        elif sign == ")" and opened["("]:
            close("(", 1.1)
        elif sign == "]" and opened["["]:
            close("[", 1 / 1.1)
        else:
            texts += [escaped] if escaped is not None else _with_breaks(sign)
            weights += [1.0] * (len(texts) - len(weights))
    for bracket, factor in (("(", 1.1), ("[", 1 / 1.1)):
        while opened[bracket]:
            close(bracket, factor)
    return _merged(texts, weights)


def _with_breaks(text: str) -> list[str | None]:
    """The text, and for each BREAK in it None; spaces beside those go."""
    first, *others = _BREAK.split(text)
    found: list[str | None] = [first]
    for other in others:
        found[-1:] = [(found[-1] or "").rstrip(), None, other.lstrip()]
    return found


def _merged(texts: Sequence[str | None], weights: Sequence[float]) -> tuple[Piece, ...]:
    """Neighbours of one weight as one piece."""
    pieces = []
    runs = groupby(zip(texts, weights, strict=True), key=lambda run: (run[0] is None, run[1]))
    for (breaks, weight), run in runs:
        pieces.append(BREAK if breaks else Piece("".join(text or "" for text, _ in run), weight))
    return tuple(pieces) or (Piece(""),)
