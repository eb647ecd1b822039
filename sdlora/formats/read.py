"""Reading LoRA files of every kind: decided key by key, with a receipt, nothing dropped in silence.

`describe` looks at headers only and needs no torch; `read` makes the adapter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from sdlora.errors import SdloraError
from sdlora.formats.architectures import ENDS, Architecture, known, sd1, sd2
from sdlora.formats.foreign import foreign_kind
from sdlora.formats.hcp import MARK
from sdlora.formats.header import Header, Spec, read_header, read_tensors
from sdlora.formats.metadata import base_model, trigger_words
from sdlora.formats.numbers import checked, deltas_of_module
from sdlora.formats.ordered import is_ordered, ordered_names
from sdlora.formats.parts import split
from sdlora.formats.peft_config import PeftConfig, by_component
from sdlora.formats.plan import (
    TOKENS,
    Contents,
    Fit,
    Plan,
    Verdict,
    deltas_of,
    fit,
    plan,
    plan_of,
    verdict,
)
from sdlora.formats.receipt import Applied, Receipt
from sdlora.formats.sources import Source, sources_of
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import Delta, LowRank
from sdlora.lowrank.laws.delta import times

if TYPE_CHECKING:
    from torch import Tensor

ENOUGH = 0.95  # share of a file's modules that must fit a model
TEXT_ENCODER_WIDTH = "{}.text_model.final_layer_norm"


@dataclass(frozen=True)
class _Opened:
    """A LoRA whose headers are read. A key of a file about one component is led by it: "unet/..."."""

    path: Path
    sources: tuple[Source, ...]
    headers: tuple[Header, ...]
    plan: Plan
    metadata: Mapping[str, str]
    configs: Mapping[str, PeftConfig]  # by component; "" for all

    @property
    def found(self) -> Contents:
        return self.plan.found

    def config(self, path: str) -> PeftConfig | None:
        return self.configs.get(path.partition(".")[0], self.configs.get(""))


def describe(
    path: Path | str,
    header_of: Callable[[Path], Header] = read_header,
    plan: Callable[[Mapping[str, Spec]], Plan] = plan,
) -> Receipt:
    """What a LoRA is, from its header alone: no hashes, no alphas, and whether its numbers are finite is not known.

    header_of, plan: for whoever describes many files and remembers (see `library`).
    SdloraError: it cannot be read, is damaged, or is something else than a LoRA for a known architecture.
    """
    opened = _open(Path(path), header_of, plan)
    candidates = opened.plan.candidates
    best = candidates[0] if candidates[0].inner else None
    return _receipt(opened, best, opened.plan.applied if best else {}, _judged(opened))


def read(path: Path | str, architecture: Architecture | None = None, partial: bool = False) -> tuple[Adapter, Receipt]:
    """Read a LoRA as an adapter for a model of the architecture, with a receipt of what applies and what does not.

    path: a file, or a folder (see `sources_of`). architecture: None for the one that the file was made for.
    partial: take what fits of a file that is for another architecture, too.
    SdloraError: the file cannot be read, is cut short or damaged, is no LoRA, or is one for another architecture.
    """
    opened = _open(Path(path))
    judged = _judged(opened)
    if architecture is None:
        if not judged.names:
            raise SdloraError(f"{path} fits no known architecture ({_example(opened)}); give the model it was made for")
        architecture = next(one for one in known() if one.name == judged.names[0])
    chosen = fit(opened.found, architecture)
    _refuse_conflicts(opened, chosen)
    why = _misplaced(opened, chosen, judged, opened.plan.candidates)
    if why and not (partial and chosen.applied):
        raise SdloraError(f"{path} {why}")
    tensors, sha256, autov3 = _load(opened)
    deltas = _deltas(opened, chosen, tensors)
    embeddings, odd = _embeddings(opened, architecture, tensors)
    receipt = _receipt(opened, chosen, {}, judged)
    alphas = {parameter: _alpha(delta) for parameter, delta in deltas.items()}
    receipt = replace(
        receipt,
        sha256=sha256,
        autov3=autov3,
        content=_content(opened.sources, sha256),
        finite=True,
        applied={name: Applied(delta.name, delta.rank, alphas[name]) for name, delta in deltas.items()},
        misfit=(*receipt.misfit, *odd),
        notes=(*receipt.notes, *_notes(opened, chosen, deltas, why)),
    )
    return Adapter(deltas, opened.metadata, embeddings), receipt


def _judged(opened: _Opened) -> Verdict:
    return verdict(opened.plan, opened.metadata)


def _open(
    path: Path,
    header_of: Callable[[Path], Header] = read_header,
    plan: Callable[[Mapping[str, Spec]], Plan] = plan,
) -> _Opened:
    try:
        sources = sources_of(path)
    except OSError as error:  # a name that is too long, a folder that may not be listed
        raise SdloraError(f"LoRA {path} cannot be read ({error.strerror}); check the path") from error
    headers = tuple(header_of(source.path) for source in sources)
    tensors: Mapping[str, Spec] = {}
    for source, header in zip(sources, headers, strict=True):
        if not header.tensors:
            raise SdloraError(f"{source.path} is empty: it holds no tensors; fetch or train it again")
        own = {_told(key): spec for key, spec in header.tensors.items()} if source.config else header.tensors
        foreign = foreign_kind(own, header.metadata)
        if foreign:
            raise SdloraError(f"{source.path} is {foreign.what}; {foreign.advice}")
        # Where nothing is renamed, the very tensors of the header: `layouts` knows them again by that.
        alone = not (source.component or source.config)
        led = header.tensors if alone else {_led(source, key): spec for key, spec in header.tensors.items()}
        tensors = {**tensors, **led} if tensors else led
    metadata = headers[0].metadata
    configs = {source.component or "": source.config for source in sources if source.config}
    planned = plan_of(_ordered(path, tensors, metadata)) if is_ordered(tensors) else plan(tensors)
    found = planned.found
    if not (found.modules or found.tokens):
        reasons = [*(f"{stem} {why}" for stem, why in sorted(found.broken.items())), *found.other]
        what = f"{len(tensors)} keys such as {', '.join(reasons[:2])}"
        raise SdloraError(
            f"{path} holds nothing that can be applied as a LoRA: {what}; "
            "check that it is a LoRA for Stable Diffusion, and whole"
        )
    return _Opened(path, sources, headers, planned, metadata, configs or by_component(metadata, str(path)))


def _led(source: Source, key: str) -> str:
    """The key as we know it. Where files are about one component each, it is led by that; HCP-Diffusion's say it."""
    key = _told(key) if source.config else key
    return f"{source.component}/{key}" if source.component and MARK not in key else key


