"""The mixer: any number of adapters over one pipeline, their weights merged into the base's, off to the bit.

Base weights are never edited by adding and subtracting. A touched weight is always computed anew,
W = W0 + sum(weight_i * delta_i), from its untouched copy, in float32, and rounded once; generation then costs
what it costs without LoRA. A law that asks for the base's weight gets W0, so that the order of adapters means nothing.
"""

import os
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdlora.errors import SdloraError, nearest
from sdlora.formats.architectures import architecture_of
from sdlora.formats.read import read
from sdlora.formats.receipt import Receipt
from sdlora.formats.sources import CONFIG, sources_of
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import Delta
from sdlora.lowrank.targets import WRAPPABLE, modules_of
from sdlora.mixing.tokens import Vocabulary, check_tokens, grown, learned, own_vocabulary, put, same
from sdlora.models.families import components_of, family_of

Weights = float | Mapping[str, float]  # one for all components, or by component ("unet", "text_encoder", ...)
Terms = tuple[tuple[Delta, float], ...]  # what a touched weight holds: deltas and their weights, in order of name
Stamp = tuple[tuple[str, int, int], ...]  # path, size and time of change of each file of a LoRA

# Nanoseconds: a file changed so lately may change again without another time, the clocks of disks being coarse.
SETTLED = 2 * 10**9
KINDS = (*WRAPPABLE, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Source:
    """Where an adapter was read from, and what lay there then.

    partial: whether a part of it would have done; settled: whether a change since must show in the stamp.
    """

    path: Path
    stamp: Stamp
    partial: bool
    settled: bool
    receipt: Receipt


class Mixer:
    """Adds, weighs and removes adapters over a pipeline's UNet and text encoders.

    Weights, biases and norms follow the weights that are set. Learned tokens are known from when an adapter is added
    until it is unloaded, whatever its weight.
    A mixer belongs to one thread at a time: whoever sets weights and then generates holds `lock` for that long.
    """

    def __init__(self, pipeline: Any) -> None:
        components = components_of(pipeline)
        self.pipeline = pipeline
        self.lock = threading.Lock()
        self.architecture = architecture_of(components)
        self._components = tuple(components)
        modules = modules_of(components, KINDS)
        self._modules = {path: module for path, module in modules.items() if module.weight is not None}
        self._adapters: dict[str, Adapter] = {}
        self._sources: dict[str, Source] = {}
        self._weights: dict[str, dict[str, float]] = {}
        # Copies of the weights and biases that differ from the base now; None is a bias that the base does not have.
        self._untouched: dict[str, Tensor | None] = {}
        self._held: dict[str, Terms] = {}  # what those hold
        self._own = {name: own_vocabulary(pipeline, name) for name in family_of(pipeline).text_encoders}
        self._vocabularies = dict(self._own)  # what the text encoders read now

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters at hand, in the order they were added."""
        return tuple(self._adapters)

    @property
    def weights(self) -> dict[str, dict[str, float]]:
        """The weights in force, by adapter and component; adapters that are off are left out."""
        return {name: dict(weights) for name, weights in self._weights.items()}

    def load(self, path: Path | str, name: str | None = None, partial: bool = False) -> Receipt:
        """Add the adapter of a LoRA file or PEFT folder, at weight 0, and return the receipt of reading it.

        What was loaded before is read again only if it has changed; a name that is taken is replaced and keeps its
        weights. Files that do not fit raise SdloraError and change nothing. partial: as for `read`.
        """
        path = Path(path)
        name = _name(path) if name is None else name
        adapter, source = self._read(path, name, partial)
        if source is not self._sources.get(name):
            self.add(adapter, name)
            self._sources[name] = source
        return source.receipt

    def hold(self, files: Mapping[str, tuple[Path | str, Weights]], partial: bool = False) -> dict[str, Receipt]:
        """Hold exactly these, each a path and its weights by name, and nothing else; returns their receipts.

        One step: what leaves makes room for what comes, as for another LoRA's token of the same name. Where one of them
        cannot be had, SdloraError, and nothing has changed. partial: as for `read`.
        """
        found = {name: self._read(Path(path), name, partial) for name, (path, _) in files.items()}
        weights = {name: self._by_component(name, told) for name, (_, told) in files.items()}
        for name, (adapter, source) in found.items():
            if source is not self._sources.get(name):
                self._check(adapter, name)
        self._become({name: adapter for name, (adapter, _) in found.items()}, weights)
        self._sources = {name: source for name, (_, source) in found.items()}
        return {name: source.receipt for name, source in self._sources.items()}

    def add(self, adapter: Adapter, name: str) -> None:
        """Add an adapter at weight 0. A name that is taken is replaced and keeps its weights.

        SdloraError: it does not fit the model, one of its tokens is taken, or the mix would overflow; nothing has
        changed then.
        """
        self._check(adapter, name)
        self._become({**self._adapters, name: adapter}, self._weights)
        self._sources.pop(name, None)

    def set(self, weights: Mapping[str, Weights]) -> None:
        """Make the mix exactly this: the adapters named get these weights, all others are off.

        Unknown names and components, weights that are no finite numbers and a mix that overflows raise SdloraError and
        change nothing.
        """
        for name in weights:
            self._known(name)
        self._become(self._adapters, {name: self._by_component(name, weight) for name, weight in weights.items()})

    def unload(self, name: str) -> None:
        """Take an adapter, its effect and its tokens away."""
        self._known(name)
        weights = {other: by for other, by in self._weights.items() if other != name}
        self._become({other: adapter for other, adapter in self._adapters.items() if other != name}, weights)
        self._sources.pop(name, None)

    def _known(self, name: str) -> None:
        if name not in self._adapters:
            raise SdloraError(f"no LoRA named {name!r} is loaded{nearest(name, self._adapters)}; load it first")

    def _read(self, path: Path, name: str, partial: bool) -> tuple[Adapter, Source]:
        """What lies at the path now; if that is what the name already stands for, the very same objects."""
        stamp, known = _stamp(path), self._sources.get(name)
        same = known is not None and (known.path, known.stamp, known.partial) == (path, stamp, partial)
        if known and same and known.settled:
            return self._adapters[name], known
        settled = time.time_ns() - max(changed for _, _, changed in stamp) > SETTLED
        adapter, receipt = read(path, self.architecture, partial)
        if known and same and receipt == known.receipt:
            self._sources[name] = replace(known, settled=settled)
            return self._adapters[name], self._sources[name]
        return adapter, Source(path, stamp, partial, settled, receipt)

    def _check(self, adapter: Adapter, name: str) -> None:
        """SdloraError where the adapter does not fit the model."""
        for path, delta in adapter.deltas.items():
            module, attribute = self._parameter(path)
            if module is None:
                raise SdloraError(f"{name}: the model has no module {path}{nearest(path, self._modules)}")
            shape = _shape(module, attribute)
            if not delta.fits(shape):
                raise SdloraError(f"{name}: {path} has shape {delta.shape}, the model's is {shape}; wrong base model?")
        check_tokens(name, adapter, self._own)

    def _by_component(self, name: str, weights: Weights) -> dict[str, float]:
        if not isinstance(weights, Mapping):
            weights = dict.fromkeys(self._components, weights)
        for component, weight in weights.items():
            if component not in self._components:
                known = ", ".join(self._components)
                raise SdloraError(f"{name}: the model has no component {component!r}; it has {known}")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < float("inf"):
                raise SdloraError(f"{name}: the weight {weight!r} is no finite number")
        return {component: float(weight) for component, weight in weights.items()}

    def _become(self, adapters: dict[str, Adapter], weights: Mapping[str, dict[str, float]]) -> None:
        """Bring the model to these adapters at these weights; if that fails midway, back to what it was."""
        weights = {name: by for name, by in weights.items() if any(by.values())}
        wanted, vocabularies = _terms(adapters, weights), self._vocabularies
        if adapters is not self._adapters:
            vocabularies = self._vocabularies_for(adapters)
        before = dict(self._held)
        changed = sorted(path for path in wanted.keys() | before.keys() if wanted.get(path) != before.get(path))
        heard = [one for one, vocabulary in vocabularies.items() if vocabulary is not self._vocabularies[one]]
        try:
            self._rebuild(changed, wanted)
            for component in heard:
                put(self.pipeline, component, vocabularies[component])
        except BaseException:
            for component in heard:
                put(self.pipeline, component, self._vocabularies[component])
            self._rebuild(changed, before)
            raise
        self._adapters, self._weights, self._vocabularies = adapters, weights, vocabularies

    def _vocabularies_for(self, adapters: Mapping[str, Adapter]) -> dict[str, Vocabulary]:
        """What the text encoders read with these adapters: as little anew as can be."""
        tokens = learned(adapters)
        found = {}
        for component, own in self._own.items():
            vectors, held = tokens.get(component, {}), self._vocabularies[component]
            found[component] = held if same(vectors, held.learned) else grown(own, vectors)
        return found

    def _parameter(self, path: str) -> tuple[Any, str]:
        """The module that a delta's path names, None where there is none, and which of its parameters."""
        module = path.removesuffix(".bias")
        return self._modules.get(module), "weight" if module == path else "bias"

    @torch.no_grad()
    def _rebuild(self, paths: Iterable[str], wanted: Mapping[str, Terms]) -> None:
        for path in paths:
            (module, attribute), terms = self._parameter(path), wanted.get(path)
            parameter = getattr(module, attribute)
            if terms:
                if path not in self._untouched:
                    self._untouched[path] = None if parameter is None else parameter.detach().clone()
                untouched = self._untouched[path]
                base = module.weight.new_zeros(_shape(module, attribute)) if untouched is None else untouched
                _write(module, attribute, _sum(path, base, terms))
                self._held[path] = terms
            elif path in self._untouched:
                _write(module, attribute, self._untouched[path])
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


def _write(module: Any, attribute: str, value: Tensor | None) -> None:
    """Into the parameter that is there; a bias that the base does not have comes with a value and goes with None."""
    parameter = getattr(module, attribute)
    if parameter is None and value is not None:
        setattr(module, attribute, nn.Parameter(value, requires_grad=module.weight.requires_grad))
    elif value is None:
        setattr(module, attribute, None)
    else:
        parameter.copy_(value)


def _shape(module: Any, attribute: str) -> tuple[int, ...]:
    """Of a module's weight or bias; a bias that it does not have would have one value for each output."""
    return tuple(module.weight.shape[: 1 if attribute == "bias" else None])


def _name(path: Path) -> str:
    return path.name if os.path.isdir(path) else path.stem


def _stamp(path: Path) -> Stamp:
    """What tells whether any of the files of a LoRA has changed."""
    try:
        sources = sources_of(path)
        configs = (source.path.with_name(CONFIG) for source in sources if source.config)
        found = [(str(file), file.stat()) for file in (*(source.path for source in sources), *configs)]
    except OSError as error:
        raise SdloraError(f"LoRA {path} cannot be read ({error.strerror}); check the path") from error
    return tuple((file, status.st_size, status.st_mtime_ns) for file, status in found)
