"""Wrapping the targets of a model with trainable layers, and unwrapping it so that nothing remains."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from sdlora.errors import SdloraError, nearest
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.layers import LoRAConv2d, LoRALayer, LoRALinear, check_fit, copy_into, delta_of, wrap
from sdlora.lowrank.targets import matching, modules_of, select

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class ComponentReport:
    """What was wrapped in one component: modules and trainable parameters, beside all parameters of the base."""

    modules: int
    parameters: int
    base_parameters: int


@dataclass(frozen=True)
class InjectionReport:
    """What was wrapped, by component and in all."""

    components: Mapping[str, ComponentReport]

    @property
    def modules(self) -> int:
        return sum(part.modules for part in self.components.values())

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.components.values())

    @property
    def base_parameters(self) -> int:
        return sum(part.base_parameters for part in self.components.values())

    def summary(self) -> str:
        """One line a component: "unet: 128 modules, 3,188,736 parameters, 0.37% of 859,520,964"."""
        return "\n".join(
            f"{name}: {part.modules} modules, {part.parameters:,} parameters, "
            f"{part.parameters / max(part.base_parameters, 1):.2%} of {part.base_parameters:,}"
            for name, part in self.components.items()
        )


class Injection:
    """Trainable layers in place of a model's targets, until `remove`; as a context manager it removes itself.

    While it lasts every parameter of the components is frozen, targets or not. Removing puts the wrapped modules back
    where they were and gives each parameter its own requires_grad again. Made by `inject`.
    """

    def __init__(self, components: Mapping[str, nn.Module], layers: Mapping[str, LoRALayer]) -> None:
        self.layers = dict(layers)
        self._base_parameters = {name: sum(p.numel() for p in root.parameters()) for name, root in components.items()}
        self._grad_flags = [(p, p.requires_grad) for root in components.values() for p in root.parameters()]
        for parameter, _ in self._grad_flags:
            parameter.requires_grad_(False)
        # A module may hang in several places; all of them get the same layer.
        layer_of = {id(layer.base): layer for layer in self.layers.values()}
        self._places = [
            (parent, name, layer_of[id(child)])
            for root in components.values()
            for parent in root.modules()
            for name, child in parent._modules.items()
            if id(child) in layer_of
        ]
        for parent, name, layer in self._places:
            setattr(parent, name, layer)

    def __enter__(self) -> "Injection":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Put the model back as it was. The layers keep what they learned; a second call does nothing."""
        for parent, name, layer in self._places:
            setattr(parent, name, layer.base)
        for parameter, flag in self._grad_flags:
            parameter.requires_grad_(flag)
        self._places, self._grad_flags = [], []

    def parameters(self, component: str | None = None) -> list[nn.Parameter]:
        """The trainable parameters, of one component or of all."""
        return [
            parameter
            for path, layer in self.layers.items()
            if component in (None, path.partition(".")[0])
            for factor in (layer.down, layer.up)
            for parameter in factor.parameters()
        ]

    def adapter(self) -> Adapter:
        """What was learned so far, as detached copies on the CPU."""
        return Adapter({path: delta_of(layer) for path, layer in self.layers.items()})

    def load(self, adapter: Adapter) -> None:
        """Continue from an adapter of exactly these modules and ranks; with any other: SdloraError, nothing changed."""
        unknown = [path for path in adapter.deltas if path not in self.layers]
        missing = [path for path in self.layers if path not in adapter.deltas]
        if unknown:
            hint = nearest(unknown[0], self.layers)
            raise SdloraError(f"the adapter holds {len(unknown)} modules that are not wrapped: {unknown[0]}{hint}, ...")
        if missing:
            raise SdloraError(f"the adapter lacks {len(missing)} of the wrapped modules: {missing[0]}, ...")
        fitting = {}
        for path, delta in adapter.deltas.items():
            with _naming(path):
                fitting[path] = check_fit(self.layers[path], delta)
        for path, low_rank in fitting.items():
            copy_into(self.layers[path], low_rank)

    def report(self) -> InjectionReport:
        """Modules wrapped and parameters added, by component."""
        return InjectionReport(
            {
                name: ComponentReport(
                    modules=sum(path.partition(".")[0] == name for path in self.layers),
                    parameters=sum(p.numel() for p in self.parameters(name)),
                    base_parameters=count,
                )
                for name, count in self._base_parameters.items()
            }
        )


def inject(
    components: Mapping[str, nn.Module],
    targets: str | Sequence[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    *,
    generator: torch.Generator,
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
) -> Injection:
    """Freeze the components and put a trainable layer, without effect as yet, in place of each target.

    components: by name, such as {"unet": unet, "text_encoder": text_encoder}; targets: see `select`.
    ranks, alphas: exceptions to rank and alpha, by path or pattern; where several match, the last counts.
    Values out of range, patterns that match nothing and convolutions with groups raise SdloraError, nothing changed.
    """
    for name, root in components.items():
        if any(isinstance(module, (LoRALinear, LoRAConv2d)) for module in root.modules()):
            raise SdloraError(f"{name} carries LoRA layers already; remove() them first")
    if not 0 <= dropout < 1:
        raise SdloraError(f"dropout is {dropout}; it must be at least 0 and below 1")
    modules, paths = modules_of(components), select(components, targets)
    rank_of, alpha_of = _per_module(paths, rank, ranks), _per_module(paths, alpha, alphas)
    layers: dict[str, LoRALayer] = {}
    for path in paths:
        with _naming(path):
            _check(rank_of[path], alpha_of[path])
            layers[path] = wrap(modules[path], rank_of[path], alpha_of[path], dropout, generator)
    return Injection(components, layers)


def _per_module(paths: Sequence[str], usual: Number, exceptions: Mapping[str, Number] | None) -> dict[str, Number]:
    values = dict.fromkeys(paths, usual)
    for pattern, value in (exceptions or {}).items():
        values.update(dict.fromkeys(matching(pattern, paths), value))
    return values


def _check(rank: int, alpha: float) -> None:
    if rank < 1 or rank != int(rank):
        raise SdloraError(f"rank is {rank}; it must be a whole number of at least 1")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise SdloraError(f"alpha is {alpha}; it must be a number above 0")


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Lead an error by the module it is about."""
    try:
        yield
    except SdloraError as error:
        raise SdloraError(f"{path}: {error}") from error
