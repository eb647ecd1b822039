"""The mixer: any number of adapters over one pipeline, their weights merged into the base's, off to the bit.

Base weights are never edited by adding and subtracting. A touched weight is always computed anew,
W = W0 + sum(weight_i * delta_i), from its untouched copy, in float32, and rounded once; generation then costs
what it costs without LoRA.
"""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdlora.errors import SdloraError, nearest
from sdlora.formats.architectures import architecture_of
from sdlora.formats.read import read
from sdlora.formats.receipt import Receipt
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import Delta
from sdlora.lowrank.targets import modules_of
from sdlora.models.families import components_of

Weights = float | Mapping[str, float]  # one for all components, or by component ("unet", "text_encoder", ...)
Terms = tuple[tuple[Delta, float], ...]  # what a touched weight holds: deltas and their weights, in order of name


@dataclass(frozen=True)
class Source:
    """Where an adapter was read from, and what that file was then."""

    path: Path
    size: int
    modified: int
    receipt: Receipt


class Mixer:
    """Adds, weighs and removes adapters over a pipeline's UNet and text encoders.

    A mixer belongs to one thread at a time: whoever sets weights and then generates holds `lock` for that long.
    """

    def __init__(self, pipeline: Any) -> None:
        components = components_of(pipeline)
        self.pipeline = pipeline
        self.lock = threading.Lock()
        self.architecture = architecture_of(components)
        self._components = tuple(components)
        self._modules = modules_of(components)
        self._adapters: dict[str, Adapter] = {}
        self._sources: dict[str, Source] = {}
        self._weights: dict[str, dict[str, float]] = {}
        self._untouched: dict[str, Tensor] = {}  # copies of the weights that differ from the base now
        self._held: dict[str, Terms] = {}  # what those hold

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters at hand, in the order they were added."""
        return tuple(self._adapters)

    @property
    def weights(self) -> dict[str, dict[str, float]]:
        """The weights in force, by adapter and component; adapters that are off are left out."""
        return {name: dict(weights) for name, weights in self._weights.items()}

    def load(self, path: Path | str, name: str | None = None) -> Receipt:
        """Add the adapter of a LoRA file, at weight 0, and return the receipt of reading it.

        A file that was loaded before is read again only if it has changed; a name that is taken is replaced and
        keeps its weights. Files that do not fit raise SdloraError and change nothing.
        """
        path = Path(path)
        name = path.stem if name is None else name
        known = self._sources.get(name)
        try:
            status = path.stat()
        except OSError as error:
            raise SdloraError(f"LoRA {path} cannot be read ({error.strerror}); check the path") from error
        if known and (known.path, known.size, known.modified) == (path, status.st_size, status.st_mtime_ns):
            return known.receipt
        adapter, receipt = read(path, self.architecture)
        self.add(adapter, name)
        self._sources[name] = Source(path, status.st_size, status.st_mtime_ns, receipt)
        return receipt

    def add(self, adapter: Adapter, name: str) -> None:
        """Add an adapter at weight 0. A name that is taken is replaced and keeps its weights.

        SdloraError: it does not fit the model, or the mix would overflow; nothing has changed then.
        """
        for path, delta in adapter.deltas.items():
            module = self._modules.get(path)
            if module is None:
                raise SdloraError(f"{name}: the model has no module {path}{nearest(path, self._modules)}")
            if not delta.fits(module.weight.shape):
                shape = tuple(module.weight.shape)
                raise SdloraError(f"{name}: {path} has shape {delta.shape}, the model's is {shape}; wrong base model?")
        adapters = {**self._adapters, name: adapter}
        self._bring(_terms(adapters, self._weights))
        self._adapters = adapters
        self._sources.pop(name, None)

    def set(self, weights: Mapping[str, Weights]) -> None:
        """Make the mix exactly this: the adapters named get these weights, all others are off.

        Unknown names and components, weights that are no finite numbers and a mix that overflows raise SdloraError and
        change nothing.
        """
        told = {name: self._by_component(name, weight) for name, weight in weights.items()}
        wanted = {name: by for name, by in told.items() if any(by.values())}
        self._bring(_terms(self._adapters, wanted))
        self._weights = wanted

    def unload(self, name: str) -> None:
        """Take an adapter and its effect away."""
        self._known(name)
        weights = {other: by for other, by in self._weights.items() if other != name}
        self._bring(_terms(self._adapters, weights))
        self._weights = weights
        del self._adapters[name]
        self._sources.pop(name, None)

    def _known(self, name: str) -> None:
        if name not in self._adapters:
            raise SdloraError(f"no LoRA named {name!r} is loaded{nearest(name, self._adapters)}; load it first")

    def _by_component(self, name: str, weights: Weights) -> dict[str, float]:
        self._known(name)
        if not isinstance(weights, Mapping):
            weights = dict.fromkeys(self._components, weights)
        for component, weight in weights.items():
            if component not in self._components:
                known = ", ".join(self._components)
                raise SdloraError(f"{name}: the model has no component {component!r}; it has {known}")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < float("inf"):
                raise SdloraError(f"{name}: the weight {weight!r} is no finite number")
        return {component: float(weight) for component, weight in weights.items()}

    def _bring(self, wanted: Mapping[str, Terms]) -> None:
        """Bring the model's weights to these terms; if that fails midway, back to those they held."""
        before = dict(self._held)
        changed = sorted(path for path in wanted.keys() | before.keys() if wanted.get(path) != before.get(path))
        try:
            self._rebuild(changed, wanted)
        except BaseException:
            self._rebuild(changed, before)
            raise

    @torch.no_grad()
    def _rebuild(self, paths: Iterable[str], wanted: Mapping[str, Terms]) -> None:
        for path in paths:
            weight, terms = self._modules[path].weight, wanted.get(path)
            assert isinstance(weight, Tensor)
            if terms:
                untouched = self._untouched.setdefault(path, weight.detach().clone())
                weight.copy_(_sum(path, untouched, terms))
                self._held[path] = terms
            elif path in self._untouched:
                weight.copy_(self._untouched[path])
                self._held.pop(path, None)
                del self._untouched[path]  # last: whatever interrupts this must leave a way back


def _terms(adapters: Mapping[str, Adapter], weights: Mapping[str, Mapping[str, float]]) -> dict[str, Terms]:
    """What each touched weight shall hold. In order of name, so that the same mix has the same bits."""
    terms: dict[str, Terms] = {}
    for name in sorted(weights):
        for path, delta in adapters[name].deltas.items():
            weight = weights[name].get(path.partition(".")[0], 0.0)
            if weight:
                terms[path] = (*terms.get(path, ()), (delta, weight))
    return terms


def _sum(path: str, untouched: Tensor, terms: Terms) -> Tensor:
    """W0 + sum(weight * delta) in float32, rounded once to the base's dtype."""
    total = untouched.float()
    for delta, weight in terms:
        total = total + weight * delta.weight(untouched)
    rounded = total.to(untouched.dtype)
    if not torch.isfinite(rounded).all():
        raise SdloraError(f"the mix overflows {str(untouched.dtype)[6:]} in {path}; use smaller weights")
    return rounded
