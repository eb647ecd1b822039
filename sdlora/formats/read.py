"""Reading LoRA files: kohya's and diffusers' names, decided key by key, nothing dropped in silence."""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.formats.architectures import ENDS, Architecture, known
from sdlora.formats.metadata import trigger_words
from sdlora.formats.names import readable
from sdlora.formats.receipt import Receipt
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import LowRank

# How keys end, and the factor they hold then.
SUFFIXES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
}
Factors = dict[str, str]  # of one module: "down", "up", "alpha" -> key in the file


def read(path: Path | str, architecture: Architecture) -> tuple[Adapter, Receipt]:
    """Read a LoRA file as an adapter for a model of the architecture, with a receipt of what applies and what does not.

    SdloraError: the file cannot be read, is cut short or damaged, is no LoRA, or is one for another architecture.
    """
    path = Path(path)
    tensors, metadata, sha256 = _open(path)
    modules, foreign = _grouped(tensors)
    if not modules and not foreign:
        raise SdloraError(f"{path} is empty: it holds no tensors; fetch or train it again")
    fit = _fit(modules, tensors, architecture)
    _refuse_other_architecture(path, fit, modules, tensors, architecture, foreign)
    if fit.twice:
        raise SdloraError(f"{path} tells {len(fit.twice)} modules twice, such as {fit.twice[0]}; delete one of the two")
    alphas = _Alphas(path, metadata)
    deltas = {module: _delta(path, module, factors, tensors, alphas) for module, factors in fit.applied.items()}
    receipt = Receipt(
        path=path,
        sha256=sha256,
        applied={module: delta.rank for module, delta in deltas.items()},
        unknown=tuple(sorted((*foreign, *fit.unknown))),
        misfit=tuple(fit.misfit.values()),
        trigger_words=trigger_words(metadata),
    )
    return Adapter(deltas, metadata), receipt


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Tensors, metadata and the hash of the whole file."""
    if path.suffix.lower() != ".safetensors":
        raise SdloraError(f"{path} is no .safetensors file; LoRAs are read in that form only")
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        with safe_open(path, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, dict(opened.metadata() or {}), sha256
    except OSError as error:
        raise SdloraError(f"LoRA {path} cannot be read ({error.strerror or error}); check the path") from error
    except SafetensorError as error:
        raise SdloraError(f"{path} is damaged or cut short ({error}); fetch or save it again") from error


def _grouped(keys: Iterable[str]) -> tuple[dict[str, Factors], list[str]]:
    """The factors by the file's own name of their module, and the keys that mean something else.

    A module of which any key is foreign (a DoRA magnitude, a Tucker core) is foreign as a whole: applied without it,
    it would be another change than the one that was trained.
    """
    modules: dict[str, Factors] = defaultdict(dict)
    foreign = []
    for key in sorted(keys):
        suffix = next((suffix for suffix in SUFFIXES if key.endswith(suffix)), None)
        stem = key.removesuffix(suffix or "")
        if suffix is None or SUFFIXES[suffix] in modules[stem]:
            foreign.append(key)
        else:
            modules[stem][SUFFIXES[suffix]] = key
    for key in tuple(foreign):
        for dot in (match.start() for match in re.finditer(r"\.", key)):
            foreign += modules.pop(key[:dot], {}).values()
    return {stem: factors for stem, factors in modules.items() if factors}, foreign


@dataclass(frozen=True)
class _Fit:
    """How a file's modules fit an architecture.

    applied: their factors by path; unknown: keys; misfit: a line by path; twice: pairs of names that mean one module.
    """

    applied: Mapping[str, Factors]
    unknown: tuple[str, ...]
    misfit: Mapping[str, str]
    twice: tuple[str, ...]

    @property
    def inner(self) -> int:
        """How many modules apply of those that tell architectures apart."""
        return len(self.applied.keys() - ENDS)


def _fit(modules: Mapping[str, Factors], tensors: Mapping[str, Tensor], architecture: Architecture) -> _Fit:
    names = readable(architecture.shapes)
    applied: dict[str, Factors] = {}
    stems: dict[str, str] = {}
    unknown: list[str] = []
    misfit: dict[str, str] = {}
    twice: list[str] = []
    for stem, factors in modules.items():
        path = names.get(stem)
        if path is None or not {"down", "up"} <= factors.keys():
            unknown += factors.values()
            continue
        if path in stems:
            twice.append(f"{stems[path]} and {stem}")
            continue
        stems[path] = stem
        shape = _shape(tensors[factors["down"]], tensors[factors["up"]])
        wanted = architecture.shapes[path]
        if _squeezed(shape) == _squeezed(wanted):
            applied[path] = factors
        else:
            misfit[path] = f"{stem} ({_times(shape)}, the model's is {_times(wanted)})"
    return _Fit(applied, tuple(unknown), misfit, tuple(twice))


def _refuse_other_architecture(
    path: Path,
    fit: _Fit,
    modules: Mapping[str, Factors],
    tensors: Mapping[str, Tensor],
    architecture: Architecture,
    foreign: list[str],
) -> None:
    """A file of which more fits another architecture, or of which many shapes or all names are wrong, is for that one.

    A few wrong shapes among many right ones are a matter for the receipt.
    """
    if modules and len(fit.applied) == len(modules):
        return
    others = {other: _fit(modules, tensors, other).inner for other in known() if other.name != architecture.name}
    best = max(others, key=others.__getitem__)
    if others[best] > fit.inner:
        raise SdloraError(
            f"{path} is a LoRA for {best.label} ({others[best]} of its {len(modules)} modules fit that, "
            f"{fit.inner} fit the model, which is {architecture.label}); choose a model that it was trained on"
        )
    wrong = fit.misfit.keys() - ENDS
    if len(wrong) > 0.05 * (fit.inner + len(wrong)):
        raise SdloraError(
            f"{path} was trained on another model: {len(wrong)} of its {len(modules)} modules have other shapes, "
            f"such as {fit.misfit[min(wrong)]}; choose that model"
        )
    if not fit.applied:
        keys = sorted((*foreign, *fit.unknown))
        raise SdloraError(
            f"{path} holds nothing that can be applied as a LoRA: {len(keys)} keys such as {', '.join(keys[:2])}; "
            "plain LoRAs with kohya's or diffusers' names can be read"
        )


class _Alphas:
    """The alphas that newer diffusers files carry in their metadata, as a peft config by component."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        try:
            config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
            self._usual = {key.rpartition(".")[0]: float(v) for key, v in config.items() if key.endswith(".lora_alpha")}
            self._special = {
                key.rpartition(".")[0]: {end: float(alpha) for end, alpha in (v or {}).items()}
                for key, v in config.items()
                if key.endswith(".alpha_pattern")
            }
            self._root = {key.rpartition(".")[0] for key, v in config.items() if key.endswith(".use_rslora") and v}
        except (ValueError, AttributeError, TypeError, RecursionError, OverflowError) as error:
            raise SdloraError(f"{path} has damaged lora_adapter_metadata ({error}); save it again") from error

    def of(self, module: str, rank: int) -> float:
        """The alpha of a module; rank, so that the scale is 1, where the file does not say."""
        component = module.partition(".")[0]
        ends = {end.lstrip("^"): alpha for end, alpha in self._special.get(component, {}).items()}
        special = (alpha for end, alpha in ends.items() if module.endswith("." + end))
        alpha = next(special, self._usual.get(component, float(rank)))
        return alpha * rank**0.5 if component in self._root else alpha  # rsLoRA (arXiv:2312.03732): alpha / sqrt(rank)


