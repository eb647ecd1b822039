"""Merging: a base model with LoRAs worked into its weights, written tensor after tensor, the base left as it is."""

import json
import shutil
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sdlora.errors import SdloraError, nearest
from sdlora.formats.checkpoint_names import Place
from sdlora.formats.checkpoints import Checkpoint
from sdlora.formats.header import DTYPES, PICKLES, Spec
from sdlora.formats.stream import replacing, write_stream
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import Delta
from sdlora.lowrank.laws.delta import times
from sdlora.lowrank.merged import Terms
from sdlora.lowrank.merged import merge as merge_into
from sdlora.workbench.output import Step, lasting

# Asked for by torch's dtype: as headers call it.
WRITTEN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
WEIGHT_FILES = (".safetensors", ".msgpack", ".h5", ".onnx", *PICKLES)
RECORD = "sdlora.merged"


@dataclass(frozen=True, eq=False)
class Parent:
    """An adapter to merge.

    weights: one for all its parameters, or each one's by its path (as `Weights.of` of sdlora.lowrank.blend gives them).
    name: the path of its file, or what else it goes by; its last part goes into the metadata of what is made, and so
    does sha256, of the file. content: a hash of all that counts of it, as a receipt's.
    """

    adapter: Adapter
    weights: float | Mapping[str, float] = 1.0
    name: str = "LoRA"
    sha256: str = ""
    content: str = ""

    def by_path(self) -> dict[str, float]:
        """The weight of each parameter; SdloraError where one is no finite number."""
        told = self.weights
        weights = {path: told[path] if isinstance(told, Mapping) else told for path in self.adapter.deltas}
        odd = next((weight for weight in weights.values() if not isfinite(weight)), None)
        if odd is not None:
            raise SdloraError(f"{self.name}: the weight {odd} is no finite number")
        return weights


@dataclass(frozen=True)
class Merged:
    """What became of a merge.

    changed: paths of the parameters that differ from the base's. not_merged: learned tokens, which a model's weights
    cannot take in. left_out: files of the base folder that hold its weights once more, unmerged, and were not copied.
    averaged: tensors of the copy of the UNet that some single files keep under model_ema, carried over unmerged.
    """

    output: Path
    changed: tuple[str, ...]
    not_merged: tuple[str, ...]
    left_out: tuple[str, ...]
    averaged: int


Touched = Mapping[tuple[Path, str], list[tuple[str, Terms]]]  # by file and key: paths of parameters and their changes


