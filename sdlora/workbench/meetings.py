"""Where two adapters meet: what was measured parameter by parameter, put together by block and by component."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

from sdlora.lowrank.overlap import Overlap
from sdlora.workbench.blocks import block_or_encoder, place


@dataclass(frozen=True)
class Measured:
    """One parameter.

    norms: of each adapter's change, 0 where it changes nothing, None where that could not be measured. base: the norm
    of the base's parameter, None where it is not known. overlaps: of the changes by pair of adapters, where both are.
    """

    path: str
    matrix: bool
    norms: tuple[float | None, ...]
    base: float | None
    overlaps: Mapping[tuple[int, int], Overlap]


@dataclass(frozen=True)
class Meeting:
    """Two adapters in a block, in a component, or everywhere.

    norms: |dW| of each, the root of the sum of its parameters' squares. relative: that over |W| of the parameters that
    it changes, None without a base. cosine: the sum of the inner products over the product of the norms, -1 to 1.
    columns, rows: overlap of what they write to and read from, each parameter's counted by the product of its norms,
    as in the cosine; 0 (as by chance) to 1. These three are None where one of the two changes nothing; the overlaps
    also where there are only vectors. A parameter that one of the two could not be measured in counts for none of them.
    """

    name: str
    norms: tuple[float, float]
    relative: tuple[float | None, float | None]
    cosine: float | None
    columns: float | None
    rows: float | None

    def sizes(self, relative: bool) -> tuple[float | None, float | None]:
        """The relative norms or the norms, None for nothing."""
        first, second = self.relative if relative else self.norms
        return first or None, second or None

    def texts(self, relative: bool) -> tuple[str, ...]:
        """For people, "" for nothing: the two sizes, the cosine and the overlaps of columns and rows."""
        sizes = ("" if one is None else f"{one:.3g}" for one in self.sizes(relative))
        met = ("" if one is None else f"{round(one, 2) + 0.0:.2f}" for one in (self.cosine, self.columns, self.rows))
        return (*sizes, *met)


def meeting(name: str, parameters: Iterable[Measured], first: int, second: int) -> Meeting:
    """Put parameters together, for the adapters of these two numbers."""
    parameters = list(parameters)
    shared = [one for one in parameters if one.norms[first] is not None and one.norms[second] is not None]
    matrices = [one for one in shared if one.matrix]
    met = [(one, one.overlaps[first, second]) for one in shared if (first, second) in one.overlaps]
    both = norm(shared, first) * norm(shared, second)
    of_matrices = norm(matrices, first) * norm(matrices, second)
    columns, rows = 0.0, 0.0
    for one, overlap in met:
        weight = (one.norms[first] or 0) * (one.norms[second] or 0)
        columns += weight * (overlap.columns or 0)
        rows += weight * (overlap.rows or 0)
    return Meeting(
        name,
        (norm(parameters, first), norm(parameters, second)),
        (relative(parameters, first), relative(parameters, second)),
        min(max(sum(overlap.inner for _, overlap in met) / both, -1.0), 1.0) if both else None,
        min(max(columns / of_matrices, 0.0), 1.0) if of_matrices else None,
        min(max(rows / of_matrices, 0.0), 1.0) if of_matrices else None,
    )


def norm(parameters: Iterable[Measured], which: int) -> float:
    """|dW| of an adapter over these parameters."""
    return sqrt(sum((one.norms[which] or 0.0) ** 2 for one in parameters))


def relative(parameters: Iterable[Measured], which: int) -> float | None:
    """|dW| / |W| of an adapter over those of these parameters that it changes and whose base is known."""
    changed = [one for one in parameters if one.norms[which] and one.base is not None]
    base = sqrt(sum((one.base or 0.0) ** 2 for one in changed))
    return norm(changed, which) / base if base else None


def by_block(parameters: Sequence[Measured], first: int, second: int) -> tuple[Meeting, ...]:
    """The blocks of the UNet in their order, then each text encoder."""
    return _grouped(parameters, first, second, block_or_encoder)


def by_component(parameters: Sequence[Measured], first: int, second: int) -> tuple[Meeting, ...]:
    """The UNet and each text encoder."""
    return _grouped(parameters, first, second, lambda path: path.partition(".")[0])


def _grouped(
    parameters: Sequence[Measured], first: int, second: int, group: Callable[[str], str]
) -> tuple[Meeting, ...]:
    """The groups that one of the two changes."""
    groups: dict[str, list[Measured]] = {}
    for one in parameters:
        if one.norms[first] != 0 or one.norms[second] != 0:
            groups.setdefault(group(one.path), []).append(one)
    return tuple(meeting(name, groups[name], first, second) for name in sorted(groups, key=place))