def _delta(path: Path, module: str, factors: Factors, tensors: Mapping[str, Tensor], alphas: _Alphas) -> LowRank:
    down, up = tensors[factors["down"]], tensors[factors["up"]]
    if "alpha" not in factors:
        alpha = alphas.of(module, down.shape[0])
    elif tensors[factors["alpha"]].numel() == 1:
        alpha = tensors[factors["alpha"]].item()
    else:
        raise SdloraError(f"{path}: {factors['alpha']} is no single number; the file is damaged")
    odd = [str(factor.dtype)[6:] for factor in (down, up) if not factor.is_floating_point()]
    if odd:
        raise SdloraError(f"{path}: {module} holds {odd[0]} where numbers with a fraction belong")
    if not all(torch.isfinite(factor.float()).all() for factor in (down, up, torch.tensor(alpha))):
        raise SdloraError(f"{path}: {module} holds numbers that are nan or infinite; use an earlier checkpoint")
    try:
        return LowRank(down, up, float(alpha))
    except SdloraError as error:
        raise SdloraError(f"{path}: {module}: {error}") from error


def _shape(down: Tensor, up: Tensor) -> tuple[int, ...]:
    """Of the delta that the factors make."""
    return (*up.shape[:1], *down.shape[1:])


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Pointwise convolutions and linear layers are the same: (o, i, 1, 1) is (o, i)."""
    return shape[:2] if all(size == 1 for size in shape[2:]) else shape


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
