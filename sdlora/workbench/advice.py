"""One line of advice about two LoRAs, in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from sdlora.formats.block_weights import BLOCKS
from sdlora.workbench.meetings import Meeting

# |A + B|^2 = |A|^2 + |B|^2 + 2 cos |A| |B|: two changes of one size lose a fifth of their energy at a cosine of -0.2,
# and gain as much at 0.2. Unrelated LoRAs have cosines within 0.07 and overlaps of columns below 0.1 on toybox, and
# less than 0.02 on SD 1.x; two of the same pictures, by another seed and rank, have 0.2 to 0.3 and 0.2 to 0.5.
OPPOSED, ALIKE = -0.2, 0.2
CROWDED = 0.3  # overlap, of columns and of rows, from which two share a block whatever the sign
DROWNS = 3.0  # times as large
ONE = 0.95  # cosine from which two are one change
SLIGHT = 0.01  # of the product of the norms; a block that holds less is not spoken of


def advice(
    names: tuple[str, str],
    blocks: Sequence[Meeting],
    whole: Meeting,
    same: bool = False,
    unmeasured: int = 0,
    tokens: Sequence[str] = (),
) -> str:
    """One line.

    names: of the two; blocks: where they meet; same: whether they are one and the same file; unmeasured: how many of
    their changes could not be measured; tokens: those that both teach, with different vectors.
    """
    both = " and ".join(names)
    if same:
        return f"{both} are the same file: one of them at the sum of the weights does the same"
    parts = []
    if tokens:
        parts.append(f"{both} both teach {', '.join(tokens)}: only one of them can be loaded")
    silent = [name for name, size in zip(names, whole.norms, strict=True) if not size]
    if silent:
        parts.append(f"nothing to compare: {' and '.join(silent)} changes nothing that can be measured")
    else:
        parts += [_meeting(both, blocks, whole), _drowning(names, whole)]
    if unmeasured:
        parts.append(f"{unmeasured} of their changes could not be measured")
    return "; ".join(filter(None, parts))


def _meeting(both: str, blocks: Sequence[Meeting], whole: Meeting) -> str:
    if not any(block.norms[0] and block.norms[1] for block in blocks):
        return f"{both} change different blocks: nothing in the way of mixing them, but look at a ladder of weights"
    if (whole.cosine or 0) >= ONE:
        return f"{both} are nearly the same change (cosine {whole.cosine:.2f}): take one of them"
    spoken = [block for block in blocks if _product(block) >= SLIGHT * _product(whole)]
    against = [block for block in spoken if (block.cosine or 0) <= OPPOSED]
    if against:
        return (
            f"{both} change the same directions in {_named(against, blocks)} with opposite sign "
            f"(cosine {_cosine(against):.2f}): lower one there, or use switch or composite"
        )
    along = [block for block in spoken if (block.cosine or 0) >= ALIKE]
    if along:
        return (
            f"{both} push the same way in {_named(along, blocks)} (cosine {_cosine(along):.2f}), where their effects "
            "add up: lower both there"
        )
    crowded = [block for block in spoken if min(block.columns or 0, block.rows or 0) >= CROWDED]
    if crowded:
        return (
            f"{both} work on the same directions in {_named(crowded, blocks)}, neither together nor against each "
            "other: if a trait gets lost, lower one there, or use switch or composite"
        )
    return f"{both} hardly touch: nothing in the way of mixing them, but look at a ladder of weights"


def _drowning(names: tuple[str, str], whole: Meeting) -> str:
    sizes = whole.norms if None in whole.relative else whole.relative
    (small, _), (large, which) = sorted((size or 0.0, i) for i, size in enumerate(sizes))
    ratio = large / small if small else 1.0
    if ratio < DROWNS:
        return ""
    return (
        f"{names[which]} is {ratio:.3g} times as large as {names[1 - which]}: lower it, or take the equalised weights"
    )


def _product(block: Meeting) -> float:
    return block.norms[0] * block.norms[1]


def _cosine(blocks: Sequence[Meeting]) -> float:
    """Of several blocks together."""
    inner = sum((block.cosine or 0) * _product(block) for block in blocks)
    return inner / sqrt(sum(block.norms[0] ** 2 for block in blocks) * sum(block.norms[1] ** 2 for block in blocks))


def _named(chosen: Sequence[Meeting], blocks: Sequence[Meeting]) -> str:
    """ "IN04, OUT03 to OUT05": neighbours among the blocks that are changed, in one side of the UNet, as a range."""
    order = [block.name for block in blocks]
    runs: list[list[str]] = []
    for block in chosen:
        name, last = block.name, runs[-1][-1] if runs else ""
        side = name.rstrip("0123456789")
        together = last.rstrip("0123456789") == side and name in BLOCKS and order.index(name) == order.index(last) + 1
        if together:
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
