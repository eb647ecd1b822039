"""Know before you mix: how large LoRAs are, block by block, and where two of them get in each other's way."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from math import acos, copysign, degrees, exp, log
from pathlib import Path
from typing import Any

from sdlora.errors import SdloraError
from sdlora.formats.checkpoints import Checkpoint
from sdlora.formats.read import describe, read
from sdlora.formats.receipt import Receipt
from sdlora.formats.sources import name_of
from sdlora.lowrank.adapter import Adapter, same_vectors
from sdlora.lowrank.laws import Delta
from sdlora.lowrank.overlap import Change, change_of, overlap, principal_cosines
from sdlora.workbench.abreast import abreast
from sdlora.workbench.advice import advice
from sdlora.workbench.base_norms import base_norms
from sdlora.workbench.bases import base_of, refuse_huge
from sdlora.workbench.meetings import Measured, Meeting, by_block, by_component, meeting, norm, relative
from sdlora.workbench.output import Step
from sdlora.workbench.parts import shared_architecture

LONGEST = 40  # characters of a label, that of a folder before it apart


@dataclass(frozen=True)
class Sized:
    """One of the LoRAs, at weight 1.

    label: its name without the ending, and what else tells it from the others. norm: |dW|, of all that was measured;
    relative: that over |W|, None without a base. unmeasured: why a change could not be measured, by parameter.
    """

    label: str
    receipt: Receipt
    norm: float
    relative: float | None
    unmeasured: Mapping[str, str]

    @property
    def path(self) -> Path:
        return self.receipt.path


@dataclass(frozen=True)
class Closest:
    """The matrix in which two LoRAs meet most (the largest inner product), with the principal angles there in degrees,
    smallest first, between the directions that carry the energy of what they write to and of what they read from.
    """

    parameter: str
    columns: tuple[float, ...]
    rows: tuple[float, ...]


@dataclass(frozen=True)
class Pair:
    """Two of the LoRAs, by their numbers: where they meet, and one line of advice.

    tokens: those that both teach, each in its own way; a mixer can hold only one of the two then.
    """

    first: int
    second: int
    blocks: tuple[Meeting, ...]
    components: tuple[Meeting, ...]
    whole: Meeting
    closest: Closest | None
    tokens: tuple[str, ...]
    advice: str


@dataclass(frozen=True)
class Conflicts:
    """What there is to know before mixing.

    base: the model that sizes are told against, None without one. equalised: the weights, one for each LoRA, at which
    all have the same size (|dW| / |W| where a base is known, else |dW|), their geometric mean being 1; None where
    there are none, and then `why_not` says why. They are an offer: nothing applies them.
    """

    adapters: tuple[Sized, ...]
    pairs: tuple[Pair, ...]
    base: Path | None
    equalised: tuple[float, ...] | None
    why_not: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all that is known."""
        weights = self.equalised or [None] * len(self.adapters)
        adapters = [
            {
                "path": str(one.path),
                "label": one.label,
                "sha256": one.receipt.sha256,
                "norm": one.norm,
                "relative": one.relative,
                "equalised": weight,
                "unmeasured": dict(one.unmeasured),
                "left_out": dict(one.receipt.left_out),
            }
            for one, weight in zip(self.adapters, weights, strict=True)
        ]
        told = {"base": None if self.base is None else str(self.base), "why_not_equalised": self.why_not}
        return {"adapters": adapters, "pairs": [asdict(pair) for pair in self.pairs], **told}


def conflicts(
    files: Sequence[Path | str], base: Checkpoint | None = None, partial: bool = False, cache: Path | None = None
) -> Conflicts:
    """Compare LoRAs, two by two, at weight 1.

    base: the model to tell their sizes against, which also gives the weights that some laws depend on. partial: take
    what fits of a file that is for another model than the first, too. cache: see `base_norms`.
    SdloraError: fewer than two are given, one cannot be read, or they are for different architectures.
    """
    work = comparing(files, base, partial, cache)
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def comparing(
    files: Sequence[Path | str], base: Checkpoint | None = None, partial: bool = False, cache: Path | None = None
) -> Generator[Step, None, Conflicts]:
    """`conflicts` step by step; yields after each parameter."""
    if len(files) < 2:
        raise SdloraError("conflicts are between LoRAs; name two files or more")
    paths = [Path(file) for file in files]
    architecture = base.architecture if base else shared_architecture([describe(path) for path in paths], partial)
    opened = [one for _, one in abreast(lambda path: read(path, architecture, partial), paths)]
    adapters = [adapter for adapter, _ in opened]
    parameters = list(dict.fromkeys(path for adapter in adapters for path in adapter.deltas))
    norms = base_norms(base, parameters, cache) if base else {}
    measured: list[Measured] = []
    unmeasured: list[dict[str, str]] = [{} for _ in adapters]

    def work(path: str) -> tuple[Measured, dict[int, str]]:
        return _measured(path, adapters, base, norms.get(path))

    for done, (path, (one, reasons)) in enumerate(abreast(work, parameters), 1):
        measured.append(one)
        for which, reason in reasons.items():
            unmeasured[which][path] = reason
        yield Step(done, len(parameters), path, None)
    labels = _labels(paths)
    sized = tuple(
        Sized(labels[i], receipt, norm(measured, i), relative(measured, i), unmeasured[i])
        for i, (_, receipt) in enumerate(opened)
    )
    both = list(combinations(range(len(files)), 2))
    pairs = tuple(one for _, one in abreast(lambda two: _pair(two, measured, sized, adapters, base), both))
    return Conflicts(sized, pairs, base.path if base else None, *_equalised(sized))