def _told(key: str) -> str:
    """A key of PEFT's; a plain name there is that of a parameter whole: of modules_to_save, or a trained bias."""
    plain = split(key)
    if plain and plain[1] in ("weight", "bias"):
        return f"{plain[0].removesuffix('.base_layer')}.set_{plain[1]}"
    return key


def _ordered(path: Path, tensors: Mapping[str, Spec], metadata: Mapping[str, str]) -> Contents:
    """The contents of an ordered list, whose pairs are named by their place in a model."""
    shapes = {key: spec.shape for key, spec in tensors.items()}
    problem: SdloraError | None = None
    for architecture in (sd1(), sd2()):
        try:
            placed = ordered_names(shapes, metadata, architecture.shapes)
        except SdloraError as error:
            problem = problem or error
            continue
        modules = {module: {"up": up, "down": down} for module, (up, down) in placed.pairs.items()}
        layouts = {
            module: tuple(sorted((part, shapes[key]) for part, key in keys.items())) for module, keys in modules.items()
        }
        broken = {module: why for module, layout in layouts.items() if isinstance(why := deltas_of(layout), str)}
        tokens = {token: {"text_encoder": key} for token, key in placed.tokens.items()}
        whole = {module: keys for module, keys in modules.items() if module not in broken}
        placed_keys = {key for keys in (*modules.values(), *tokens.values()) for key in keys.values()}
        return Contents(whole, layouts, broken, (), tokens, tuple(sorted(tensors.keys() - placed_keys)))
    raise SdloraError(f"{path}: {problem}") from problem


