"""What a file tells of which module, and how that fits a model: decided key by key, from names and shapes alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from sdlora.errors import SdloraError
from sdlora.formats.architectures import ENDS, Architecture, known
from sdlora.formats.header import Spec
from sdlora.formats.names import readable
from sdlora.formats.parts import build, lacking, split
from sdlora.formats.receipt import Applied
from sdlora.lowrank.laws import Delta
from sdlora.lowrank.laws.delta import Shape, times

Keys = Mapping[str, str]  # of one module: part -> key in the file
Layout = tuple[tuple[str, Shape], ...]  # the shapes of a module's parts

TOKENS = "bundle_emb."
ENCODERS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "string_to_param.*": "text_encoder",
    "emb_params": "text_encoder",
}
# By a part of an (IA)^3 vector, the one that tells its side.
SIDES = {"on_input": "on_input", "ia3_l": "by_input"}
# Widths of the conditioning that attn2 looks at.
SEEN = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL", 1280: "the SDXL refiner"}


@dataclass(frozen=True)
class Contents:
    """A file's keys in order.

    modules: by the file's own name, the parts that make a delta; broken: a line for each module whose parts make none;
    twice: parts that are told twice, by both keys; tokens: learned tokens, component ▶ key; other: keys of no module.
    """

    modules: Mapping[str, Keys]
    layouts: Mapping[str, Layout]
    broken: Mapping[str, str]
    twice: tuple[str, ...]
    tokens: Mapping[str, Keys]
    other: tuple[str, ...]


@dataclass(frozen=True)
class Fit:
    """How a file's modules fit an architecture.

    applied: their names in the file by path; unknown: names that stand for no module of it; misfit: a line by path;
    twice: pairs of names that mean one module.
    """

    architecture: Architecture
    applied: Mapping[str, str]
    unknown: tuple[str, ...]
    misfit: Mapping[str, str]
    twice: tuple[str, ...]

    @property
    def inner(self) -> int:
        """How many modules apply of those that tell architectures apart."""
        return len(self.applied.keys() - ENDS)

    @property
    def complete(self) -> bool:
        return not (self.unknown or self.misfit)


@dataclass(frozen=True)
class Plan:
    """What names and shapes tell of a file.

    candidates: as `fits` has them; applied, evidence: what the best of them changes, and what tells it from others.
    """

    found: Contents
    candidates: list[Fit]
    applied: Mapping[str, Applied]
    evidence: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """The architectures that a file was made for, mostly one, by their names, and what tells it. None: not known."""

    names: tuple[str, ...]
    evidence: tuple[str, ...]


def plan(tensors: Mapping[str, Spec]) -> Plan:
    """Sort a file's keys and hold them against the known architectures."""
    return plan_of(contents(tensors))


def plan_of(found: Contents) -> Plan:
    """Hold contents against the known architectures."""
    candidates = fits(found)
    best = candidates[0]
    return Plan(found, candidates, applied_of(found, best), tuple(_evidence(found, best)) if best.inner else ())


def contents(tensors: Mapping[str, Spec]) -> Contents:
    """Sort a file's keys by module and part."""
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    tokens: dict[str, dict[str, str]] = defaultdict(dict)
    twice, other = [], []
    for key in tensors:
        found = split(key)
        token = _token(key) if key.startswith(TOKENS) else None
        if token:
            tokens[token[0]][token[1]] = key
        elif found is None:
            other.append(key)
        elif found[1] in modules[found[0]]:
            twice.append(f"{modules[found[0]][found[1]]} and {key}")
        else:
            modules[found[0]][found[1]] = key
    for stem in [stem for stem, keys in modules.items() if keys.keys() <= {"weight", "bias"}]:
        other += modules.pop(stem).values()  # a weight of something that is no LoRA
    _claim(other, modules)
    layouts = {
        stem: tuple(sorted([(part, tensors[key].shape) for part, key in keys.items()]))
        for stem, keys in modules.items()
    }
    broken = {stem: why for stem, layout in layouts.items() if isinstance(why := deltas_of(layout), str)}
    whole = {stem: keys for stem, keys in modules.items() if stem not in broken}
    return Contents(whole, layouts, broken, tuple(twice), tokens, tuple(sorted(other)))


