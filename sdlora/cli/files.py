"""The verbs over LoRA files: inspect, convert, blend, resize, extract and merge."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from sdlora.cli.flags import Whole, flag
from sdlora.errors import SdloraError, nearest

if TYPE_CHECKING:
    import torch

    from sdlora.formats.checkpoints import Checkpoint
    from sdlora.formats.receipt import Receipt
    from sdlora.lowrank.truncation import Keep
    from sdlora.workbench.output import Written

Loras = Annotated[str, Parameter(help="FILE, FILE:WEIGHT or FILE:UNET:TEXT_ENCODER; files or PEFT folders")]
Lora = Annotated[Path, Parameter(help="LoRA file or PEFT folder")]
Model = Annotated[str, Parameter(help="the tuned model, a folder or a file")]
Output = Annotated[Path | None, Parameter(alias="-o")]
BASE = "model that the LoRA was trained on, needed where a law depends on its weights: toybox, a folder or a file"
NAMING = "kohya, diffusers, comfyui, or peft, which is a folder"
DTYPE = "float32, float16 or bfloat16 [default: that of the source]"
OVERWRITE = "replace what is there"
PARTIAL = "take what fits of files that are for another model or not whole, too"
OUTPUT = "what to write"
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class InspectFlags:
    """What `sdlora inspect` is told."""

    json: bool = flag(False, "print one JSON array with all that is known")
    header: bool = flag(False, "look at headers only: no hashes, alphas and norms, but in milliseconds")
    base: str | None = flag(None, BASE)
    partial: bool = flag(False, PARTIAL)


def inspect(*files: Lora, flags: Annotated[InspectFlags, Parameter(name="*")] = InspectFlags()) -> None:  # noqa: B008
    """Tell what LoRA files are, what they hold and how much they change."""
    from sdlora.cli.show import escaped, receipt_lines
    from sdlora.workbench import inspect as workbench

    if not files:
        raise SdloraError("no LoRA is given; name at least one file")
    base = model_of(flags.base)
    told: list[dict[str, Any]] = []
    refused = False
    for file in files:
        try:
            found = workbench.inspect(file, base, flags.partial, flags.header)
        except SdloraError as error:
            refused = True
            told.append({"path": str(file), "error": str(error)})
            print("sdlora:", escaped(" ".join(str(error).split())), file=sys.stderr)
            continue
        if flags.json:
            told.append(found.as_dict())
        else:
            print(*receipt_lines(found), sep="\n")
    if flags.json:
        print(json.dumps(told, indent=1))
    if refused:
        sys.exit(2)


@dataclass(frozen=True)
class ConvertFlags:
    """What `sdlora convert` is told."""

    output: Output = flag(None, OUTPUT)
    naming: str = flag("kohya", NAMING)
    dtype: str | None = flag(None, DTYPE)
    to_lora: bool = flag(False, "make plain LoRA of other laws, and print what that loses")
    rank: Whole | None = flag(None, "with --to-lora: at most so many ranks [default: all that are not noise]")
    base: str | None = flag(None, BASE)
    partial: bool = flag(False, PARTIAL)
    overwrite: bool = flag(False, OVERWRITE)


def convert(file: Lora, *, flags: Annotated[ConvertFlags, Parameter(name="*")] = ConvertFlags()) -> None:  # noqa: B008
    """Write a LoRA in the names of another program, in another dtype, or as plain LoRA."""
    output = _output(flags.output)
    if flags.rank is not None and not flags.to_lora:
        raise SdloraError("--rank is for --to-lora; give both, or use `sdlora resize`")
    from sdlora.lowrank.truncation import Keep
    from sdlora.workbench import convert as workbench

    dtype, keep = _dtype(flags.dtype), Keep(rank=flags.rank) if flags.to_lora else None
    work = workbench.convert(
        file, output, flags.naming, dtype, keep, model_of(flags.base), flags.overwrite, flags.partial
    )
    _done(output, driven(work))


@dataclass(frozen=True)
class BlendFlags:
    """What `sdlora blend` is told."""

    output: Output = flag(None, OUTPUT)
    method: str = flag("sum", "sum, orthogonal, ties, dare or dare_ties")
    block: list[str] | None = flag(None, "FILE=PATTERN:FACTOR, such as A=unet.down_blocks.*:0.5; repeat it for several")
    rank: Whole | None = flag(None, "at most so many ranks [default: exact, ranks add]")
    density: float = flag(0.5, "share of values that ties and dare keep")
    seed: Whole = flag(0, "of the draws of dare")
    naming: str = flag("kohya", NAMING)
    dtype: str | None = flag(None, DTYPE)
    base: str | None = flag(None, BASE)
    partial: bool = flag(False, PARTIAL)
    overwrite: bool = flag(False, OVERWRITE)


def blend(*loras: Loras, flags: Annotated[BlendFlags, Parameter(name="*")] = BlendFlags()) -> None:  # noqa: B008
    """Make one LoRA of several."""
    output = _output(flags.output)
    if not loras:
        raise SdloraError("no LoRA is given; name files with weights, such as A.safetensors:0.8 B.safetensors:0.5")
    from sdlora.workbench.blend import Recipe, blend_files
    from sdlora.workbench.parts import parse_part, with_blocks

    parts = with_blocks([parse_part(text) for text in loras], flags.block or ())
    recipe = Recipe(flags.method, _keep(rank=flags.rank), flags.density, flags.seed)
    work = blend_files(
        parts, output, recipe, model_of(flags.base), flags.naming, _dtype(flags.dtype), flags.overwrite, flags.partial
    )
    _done(output, driven(work))


@dataclass(frozen=True)
class ResizeFlags:
    """What `sdlora resize` is told."""

    output: Output = flag(None, OUTPUT)
    rank: Whole | None = flag(None, "so many ranks; beside one of the next three, at most so many")
    ratio: float | None = flag(None, "keep singular values above the largest / ratio")
    frobenius: float | None = flag(None, "keep this share of the Frobenius norm, such as 0.95")
    cumulative: float | None = flag(None, "keep this share of the sum of singular values, such as 0.9")
    naming: str = flag("kohya", NAMING)
    dtype: str | None = flag(None, DTYPE)
    base: str | None = flag(None, BASE)
    partial: bool = flag(False, PARTIAL)
    overwrite: bool = flag(False, OVERWRITE)


def resize(file: Lora, *, flags: Annotated[ResizeFlags, Parameter(name="*")] = ResizeFlags()) -> None:  # noqa: B008
    """Reduce the ranks of a LoRA."""
    output = _output(flags.output)
    from sdlora.workbench.resize import resize_file

    keep = _keep(flags.rank, flags.ratio, flags.frobenius, flags.cumulative)
    if keep is None:
        raise SdloraError("nothing says what to keep; give --rank, --ratio, --frobenius or --cumulative")
    work = resize_file(
        file, output, keep, model_of(flags.base), flags.naming, _dtype(flags.dtype), flags.overwrite, flags.partial
    )
    _done(output, driven(work))


@dataclass(frozen=True)
class ExtractFlags:
    """What `sdlora extract` is told."""

    base: str | None = flag(None, "model that the other was tuned from: toybox, a folder or a file")
    output: Output = flag(None, OUTPUT)
    rank: Whole = flag(64, "at most so many ranks")
    ratio: float | None = flag(None, "keep singular values above the largest / ratio")
    frobenius: float | None = flag(None, "keep this share of the Frobenius norm, such as 0.95")
    cumulative: float | None = flag(None, "keep this share of the sum of singular values, such as 0.9")
    clamp: float | None = flag(None, "cut values of the factors beyond this quantile, such as 0.99")
    component: list[str] | None = flag(None, "unet, text_encoder or text_encoder_2; repeat it [default: all]")
    whole: bool = flag(False, "take biases and norms too, as whole differences")
    naming: str = flag("kohya", NAMING)
    dtype: str = flag("float32", "float32, float16 or bfloat16")
    overwrite: bool = flag(False, OVERWRITE)


def extract(tuned: Model, *, flags: Annotated[ExtractFlags, Parameter(name="*")] = ExtractFlags()) -> None:  # noqa: B008
    """Make a LoRA of what a tuned model learned beyond its base."""
    output = _output(flags.output)
    if flags.base is None:
        raise SdloraError("no base is given; name the model that the other was tuned from with --base")
    from sdlora.workbench.extract import Recipe, extract_file
    from sdlora.workbench.output import Written

    keep, dtype = _keep(flags.rank, flags.ratio, flags.frobenius, flags.cumulative), _dtype(flags.dtype)
    base, other = model_of(flags.base), model_of(tuned)
    assert base and other and keep and dtype
    recipe = Recipe(keep, flags.clamp, flags.component, flags.whole, dtype)
    found = driven(extract_file(base, other, output, recipe, flags.naming, flags.overwrite))
    _done(output, Written((), found.kept))
    for what, names in (("differ and were not taken", found.left), ("are in one model only", found.absent)):
        if names:
            _tell(f"{len(names)} {what}, such as {names[0]}")


@dataclass(frozen=True)
class MergeFlags:
    """What `sdlora merge` is told."""

    base: str | None = flag(None, "model to merge into, which is left as it is: toybox, a folder or a file")
    output: Output = flag(None, "the merged model: a folder if the base is one, else a file")
    block: list[str] | None = flag(None, "FILE=PATTERN:FACTOR, such as A=unet.down_blocks.*:0.5; repeat it for several")
    dtype: str | None = flag(None, "float32, float16 or bfloat16 [default: that of the base]")
    partial: bool = flag(False, PARTIAL)
    overwrite: bool = flag(False, "replace a file that is there")


def merge(*loras: Loras, flags: Annotated[MergeFlags, Parameter(name="*")] = MergeFlags()) -> None:  # noqa: B008
    """Work LoRAs into a base model for good."""
    output = _output(flags.output)
    if not loras:
        raise SdloraError("no LoRA is given; name files with weights, such as A.safetensors:0.8 B.safetensors:0.5")
    base = model_of(flags.base)
    if base is None:
        raise SdloraError("no base is given; name the model to merge into with --base")
    from sdlora.workbench import merge as workbench
    from sdlora.workbench.parts import open_parts, parse_part, with_blocks

    parts = with_blocks([parse_part(text) for text in loras], flags.block or ())
    opened = open_parts(parts, base, flags.partial)
    parents = [
        workbench.Parent(
            one.adapter,
            one.weights.of(list(one.adapter.deltas)),
            str(one.part.path),
            one.receipt.sha256,
            one.receipt.content,
        )
        for one in opened
    ]
    done = driven(workbench.merge(base, parents, output, _dtype(flags.dtype), flags.overwrite))
    tell_receipts(one.receipt for one in opened)
    print(f"{output}: {len(done.changed)} parameters changed")
    notes = (
        ("learned tokens cannot be merged", done.not_merged),
        ("files of the base were not copied", done.left_out),
        ("averaged weights were carried over unmerged", ("model_ema",) * bool(done.averaged)),
    )
    for what, names in notes:
        if names:
            _tell(f"{what}: {', '.join(names)}")


def _output(path: Path | None) -> Path:
    if path is None:
        raise SdloraError("no output is given; say with -o what to write")
    return path


def model_of(name: str | None) -> Checkpoint | None:
    """The base model that a flag names."""
    if name is None:
        return None
    from sdlora import toybox
    from sdlora.formats.checkpoints import open_checkpoint

    return open_checkpoint(toybox.path() if name == "toybox" else Path(name))


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    if name not in DTYPES:
        raise SdloraError(f"dtype {name!r} is unknown{nearest(name, DTYPES)}; choose one of {', '.join(DTYPES)}")
    import torch

    return getattr(torch, name)


def _keep(
    rank: int | None, ratio: float | None = None, frobenius: float | None = None, cumulative: float | None = None
) -> Keep | None:
    from sdlora.lowrank.truncation import Keep

    return None if (rank, ratio, frobenius, cumulative) == (None,) * 4 else Keep(rank, ratio, frobenius, cumulative)


def driven(work: Generator[Any, None, Any]) -> Any:
    """What the work comes to, with a bar while it goes on."""
    from tqdm import tqdm

    with tqdm(leave=False, disable=None) as bar:
        while True:
            try:
                step = next(work)
            except StopIteration as end:
                return end.value
            bar.total = step.total
            bar.update(step.done - bar.n)


def _done(output: Path, written: Written) -> None:
    from sdlora.cli.show import kept_lines

    tell_receipts(written.receipts)
    for line in kept_lines(written.kept):
        print(line)
    print(output)


def tell_receipts(receipts: Iterable[Receipt]) -> None:
    """What of the files read did not apply, by name, and what else is worth knowing."""
    for receipt in receipts:
        if receipt.notes or not receipt.complete:
            _tell(receipt.summary())


def _tell(note: str) -> None:
    from sdlora.cli.show import escaped

    print("note:", escaped(note), file=sys.stderr)