def _refuse_conflicts(opened: _Opened, chosen: Fit) -> None:
    twice = (*opened.found.twice, *chosen.twice)
    if twice:
        raise SdloraError(f"{opened.path} tells {len(twice)} modules twice, such as {twice[0]}; delete one of the two")
    laws = [f"{stem} {why}" for stem, why in opened.found.broken.items() if why.startswith("has parts of")]
    if laws:
        raise SdloraError(f"{opened.path}: {laws[0]}; delete the parts of one of the laws")


def _misplaced(opened: _Opened, chosen: Fit, judged: Verdict, candidates: list[Fit]) -> str | None:
    """Why a file is not for the model: more of it fits another architecture, or much of it does not fit this one."""
    modules = len(opened.found.modules)
    name = chosen.architecture.name
    if modules and chosen.complete and not opened.found.broken and (name in judged.names or name == "custom"):
        return None
    best = candidates[0]
    if best.inner > chosen.inner or (judged.names and name not in judged.names and best.inner == chosen.inner):
        label = best.architecture.label if best.architecture.name in judged.names else "another model"
        label = next((one.label for one in known() if one.name in judged.names), label)
        evidence = f"; {', '.join(judged.evidence)}" if judged.evidence else ""
        return (
            f"is a LoRA for {label} ({best.inner} of its {modules} modules fit that, "
            f"{chosen.inner} fit the model, which is {chosen.architecture.label}{evidence}); "
            "choose a model that it was trained on"
        )
    wrong = sorted(chosen.misfit.keys() - ENDS)
    if len(wrong) > (1 - ENOUGH) * (chosen.inner + len(wrong)):
        return (
            f"was trained on another model: {len(wrong)} of its {modules} modules have other shapes, "
            f"such as {chosen.misfit[wrong[0]]}; choose that model"
        )
    return _too_little(opened, chosen)


def _too_little(opened: _Opened, chosen: Fit) -> str | None:
    broken = [f"{stem} {why}" for stem, why in opened.found.broken.items()]
    total = len(opened.found.modules) + len(broken)
    left = total - len(chosen.applied)
    if chosen.applied:  # the ends of a model, where an inpainting model differs, may have other shapes
        left -= len(chosen.misfit)
    if total and not chosen.applied or left > (1 - ENOUGH) * total:
        examples = [*broken, *(f"{stem} is no module of the model" for stem in chosen.unknown)]
        examples += chosen.misfit.values()
        return f"can only be applied in part: {left} of its {total} modules cannot, such as {examples[0]}; " + (
            "save it again, or take what fits with --partial"
        )
    return None


def _example(opened: _Opened) -> str:
    stems = [*opened.found.modules, *opened.found.tokens]
    return f"its first module is {stems[0]}"


def _load(opened: _Opened) -> tuple[dict[str, Tensor], str, str]:
    """All tensors, and the hashes; those of a folder are the hashes of its files' hashes."""
    tensors: dict[str, Tensor] = {}
    hashes = []
    for source in opened.sources:
        held, digests = read_tensors(source.path)
        tensors |= {_led(source, key): tensor for key, tensor in held.items()}
        hashes.append(digests)
    if len(hashes) == 1:
        return tensors, hashes[0].sha256, hashes[0].autov3
    joined = ("".join(getattr(one, name) for one in hashes).encode() for name in ("sha256", "autov3"))
    whole, body = (hashlib.sha256(text).hexdigest() for text in joined)
    return tensors, whole, body


def _content(sources: tuple[Source, ...], weights: str) -> str:
    """weights: the hash of the weights. A PEFT folder's config and whose part is whose count too."""
    told = [(source.component, source.written) for source in sources]
    return weights if told == [(None, b"")] else hashlib.sha256(f"{weights} {told}".encode()).hexdigest()


def _deltas(opened: _Opened, chosen: Fit, tensors: Mapping[str, Tensor]) -> dict[str, Delta]:
    deltas = {}
    for path, stem in chosen.applied.items():
        try:
            for which, delta in deltas_of_module(
                path, opened.found.modules[stem], tensors, opened.config(path)
            ).items():
                deltas[path + which] = delta
        except SdloraError as error:
            where = "" if str(error).startswith(stem) else f"{stem}: "
            raise SdloraError(f"{opened.path}: {where}{error}") from error
    return deltas


