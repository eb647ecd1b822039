"""The base model's parameters and what is merged into them: computed anew from the untouched ones, never edited."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from sdlora.errors import SdloraError, nearest
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws.delta import times
from sdlora.lowrank.merged import Terms, merge
from sdlora.lowrank.targets import WRAPPABLE, modules_of, shape_of
from sdlora.mixing.placement import obstacle, readable
from sdlora.mixing.untouched import Untouched

KINDS = (*WRAPPABLE, nn.GroupNorm, nn.LayerNorm)


class Base:
    """The modules that adapters can change, by path, and what their parameters hold now. It keeps none of them alive.

    source: folder or file that the model was loaded from, None where that is not known.
    """

    def __init__(self, components: Mapping[str, nn.Module], source: Path | None) -> None:
        self._components = WeakValueDictionary(components)
        modules = modules_of(components, KINDS).items()
        self.modules = WeakValueDictionary[str, Any]({path: one for path, one in modules if one.weight is not None})
        self._untouched = Untouched(source)
        self._held: dict[str, Terms] = {}

    @property
    def changed(self) -> tuple[str, ...]:
        """The parameters that hold something else than the base's numbers."""
        return tuple(self._held)

    @property
    def copied(self) -> int:
        """Bytes of the copies of untouched parameters: of those that cannot be read back from the model's files."""
        return self._untouched.held

    def check(self, name: str, adapter: Adapter) -> None:
        """SdloraError where the adapter does not fit the model."""
        for path, delta in adapter.deltas.items():
            module, _ = _split(path)
            if module not in self.modules:
                raise SdloraError(f"{name}: the model has no module {path}{nearest(path, self.modules)}")
            shape = self.shape(path)
            if not delta.fits(shape):
                told = f"{times(delta.shape)}, the model's is {times(shape)}"
                raise SdloraError(f"{name}: {path} has shape {told}; wrong base model?")

    def shape(self, path: str) -> tuple[int, ...]:
        """Of a weight or bias; a bias that is not there would have one value for each output."""
        module, attribute = _split(path)
        return shape_of(self.modules[module], attribute)

    def unmergeable(self) -> frozenset[str]:
        """The components that are quantised or offloaded now, so that they can only be changed live."""
        return frozenset(name for name, part in self._components.items() if obstacle(part))

    def original(self, path: str) -> Tensor | None:
        """The untouched parameter; None for a bias that the base lacks."""
        if path in self._untouched:
            return self._untouched[path]
        module, attribute = _split(path)
        return readable(self.modules[module], attribute, path)

    @torch.inference_mode(False)
    def become(self, wanted: Mapping[str, Terms]) -> None:
        """Hold exactly these terms; only what differs is computed. If that fails midway, nothing is merged at all."""
        paths = wanted.keys() | self._held.keys()
        changed = sorted(path for path in paths if wanted.get(path) != self._held.get(path))
        try:
            for path in changed:
                if path in wanted:
                    self._merge(path, wanted[path])
                else:
                    self._restore(path)
            self._untouched.check()
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Nothing is merged any more. Where that cannot be, the rest is restored and the first reason raised."""
        reasons = []
        for path in sorted(self._held):
            try:
                self._restore(path)
            except SdloraError as reason:
                reasons.append(reason)
        if reasons:
            raise reasons[0]

    def refuse_replaced(self, paths: Iterable[str]) -> None:
        """SdloraError for parameters of modules that the model no longer has: it would be without their changes."""
        for name in (_split(path)[0] for path in paths):
            if name not in self.modules:
                raise SdloraError(f"{name} was replaced after the mixer was made; make a new mixer")

    @torch.no_grad()
    def _merge(self, path: str, terms: Terms) -> None:
        name, attribute = _split(path)
        module = self.modules[name]
        parameter = getattr(module, attribute)
        _refuse_gone(path, parameter)
        if path not in self._untouched:
            self._untouched.keep(path, parameter)
        self._held[path] = ()  # from here on it is not the base's, whatever interrupts this
        untouched = self._untouched[path]
        if untouched is None:
            untouched = module.weight.new_zeros(self.shape(path))
        if parameter is None:
            parameter = nn.Parameter(torch.empty_like(untouched), requires_grad=module.weight.requires_grad)
        try:
            merge(untouched, terms, parameter)
        except SdloraError as error:
            raise SdloraError(f"{path}: {error}") from error
        setattr(module, attribute, parameter)
        self._held[path] = terms

    @torch.no_grad()
    def _restore(self, path: str) -> None:
        name, attribute = _split(path)
        module = self.modules.get(name)
        if module is not None:  # else what was merged into it is gone with it
            untouched = self._untouched[path]
            _refuse_gone(path, getattr(module, attribute))
            if untouched is None:
                setattr(module, attribute, None)
            else:
                getattr(module, attribute).copy_(untouched)
        self._held.pop(path, None)
        self._untouched.forget(path)  # last: whatever interrupts this must leave a way back


def _refuse_gone(path: str, parameter: Tensor | None) -> None:
    """What is offloaded while it holds a mix keeps the mix where nothing here can reach it."""
    if parameter is not None and parameter.is_meta:
        raise SdloraError(
            f"{path} was offloaded with LoRAs merged into it; load the model again, and offload it without any"
        )


def _split(path: str) -> tuple[str, str]:
    """The path of the module, and which of its parameters."""
    module = path.removesuffix(".bias")
    return module, "weight" if module == path else "bias"
