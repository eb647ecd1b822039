"""The verb that compares LoRA files before they are mixed: conflicts."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sdlora.cli.files import OVERWRITE, PARTIAL, Lora, driven, model_of, tell_receipts
from sdlora.cli.flags import flag
from sdlora.errors import SdloraError

if TYPE_CHECKING:
    from sdlora.workbench.conflicts import Conflicts, Pair, Sized


@dataclass(frozen=True)
class ConflictsFlags:
    """What `sdlora conflicts` is told."""

    base: str | None = flag(
        None, "model to tell sizes against, and for laws that depend on it: toybox, a folder or a file"
    )
    json: bool = flag(False, "print one JSON object with all that is known")
    picture: Path | None = flag(None, "heat map to write, a .png file")
    partial: bool = flag(False, PARTIAL)
    overwrite: bool = flag(False, OVERWRITE)


def conflicts(*files: Lora, flags: Annotated[ConflictsFlags, Parameter(name="*")] = ConflictsFlags()) -> None:  # noqa: B008
    """Tell before LoRAs are mixed where they get in each other's way, and the weights at which they are of one size."""
    if len(files) < 2:
        raise SdloraError("conflicts are between LoRAs; name two files or more")
    from sdlora.cli.show import escaped
    from sdlora.workbench.base_norms import default_cache
    from sdlora.workbench.conflicts import comparing
    from sdlora.workbench.heat_map import refuse_picture, save_heat_map

    if flags.picture:
        refuse_picture(flags.picture, flags.overwrite)
    found: Conflicts = driven(comparing(files, model_of(flags.base), flags.partial, default_cache()))
    if flags.json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        tell_receipts(one.receipt for one in found.adapters)
        print(*lines(found), sep="\n")
    if flags.picture:
        save_heat_map(found, flags.picture, flags.overwrite)
        if not flags.json:
            print(escaped(str(flags.picture)))


def lines(found: Conflicts) -> Iterator[str]:
    """The comparison as text, for people."""
    from sdlora.cli.show import escaped
    from sdlora.workbench.conflicts import letter

    widest = max(len(escaped(one.label)) for one in found.adapters)
    for which, one in enumerate(found.adapters):
        yield f"{letter(which)}  {escaped(one.label):<{widest}}  {_size(one)}"
        for why, count in Counter(one.unmeasured.values()).items():
            yield f"   not measured: {count} changes: {escaped(why)}"
    for pair in found.pairs:
        yield from ("", *_table(pair, found.base is not None))
        if pair.closest:
            columns, rows = pair.closest.columns[0], pair.closest.rows[0]
            yield f"closest in {pair.closest.parameter}: columns at {columns:.0f} degrees, rows at {rows:.0f}"
        yield escaped(pair.advice)
    yield ""
    if found.equalised is None:
        yield f"no equalised weights: {escaped(found.why_not)}"
    else:
        weighed = zip(found.adapters, found.equalised, strict=True)
        yield "of one size at: " + escaped(
            " ".join(f"{shlex.quote(str(one.path))}:{weight:.3g}" for one, weight in weighed)
        )


def _size(one: Sized) -> str:
    return f"|dW| {one.norm:.4g}" + ("" if one.relative is None else f", {one.relative:.3g} of |W|")


def _table(pair: Pair, relative: bool) -> Iterator[str]:
    from sdlora.workbench.conflicts import titles

    table = [("block", *titles(pair, relative))]
    table += [(one.name, *(text or "-" for text in one.texts(relative))) for one in (*pair.blocks, pair.whole)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *numbers in table:
        yield "  ".join(
            [f"{name:<{widths[0]}}", *(f"{one:>{width}}" for one, width in zip(numbers, widths[1:], strict=True))]
        )
