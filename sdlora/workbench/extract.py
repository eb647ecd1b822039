"""Extracting: what a tuned model learned beyond its base, as a LoRA, module after module."""

import json
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdlora.errors import SdloraError, nearest
from sdlora.formats.architectures import ENDS
from sdlora.formats.checkpoints import Checkpoint
from sdlora.formats.metadata import base_keys
from sdlora.formats.write import write
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import Delta, Full, LowRank
from sdlora.lowrank.laws.delta import matches, times
from sdlora.lowrank.truncation import Keep, Kept, decompose
from sdlora.workbench.abreast import abreast
from sdlora.workbench.output import Step, refuse_place

RECORD = "sdlora.extracted"


@dataclass(frozen=True)
class Recipe:
    """What to extract.

    keep: the ranks. clamp: see `decompose`. components: all that both models have, if not given. whole: biases and
    norms too, which have no low rank, as whole differences. dtype: of the factors.
    """

    keep: Keep
    clamp: float | None = None
    components: Sequence[str] | None = None
    whole: bool = False
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, eq=False)
class Extracted:
    """What became of an extraction.

    kept: of each module that the adapter changes by low rank. unchanged: modules that the models have in common.
    left: parameters that differ and were not taken: biases and norms without `whole`, embeddings, modules of another
    shape. absent: components that only one of the models has.
    """

    adapter: Adapter
    kept: Mapping[str, Kept]
    unchanged: tuple[str, ...]
    left: tuple[str, ...]
    absent: tuple[str, ...]


def extract_file(
    base: Checkpoint, tuned: Checkpoint, output: Path, recipe: Recipe, naming: str = "kohya", overwrite: bool = False
) -> Generator[Step, None, Extracted]:
    """`extract` into a file; SdloraError also where the output is in the way."""
    refuse_place(output, naming, overwrite)
    found = yield from extract(base, tuned, recipe)
    write(found.adapter, output, naming, recipe.dtype, overwrite)
    return found


def extract(base: Checkpoint, tuned: Checkpoint, recipe: Recipe) -> Generator[Step, None, Extracted]:
    """A LoRA of W_tuned - W_base in each Linear and Conv2d; yields after each.

    A few modules are held at a time, beside what was extracted; how much that is lies with the ranks and the dtype.
    Where the models are stored in two dtypes, a difference that rounding alone can make is none.

    SdloraError: models of two architectures, a component that is not there, values that are not finite, or nothing
    that differs.
    """
    chosen = _components(base, tuned, recipe.components)
    modules = _modules(base, tuned, chosen)
    deltas: dict[str, Delta] = {}
    kept: dict[str, Kept] = {}

    def work(path: str) -> tuple[LowRank, Kept] | None:
        change = _change(base, tuned, path)
        return None if change is None else decompose(change, recipe.keep, recipe.clamp, recipe.dtype)

    for done, (path, found) in enumerate(abreast(work, modules), 1):
        if found is not None:
            deltas[path], kept[path] = found
        yield Step(done, len(modules), path, kept.get(path))
    left = []
    for path, change in _other_changes(base, tuned, chosen, set(modules)):
        if recipe.whole and change is not None and ".embeddings." not in path:
            deltas[path] = Full(change.to(recipe.dtype))
        else:
            left.append(path)
    if not deltas:
        also = f"; what differs is in {left[0]} and has no low rank" if left else ""
        raise SdloraError(f"nothing to extract: {tuned.path} and {base.path} have the same modules{also}")
    told = {"base": base.path.name, "tuned": tuned.path.name, "clamp": recipe.clamp}
    metadata = base_keys(base.architecture.name) | {RECORD: json.dumps(told, ensure_ascii=False)}
    adapter = Adapter(deltas, metadata)
    unchanged = tuple(path for path in modules if path not in kept)
    absent = tuple(sorted({*base.components} ^ {*tuned.components}))
    return Extracted(adapter, kept, unchanged, tuple(left), absent)


def _components(base: Checkpoint, tuned: Checkpoint, asked: Sequence[str] | None) -> tuple[str, ...]:
    shared = tuple(component for component in base.components if component in tuned.components)
    for component in asked or ():
        if component not in shared:
            raise SdloraError(
                f"{base.path} and {tuned.path} have no {component!r} in common{nearest(component, shared)}; "
                f"they share {', '.join(shared) or 'nothing'}"
            )
    chosen = tuple(component for component in shared if asked is None or component in asked)
    if not chosen:
        raise SdloraError(f"{base.path} and {tuned.path} have no component in common; give two models of one kind")
    return chosen


def _modules(base: Checkpoint, tuned: Checkpoint, components: Sequence[str]) -> list[str]:
    """Paths of the modules to compare; SdloraError for models of two architectures.

    The convolutions at both ends may differ, as an inpainting model's do.
    """
    here, there = (
        {path: shape for path, shape in model.architecture.shapes.items() if path.partition(".")[0] in components}
        for model in (base, tuned)
    )
    shared = [path for path, shape in here.items() if path in there and matches(there[path], shape)]
    odd = [path for path in (here | there) if path not in shared and path not in ENDS]
    if odd:
        path = min(odd)
        shapes = (times(shapes[path]) if path in shapes else "not there" for shapes in (here, there))
        raise SdloraError(
            f"{base.path} ({base.architecture.label}) and {tuned.path} ({tuned.architecture.label}) are models of two "
            f"kinds: {len(odd)} modules differ, such as {path} ({' and '.join(shapes)}); give a model and its own base"
        )
    return shared


def _other_changes(
    base: Checkpoint, tuned: Checkpoint, components: Sequence[str], modules: Collection[str]
) -> Iterator[tuple[str, Tensor | None]]:
    """Everything else that differs, with the change; None where the models have it in two shapes, or one lacks it."""
    for path in dict.fromkeys((*base.parameters, *tuned.parameters)):
        if path.partition(".")[0] not in components or path in modules:
            continue
        if base.parameters.get(path) != tuned.parameters.get(path):
            yield path, None
        elif (change := _change(base, tuned, path)) is not None:
            yield path, change


def _change(base: Checkpoint, tuned: Checkpoint, path: str) -> Tensor | None:
    """W_tuned - W_base in float32, in the base's shape; None where nothing differs but the dtypes' rounding."""
    before, after = base.tensor(path), tuned.tensor(path)
    after = after.reshape(before.shape)
    one_dtype = before.dtype == after.dtype
    if one_dtype and torch.equal(before, after):
        return None
    change = after.float() - before.float()
    if not torch.isfinite(change).all():
        where = f"{base.path} or {tuned.path}"
        raise SdloraError(f"{path} holds values that are not finite in {where}; fetch the model again")
    return None if not one_dtype and _is_rounding(change, before, after) else change


def _is_rounding(change: Tensor, before: Tensor, after: Tensor) -> bool:
    """Whether both can be roundings of one number: half a unit in the last place of each dtype."""
    kinds = [torch.finfo(one.dtype) for one in (before, after)]
    relative, absolute = (
        sum(kind.eps for kind in kinds) / 2,
        sum(kind.smallest_normal * kind.eps for kind in kinds) / 2,
    )
    sizes = torch.maximum(before.float().abs(), after.float().abs())
    return bool((change.abs() <= relative * sizes + absolute).all())