def _measured(
    path: str, adapters: Sequence[Adapter], base: Checkpoint | None, base_norm: float | None
) -> tuple[Measured, dict[int, str]]:
    """One parameter, and why which adapter's change of it could not be measured."""
    changes: dict[int, Change] = {}
    reasons: dict[int, str] = {}
    for which, adapter in enumerate(adapters):
        if path in adapter.deltas:
            try:
                changes[which] = _change(path, adapter.deltas[path], base)
            except SdloraError as error:
                reasons[which] = str(error)
    norms = tuple(
        None if which in reasons else changes[which].norm if which in changes else 0.0 for which in range(len(adapters))
    )
    overlaps = {(i, j): overlap(changes[i], changes[j]) for i, j in combinations(sorted(changes), 2)}
    matrix = any(len(change.shape) > 1 for change in changes.values())
    return Measured(path, matrix, norms, base_norm, overlaps), reasons


def _change(path: str, delta: Delta, base: Checkpoint | None) -> Change:
    change = change_of(delta, base_of(delta, path, base))
    refuse_huge(change.norm)
    return change


def _pair(
    both: tuple[int, int],
    measured: Sequence[Measured],
    sized: Sequence[Sized],
    adapters: Sequence[Adapter],
    base: Checkpoint | None,
) -> Pair:
    first, second = both
    blocks, whole = by_block(measured, first, second), meeting("all", measured, first, second)
    here, there = sized[first], sized[second]
    closest = _closest(first, second, measured, adapters, base)
    tokens = clashing(adapters[first], adapters[second])
    same = here.receipt.content == there.receipt.content
    unmeasured = len(here.unmeasured) + len(there.unmeasured)
    told = advice((here.label, there.label), blocks, whole, same, unmeasured, tokens)
    return Pair(first, second, blocks, by_component(measured, first, second), whole, closest, tokens, told)


def clashing(one: Adapter, other: Adapter) -> tuple[str, ...]:
    """Tokens that both teach, not alike; a prompt's words are read in small letters, and so are tokens."""

    def clashes(token: str) -> bool:
        alike = (vectors for name, vectors in other.embeddings.items() if name.lower() == token.lower())
        return not all(same_vectors(one.embeddings[token], vectors) for vectors in alike)

    return tuple(filter(clashes, sorted(one.embeddings)))


def _closest(
    first: int, second: int, measured: Sequence[Measured], adapters: Sequence[Adapter], base: Checkpoint | None
) -> Closest | None:
    met = {
        one.path: abs(one.overlaps[first, second].inner)
        for one in measured
        if one.matrix and (first, second) in one.overlaps
    }
    if not any(met.values()):
        return None
    path = max(met, key=met.__getitem__)
    one, other = (_change(path, adapters[which].deltas[path], base) for which in (first, second))
    columns, rows = (tuple(degrees(acos(cosine)) for cosine in side.tolist()) for side in principal_cosines(one, other))
    return Closest(path, columns, rows)


def _equalised(sized: Sequence[Sized]) -> tuple[tuple[float, ...] | None, str]:
    """The weights, or None and why there are none."""
    for one in sized:
        if one.unmeasured:
            why = next(iter(one.unmeasured.values()))
            return None, f"{len(one.unmeasured)} changes of {one.label} could not be measured: {why}"
        if not one.norm:
            return None, f"{one.label} changes nothing"
    relatives = [one.relative for one in sized if one.relative]
    sizes = relatives if len(relatives) == len(sized) else [one.norm for one in sized]
    mean = exp(sum(map(log, sizes)) / len(sizes))
    return tuple(mean / size for size in sizes), ""


def at_present_size(equalised: Sequence[float], now: Sequence[float], largest: float) -> tuple[float, ...]:
    """Equalised weights for people who have set others: as large as those in the mean, and with their signs.

    equalised: see Conflicts. now: the weights that are set; their geometric mean, 1 where one of them is 0, becomes
    that of the result. largest: no weight goes beyond it; all shrink together. Rounded to three significant digits, so
    that none becomes 0.
    """
    mean = exp(sum(log(abs(weight)) for weight in now) / len(now)) if all(now) else 1.0
    mean = min(mean, largest / max(equalised))
    pairs = zip(equalised, now, strict=True)
    return tuple(float(f"{copysign(mean * weight, before or 1.0):.3g}") for weight, before in pairs)


def _labels(paths: Sequence[Path]) -> list[str]:
    """The names without the ending; where two are alike, the folder before it, or else a number behind it."""
    short = [_cut(name_of(path.absolute())) for path in paths]
    long = [f"{_cut(path.absolute().parent.name)}/{name}" for path, name in zip(paths, short, strict=True)]
    pairs = list(zip(short, long, strict=True))
    found = [name if short.count(name) == 1 or long.count(more) > 1 else more for name, more in pairs]
    return [one if found.count(one) == 1 else f"{one} ({found[:i].count(one) + 1})" for i, one in enumerate(found)]


def _cut(name: str) -> str:
    """Long names without their middle: names that are alike mostly differ at the end."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2 - 3]}...{name[-LONGEST // 2 :]}"


def letter(which: int) -> str:
    """A short name for the LoRA of this number: A, B, ... and, beyond Z, its number counted from 1."""
    return chr(ord("A") + which) if which < 26 else str(which + 1)


def titles(pair: Pair, relative: bool) -> tuple[str, ...]:
    """Of the columns of `Meeting.texts`."""
    sized = "|dW|/|W|" if relative else "|dW|"
    return f"{letter(pair.first)} {sized}", f"{letter(pair.second)} {sized}", "cosine", "columns", "rows"
