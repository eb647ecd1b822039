"""Blending files: several LoRAs with weights in, one out, which remembers its parents."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sdlora.errors import SdloraError
from sdlora.formats.checkpoints import Checkpoint
from sdlora.formats.metadata import trigger_words
from sdlora.formats.write import dtype_of, write
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.blend import blended, shared_embeddings
from sdlora.lowrank.laws import Delta
from sdlora.lowrank.truncation import Keep, Kept
from sdlora.workbench.bases import bases_of
from sdlora.workbench.output import Step, Written, refuse_place
from sdlora.workbench.parts import Opened, Part, open_parts

RECORD = "sdlora.blended"
# What a child says of itself where all its parents say the same.
INHERITED = (
    "ss_base_model_version",
    "ss_sd_model_name",
    "ss_sd_model_hash",
    "ss_v2",
    "ss_resolution",
    "modelspec.architecture",
    "modelspec.prediction_type",
    "modelspec.resolution",
)


@dataclass(frozen=True)
class Recipe:
    """How to blend; see `sdlora.lowrank.blend.blended`."""

    method: str = "sum"
    keep: Keep | None = None
    density: float = 0.5
    seed: int = 0


def blend_files(
    parts: Sequence[Part],
    output: Path,
    recipe: Recipe = Recipe(),  # noqa: B008
    base: Checkpoint | None = None,
    naming: str = "kohya",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    partial: bool = False,
) -> Generator[Step, None, Written]:
    """Blend files into one; yields after each parameter.

    base: the model, needed for laws that depend on its weights. dtype: None for the one that the parents share, or
    float32. partial: as for `read`. Parents' names, hashes and weights go into the metadata. All is read before
    anything is written, so the output may be one of the parents, given `overwrite`.
    SdloraError: the output is in the way, a file cannot be read, or they cannot be blended.
    """
    refuse_place(output, naming, overwrite)
    opened = open_parts(parts, base, partial)
    pairs = [(one.adapter, one.weights) for one in opened]
    total = len({path for one in opened for path, weight in one.weights.of(list(one.adapter.deltas)).items() if weight})
    deltas: dict[str, Delta] = {}
    kept: dict[str, Kept] = {}
    steps = blended(pairs, recipe.method, recipe.keep, recipe.density, recipe.seed, bases_of(base))
    for done, outcome in enumerate(steps, 1):
        deltas[outcome.path] = outcome.delta
        if outcome.kept is not None:
            kept[outcome.path] = outcome.kept
        yield Step(done, total, outcome.path, outcome.kept)
    if not deltas and all(one.adapter.deltas for one in opened):
        raise SdloraError(f"nothing to write to {output}: all weights are 0; give one LoRA another weight")
    dtypes = {dtype_of(one.adapter) for one in opened}
    shared = dtypes.pop() if len(dtypes) == 1 else torch.float32
    blend = Adapter(deltas, _metadata(opened, recipe), shared_embeddings(pairs))
    write(blend, output, naming, dtype or shared, overwrite)
    return Written(tuple(one.receipt for one in opened), kept)


def _metadata(opened: Sequence[Opened], recipe: Recipe) -> dict[str, str]:
    told = [one.adapter.metadata for one in opened]
    found = {name: told[0][name] for name in INHERITED if len({one.get(name) for one in told}) == 1 and name in told[0]}
    words = dict.fromkeys(word for one in told for word in trigger_words(one))
    if words:
        found["modelspec.trigger_phrase"] = ", ".join(words)
    parents = [
        {
            "name": one.part.path.name,
            "sha256": one.receipt.sha256,
            "autov3": one.receipt.autov3,
            "weights": one.part.told(),
        }
        for one in opened
    ]
    return found | {RECORD: json.dumps({**asdict(recipe), "parents": parents}, ensure_ascii=False)}