def _token(key: str) -> tuple[str, str] | None:
    """(token, text encoder) of a bundled textual inversion."""
    for ending, component in ENCODERS.items():
        if key.endswith(f".{ending}"):
            return key[len(TOKENS) : -len(ending) - 1], component
    return None


def _claim(other: list[str], modules: dict[str, dict[str, str]]) -> None:
    """Give keys of unknown meaning to the module they belong to: it is another change with them than without."""
    for key in tuple(other):
        parts = key.split(".")
        stem = next((stem for n in range(len(parts) - 1, 0, -1) if (stem := ".".join(parts[:n])) in modules), None)
        if stem is not None:
            modules[stem][key[len(stem) + 1 :]] = key
            other.remove(key)


@lru_cache(maxsize=2**15)
def deltas_of(layout: Layout) -> tuple[Mapping[str, Delta], ...] | str:
    """The deltas that parts of these shapes make, or in words why they make none.

    Mostly one; of an (IA)^3 vector the header does not tell whether it scales inputs or outputs, so there are two.
    """
    parts: dict[str, object] = {part: Spec(shape, "") for part, shape in layout}
    wrong = lacking(parts)
    if wrong:
        return wrong
    side = next((name for mark, name in SIDES.items() if mark in parts), None)
    readings = [parts | {side: value} for value in (0, 1)] if side else [parts]
    try:
        return tuple(build(reading, None) for reading in readings)
    except SdloraError as error:
        return str(error)


@lru_cache(maxsize=2**16)
def _fits(layout: Layout, weight: Shape) -> bool:
    readings = deltas_of(layout)
    assert not isinstance(readings, str)
    shapes = {"": weight, ".bias": weight[:1]}
    return any(all(delta.fits(shapes[which]) for which, delta in deltas.items()) for deltas in readings)


@lru_cache(maxsize=16)
def names_of(architecture: Architecture) -> Mapping[str, tuple[str, ...]]:
    """What files may call the architecture's modules."""
    return readable((*architecture.shapes, *architecture.norms))


@lru_cache(maxsize=16)
def _places(architecture: Architecture) -> Mapping[str, tuple[tuple[str, Shape], ...]]:
    """The paths that a name can stand for, with the shapes of their weights."""
    return {
        name: tuple((path, _weight(architecture, path)) for path in paths)
        for name, paths in names_of(architecture).items()
    }


def _path(places: Mapping[str, tuple[tuple[str, Shape], ...]], stem: str, layout: Layout) -> str | None:
    """The path of the module that the name means and the layout fits."""
    for path, weight in places.get(stem, ()):
        if _fits(layout, weight):
            return path
    return None


def fit(found: Contents, architecture: Architecture) -> Fit:
    """Hold the contents against an architecture."""
    applied: dict[str, str] = {}
    unknown, twice = [], []
    misfit: dict[str, str] = {}
    places = _places(architecture)
    for stem in found.modules:
        layout = found.layouts[stem]
        path = _path(places, stem, layout)
        if path is None and stem in places:
            path, weight = places[stem][0]
            misfit[path] = f"{stem} ({_shape(layout, weight)}, the model's is {times(weight)})"
        elif path is None:
            unknown.append(stem)
        elif path in applied:
            twice.append(f"{applied[path]} and {stem}")
        else:
            applied[path] = stem
    return Fit(architecture, applied, tuple(unknown), misfit, tuple(twice))


def _weight(architecture: Architecture, path: str) -> Shape:
    shape = architecture.shape_of(path)
    assert shape is not None
    return shape


def _shape(layout: Layout, weight: Shape) -> str:
    """The shape of the change; where that is not what is wrong, those of its parts."""
    readings = deltas_of(layout)
    shown = times(next(iter(readings[0].values())).shape) if not isinstance(readings, str) else ""
    return ", ".join(f"{part} {times(shape)}" for part, shape in layout) if shown in ("", times(weight)) else shown