def _embeddings(
    opened: _Opened, architecture: Architecture, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Learned tokens by text encoder, (n, width) each, and a line for each that does not fit."""
    found: dict[str, dict[str, Tensor]] = {}
    odd = []
    for token, keys in opened.found.tokens.items():
        for component, key in keys.items():
            width = architecture.norms.get(TEXT_ENCODER_WIDTH.format(component), (0,))[0]
            vectors = checked(key, tensors[key])
            if vectors.dim() in (1, 2) and vectors.numel() and vectors.shape[-1] == width:
                found.setdefault(token, {})[component] = vectors.reshape(-1, width)
            else:
                told = times(vectors.shape) or "a single number"
                odd.append(f"token {token} ({key} is {told}, the model's {component} takes {width})")
    return found, odd


def _receipt(opened: _Opened, chosen: Fit | None, applied: Mapping[str, Applied], judged: Verdict) -> Receipt:
    """The receipt as far as the header tells it."""
    found = opened.found
    stems, misfit = set(found.modules), tuple[str, ...]()
    if chosen:
        stems, misfit = set(chosen.unknown), tuple(chosen.misfit.values())
    return Receipt(
        path=opened.path,
        size=sum(header.size for header in opened.headers),
        made_for=judged.names,
        evidence=judged.evidence,
        applied=applied,
        unknown=tuple(sorted((*found.other, *(key for stem in stems for key in found.modules[stem].values())))),
        incomplete=tuple(f"{stem} {why}" for stem, why in sorted(found.broken.items())),
        misfit=misfit,
        tokens=tuple(sorted(found.tokens)),
        dtypes=tuple(sorted({spec.dtype for header in opened.headers for spec in header.tensors.values()})),
        trigger_words=trigger_words(opened.metadata),
        base_model=base_model(opened.metadata),
        notes=(
            *(f"{name} in the metadata is cut, it is too long" for header in opened.headers for name in header.cut),
            *(f"{key} replaces what the text encoder gives, which is not done here" for key in _outputs(found)),
        ),
        metadata=opened.metadata,
    )


def _outputs(found: Contents) -> list[str]:
    """OneTrainer's learned outputs of text encoders."""
    return [key for key in found.other if key.startswith(TOKENS) and key.endswith("_out")]


def _alpha(delta: Delta) -> float | None:
    """The alpha of the law at the heart of a change; of OFT the limit that files call so, if it has one."""
    for name in ("inner", "first"):
        if hasattr(delta, name):
            return _alpha(getattr(delta, name))
    return getattr(delta, "alpha", getattr(delta, "constraint", None) or None)


def _notes(opened: _Opened, chosen: Fit, deltas: Mapping[str, Delta], why: str | None) -> list[str]:
    """What is worth knowing of what applies."""
    lines = []
    if why:
        lines.append(f"in part as asked: {len(chosen.applied)} of {len(opened.found.modules)} modules, though it {why}")
    zero = [path for path, delta in deltas.items() if _alpha(delta) == 0]
    if zero:
        lines.append(
            f"alpha is 0 in {len(zero)} modules such as {zero[0]}: they have no effect; train or save it again"
        )
    unlimited = [path for path, delta in deltas.items() if getattr(delta, "constraint", 0) < 0]
    if unlimited:
        lines.append(f"the limit (alpha) of {len(unlimited)} rotations such as {unlimited[0]} is below 0 and not used")
    wide = [path for path, delta in deltas.items() if isinstance(delta, LowRank) and delta.rank > _most(delta.shape)]
    if len(wide) > len(deltas) / 2:
        lines.append(f"ranks are larger than {len(wide)} modules can use, such as {wide[0]}; resize it to save memory")
    return lines


def _most(shape: tuple[int, ...]) -> int:
    """The largest rank that a matrix of this shape, flattened behind out, can have."""
    return min(shape[0], prod(shape[1:]))