def merge(
    base: Checkpoint,
    parents: Sequence[Parent],
    output: Path | str,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Generator[Step, None, Merged]:
    """Write the base with W = W0 + sum(weight * delta(W0)) in each touched parameter; yields after each tensor.

    Computed in float32, in order of the parents' contents and names, as the mixer does, and rounded once: to the base's
    dtype, or to `dtype`, which then holds for the whole UNet and the text encoders. Everything else is carried over to
    the bit.
    A folder becomes a folder, a single file a single file; `overwrite` lets it replace a file that is there.

    SdloraError: a parent does not fit the base, a result is not finite, or the output is in the way or cannot be
    written. Then, and when the generator is closed early, nothing is left behind.
    """
    output = Path(output)
    _refuse_place(base, output, overwrite)
    if dtype is not None and dtype not in WRITTEN:
        raise SdloraError(f"models are written in {', '.join(str(one)[6:] for one in WRITTEN)}, not in {dtype}")
    touched = _touched(base, sorted(parents, key=lambda parent: (parent.content, parent.name)))
    files = [file for file in base.files if dtype is not None or any(file == changed for changed, _ in touched)]
    total = sum(len(base.files[file].tensors) for file in files)
    done = 0
    left_out: tuple[str, ...] = ()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as partial:
            if not base.single:
                left_out = _copy_rest(base, partial, files)
            for file in files:
                target = partial if base.single else partial / file.relative_to(base.path)
                for key in _rewrite(base, file, target, touched, parents, dtype):
                    done += 1
                    yield Step(done, total, key)
            if dtype is not None and not base.single:
                _correct_sizes(partial)
    except OSError as error:
        raise SdloraError(f"{output} cannot be written ({error.strerror or error}); name another place") from error
    changed = tuple(path for parameters in touched.values() for path, _ in parameters)
    tokens = tuple(dict.fromkeys(token for parent in parents for token in parent.adapter.embeddings))
    averaged = sum(key.startswith("model_ema.") for header in base.files.values() for key in header.tensors)
    return Merged(output, changed, tokens, left_out, averaged)


def _refuse_place(base: Checkpoint, output: Path, overwrite: bool) -> None:
    here, there = base.path.resolve(), output.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise SdloraError(f"{output} is where the base model lies, which is never changed; name another place")
    if base.single:
        if output.suffix.lower() != ".safetensors":
            raise SdloraError(f"{output}: the base is a single file, and so is what is made of it; name a .safetensors")
        if output.is_dir() or (output.exists() and not overwrite):
            raise SdloraError(f"{output} is there already; name another file, or ask for it to be overwritten")
    else:
        if output.suffix.lower() == ".safetensors":
            raise SdloraError(f"{output}: the base is a folder, and so is what is made of it; name a folder")
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise SdloraError(f"{output} is there already and not empty; name another folder")


def _touched(base: Checkpoint, parents: Sequence[Parent]) -> Touched:
    """What changes each tensor of the base's files; SdloraError where a parent does not belong to the base."""
    terms: dict[str, list[tuple[Delta, float]]] = defaultdict(list)
    for parent in parents:
        weights = parent.by_path()
        deltas = {path: delta for path, delta in parent.adapter.deltas.items() if weights[path]}
        _refuse_absent(base, parent.name, deltas)
        _refuse_misfits(base, parent.name, deltas)
        for path, delta in deltas.items():
            terms[path].append((delta, weights[path]))
    if not terms:
        raise SdloraError("nothing to merge: no LoRA changes anything at these weights")
    touched: dict[tuple[Path, str], list[tuple[str, Terms]]] = defaultdict(list)
    for path, changes in terms.items():
        place = base.places[path]
        touched[place.file, place.key].append((path, tuple(changes)))
    return touched


def _refuse_absent(base: Checkpoint, name: str, deltas: Mapping[str, Delta]) -> None:
    absent = [path for path in deltas if path not in base.parameters]
    biases = [path for path in absent if path.removesuffix(".bias") in base.parameters]
    if biases:
        raise SdloraError(
            f"{name} adds a bias to {len(biases)} modules that have none in {base.path}, such as "
            f"{biases[0].removesuffix('.bias')}, and its files cannot hold one there; give them the weight 0, or mix "
            "the LoRA in when you generate"
        )
    if absent:
        raise SdloraError(
            f"{base.path} lacks {len(absent)} of what {name} changes, such as {absent[0]}"
            f"{nearest(absent[0], base.parameters)}; merge it into the model that it was trained on"
        )


def _refuse_misfits(base: Checkpoint, name: str, deltas: Mapping[str, Delta]) -> None:
    misfits = [path for path, delta in deltas.items() if not delta.fits(base.parameters[path])]
    if misfits:
        path = misfits[0]
        raise SdloraError(
            f"{name} does not fit {base.path} in {len(misfits)} places, such as {path} ({times(deltas[path].shape)}, "
            f"the model's is {times(base.parameters[path])}); merge it into the model that it was trained on"
        )


def _rewrite(
    base: Checkpoint,
    file: Path,
    target: Path,
    touched: Touched,
    parents: Sequence[Parent],
    dtype: torch.dtype | None,
) -> Generator[str, None, None]:
    """Write one file of the base anew; yields the keys."""
    places = {path: place for path, place in base.places.items() if place.file == file}
    ours = {place.key for place in places.values()}
    specs = base.files[file].tensors

    def spec_of(key: str) -> Spec:
        spec = specs[key]
        return spec if dtype is None or key not in ours else Spec(spec.shape, WRITTEN[dtype])

    def tensor_of(key: str) -> Tensor:
        whole = base.whole(file, key)
        wanted = getattr(torch, DTYPES[spec_of(key).dtype])
        changes = [(path, places[path], terms) for path, terms in touched.get((file, key), ())]
        if not changes and whole.dtype == wanted:
            return whole
        return _rounded(_changed(whole, changes), wanted, f"{key} of {file}")

    yield from write_stream(target, {key: spec_of(key) for key in specs}, _metadata(file, parents), tensor_of)


def _changed(whole: Tensor, changes: Sequence[tuple[str, Place, Terms]]) -> Tensor:
    """A tensor of the file in float32, with the changes to the parameters that lie in it."""
    total = whole.float().clone()
    for path, place, terms in changes:
        try:
            merge_into(place.view(whole), terms, place.view(total))
        except SdloraError as error:
            raise SdloraError(f"{path}: {error}") from error
    return total


def _rounded(exact: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    rounded = exact.to(dtype)
    if not torch.isfinite(rounded.float()).all():
        raise SdloraError(
            f"{where} would not be finite in {str(dtype)[6:]}; use smaller weights, or ask for float32 or bfloat16"
        )
    return rounded


def _metadata(file: Path, parents: Sequence[Parent]) -> dict[str, str]:
    """What the file's metadata said, less what is no longer true, and what went into the merge."""
    with safe_open(file, framework="pt") as opened:
        told = lasting(opened.metadata() or {})
    try:
        earlier = list(json.loads(told.get(RECORD, "[]")))
    except (ValueError, TypeError, RecursionError):
        earlier = []
    record = [{"name": Path(one.name).name, "sha256": one.sha256, "weights": _told(one)} for one in parents]
    return {"format": "pt", **told, RECORD: json.dumps([*earlier, *record], ensure_ascii=False)}


def _told(parent: Parent) -> dict[str, float]:
    """By component; or by parameter, in a component of which the parameters have several weights."""
    by_component: dict[str, dict[str, float]] = defaultdict(dict)
    for path, weight in parent.by_path().items():
        by_component[path.partition(".")[0]][path] = weight
    told: dict[str, float] = {}
    for component, inner in by_component.items():
        values = set(inner.values())
        told |= {component: values.pop()} if len(values) == 1 else inner
    return told


def _copy_rest(base: Checkpoint, target: Path, rewritten: Sequence[Path]) -> tuple[str, ...]:
    """Copy the base's folder without the files that are written anew; returns what else was left out: see Merged."""
    folders = {base.path, *(file.parent for file in rewritten)}
    left_out = [
        file
        for folder in folders
        for file in sorted(folder.iterdir())
        if file.suffix in WEIGHT_FILES and file not in base.files and file.is_file()
    ]
    names: dict[str, set[str]] = defaultdict(set)
    for file in (*rewritten, *left_out):
        names[str(file.parent)].add(file.name)
    shutil.copytree(base.path, target, ignore=lambda folder, _: names[folder])
    return tuple(str(file.relative_to(base.path)) for file in left_out)


def _correct_sizes(folder: Path) -> None:
    """The indices of shards tell their size together; another dtype changes it."""
    for index in folder.glob("*/*.safetensors.index*.json"):
        told = json.loads(index.read_text("utf-8"))
        shards = {index.parent / name for name in told["weight_map"].values()}
        if isinstance(told.get("metadata"), dict) and "total_size" in told["metadata"]:
            told["metadata"]["total_size"] = sum(_content(shard) for shard in shards)
            index.write_text(json.dumps(told, indent=2), "utf-8")


def _content(file: Path) -> int:
    """Bytes of the tensors alone."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")