def fits(found: Contents) -> list[Fit]:
    """The contents held against the architectures that take all of them; where none does, against all. The best first.

    All of them: the convolutions at both ends apart, which tell no architecture. Of others, fewer modules would fit.
    """
    whole = [one for one in known() if _takes_all(found, one)] if found.modules else []
    return sorted((fit(found, one) for one in whole or known()), key=lambda one: -one.inner)


def _takes_all(found: Contents, architecture: Architecture) -> bool:
    places, layouts = _places(architecture), found.layouts
    for stem in found.modules:
        if _path(places, stem, layouts[stem]) is None and not any(path in ENDS for path, _ in places.get(stem, ())):
            return False
    return True


@lru_cache(maxsize=2**15)
def _told_of(layout: Layout) -> tuple[tuple[str, Applied], ...]:
    readings = deltas_of(layout)
    assert not isinstance(readings, str)
    return tuple((which, Applied(one.name, one.rank, None)) for which, one in readings[0].items())


def applied_of(found: Contents, one: Fit) -> dict[str, Applied]:
    """What the header tells of the changes, by parameter."""
    return {path + which: told for path, stem in one.applied.items() for which, told in _told_of(found.layouts[stem])}


def verdict(plan: Plan, metadata: Mapping[str, str]) -> Verdict:
    """Which architectures a file was made for: by shapes, and where these leave a choice by what it says of itself."""
    best = plan.candidates[0].inner
    fitting = [one for one in plan.candidates if best and one.inner == best]
    names = tuple(one.architecture.name for one in fitting)
    evidence = plan.evidence
    told = _told(metadata)
    if len(names) > 1 and told in names:
        names, evidence = (told,), (*evidence, f"its metadata says so ({told})")
    elif {"sd1", "sd2"} <= set(names):
        axes = {len(shape) for one in fitting for shape in _shapes(plan.found, one, ".proj_in", "down")}
        if len(axes) == 1:  # a hint only: converters reshape
            names = tuple(sorted(names, key=lambda name: name != ("sd1" if axes == {4} else "sd2")))
            evidence = (*evidence, f"proj_in is {'a convolution' if axes == {4} else 'linear'}")
    return Verdict(names, evidence)


def _evidence(found: Contents, one: Fit) -> list[str]:
    """What tells architectures apart, as far as the file holds it."""
    lines = []
    widths = Counter(shape[1] for shape in _shapes(found, one, (".attn2.to_k", ".attn2.to_v")) if len(shape) > 1)
    if widths:
        width = widths.most_common(1)[0][0]
        lines.append(f"attn2.to_k takes {width}" + (f", as in {SEEN[width]}" if width in SEEN else ""))
    if any(".transformer_blocks.1." in path for path in one.applied):
        lines.append("transformers are more than one block deep")
    for component in ("text_encoder", "text_encoder_2"):
        of_it = _shapes(found, one, (f"{component}.", ".q_proj"), led=True)
        if of_it:
            lines.append(f"{component} is {of_it[0][-1]} wide")
    return lines


def _shapes(
    found: Contents, one: Fit, end: str | tuple[str, ...], part: str | None = None, led: bool = False
) -> list[Shape]:
    """Shapes of the deltas, or of one of their parts, of modules whose path ends so (led: begins and ends so)."""
    shapes = []
    for path, stem in one.applied.items():
        if path.startswith(end[0]) and path.endswith(end[1]) if led else path.endswith(end):
            layout = found.layouts[stem]
            readings = deltas_of(layout)
            if part:
                shapes += [shape for name, shape in layout if name == part]
            elif not isinstance(readings, str) and "" in readings[0]:
                shapes.append(readings[0][""].shape)
    return shapes


def _told(metadata: Mapping[str, str]) -> str | None:
    """The architecture that the metadata names."""
    version = metadata.get("ss_base_model_version", "") or metadata.get("modelspec.architecture", "")
    if "xl" in version:
        return "sdxl"
    if metadata.get("ss_v2") == "True" or version.startswith(("sd_v2", "stable-diffusion-v2")):
        return "sd2"
    return "sd1" if version.startswith(("sd_v1", "sd_1.5", "stable-diffusion-v1")) else None
