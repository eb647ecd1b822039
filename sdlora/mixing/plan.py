"""A plan: a base model and what is to be mixed into it, an immutable value. Applying it is the mixer's work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from numbers import Real
from typing import Any

from sdlora.errors import SdloraError, nearest
from sdlora.formats.block_weights import BLOCKS, Factors, block_of, read_factors
from sdlora.mixing.schedule import ALWAYS, Schedule, parse_schedule

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")

# One for all components, or by component ("unet", "text_encoder", ...; those left out are off, unless all are), with
# "blocks", "on" and "schedule" beside them if need be.
Weights = float | Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class LoraWeight:
    """A LoRA and how much of it is applied, where and when. Weights that are no finite numbers raise SdloraError.

    path: the file, or the name that the mixer knows it by. sha256: of its content, filled in when it is read. autov3:
    the hash that others know the file by (see `Receipt`), filled in for a job; it decides nothing.
    text_encoder_2: SDXL's second text encoder, None for the weight of the first.
    blocks: factors over the weights by block of the family's map, those that are not named are 1; given as text, a
    table or pairs.
    on: False keeps the settings and applies nothing.
    schedule: a factor over the UNet's weight while it denoises, given as text too. Text encoders, which are asked once,
    do not follow it.
    """

    path: str
    unet: float = 1.0
    text_encoder: float = 1.0
    text_encoder_2: float | None = None
    blocks: Factors = ()
    on: bool = True
    schedule: Schedule = ALWAYS
    sha256: str = ""
    autov3: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.path, str):
            raise SdloraError(f"{self.path!r} names no LoRA; give its path, or the name it was loaded under, as text")
        for name in COMPONENTS:
            weight = getattr(self, name)
            self._check(name, weight)
            object.__setattr__(self, name, None if weight is None else float(weight))  # numpy's numbers are no JSON
        object.__setattr__(self, "blocks", self._factors(self.blocks))
        if isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", parse_schedule(self.schedule))
        if not isinstance(self.schedule, Schedule) or not isinstance(self.on, bool):
            raise SdloraError(f'{self.path}: `schedule` is a text such as "0.2-0.8", and `on` is True or False')

    def _factors(self, told: Any) -> Factors:
        """In one order and without those that are 1, so that what is the same is equal."""
        try:
            blocks = dict(read_factors(told) if isinstance(told, str) else told)
        except (TypeError, ValueError):
            raise SdloraError(f'{self.path}: {told!r} are no blocks; write "IN04:0.5" or a list of factors') from None
        for block, factor in blocks.items():
            if block not in BLOCKS:
                raise SdloraError(f"{self.path}: there is no block {block!r}{nearest(str(block), BLOCKS)}")
            self._check(block, factor)
        return tuple((block, float(blocks[block])) for block in BLOCKS if blocks.get(block, 1) != 1)

    def _check(self, name: str, weight: Any) -> None:
        number = isinstance(weight, Real) and not isinstance(weight, bool) and isfinite(weight)
        if not number and not (weight is None and name == "text_encoder_2"):
            raise SdloraError(f"weight of {self.path} ({name}) is {weight!r}; it must be a finite number")

    def of(self, component: str) -> float:
        """The weight of a component, schedule aside."""
        if component == "text_encoder_2" and self.text_encoder_2 is None:
            component = "text_encoder"
        return float(getattr(self, component)) if self.on else 0.0

    def at(self, place: Place) -> float:
        """The weight at a place, schedule aside."""
        component, block = place
        return self.of(component) * dict(self.blocks).get(block, 1.0)

    def only(self, components: tuple[str, ...]) -> LoraWeight:
        """The same with all other components off; what is not the UNet has no schedule."""
        unet, first, second = (self.of(name) if name in components else 0.0 for name in COMPONENTS)
        schedule = self.schedule if "unet" in components else ALWAYS
        return replace(self, unet=unet, text_encoder=first, text_encoder_2=second, schedule=schedule)


Place = tuple[str, str]  # component and block


def place_of(path: str) -> Place:
    """Where a parameter stands."""
    return path.partition(".")[0], block_of(path)


@dataclass(frozen=True)
class Plan:
    """base: the model, as a job names it. loras: in any order, each once; the order changes nothing."""

    base: str
    loras: tuple[LoraWeight, ...] = ()

    def __post_init__(self) -> None:
        odd = next((lora for lora in self.loras if not isinstance(lora, LoraWeight)), None)
        if odd is not None:
            raise SdloraError(f"{odd!r} is no LoRA with its weights; make plans with mixer.plan, or of LoraWeight")
        names = [lora.path for lora in self.loras]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise SdloraError(f"{twice} is given twice; give each LoRA once, with the sum of its weights")

    def only(self, components: tuple[str, ...]) -> Plan:
        """The same for some components, the others as the base has them."""
        return replace(self, loras=tuple(lora.only(components) for lora in self.loras))


def lora_weight(name: str, weights: Weights, components: Sequence[str]) -> LoraWeight:
    """An adapter's place in a plan, from what people write; components: the model's."""
    if not isinstance(weights, Mapping):
        return LoraWeight(path=name, unet=weights, text_encoder=weights)
    told = dict(weights)
    settings: dict[str, Any] = {one: told.pop(one) for one in ("blocks", "schedule", "on") if one in told}
    for component in told:
        if component not in components:
            known = ", ".join(components)
            raise SdloraError(f"{name}: the model has no component {component!r}; it has {known}")
    if told:
        settings |= {component: told.get(component, 0.0) for component in components}
    return LoraWeight(path=name, **settings)


def as_dict(lora: LoraWeight) -> dict[str, Any]:
    """For JSON; what is as it is by default is left out."""
    told = {**asdict(lora), "schedule": str(lora.schedule), "blocks": dict(lora.blocks)}
    default = {**asdict(LoraWeight(path="")), "schedule": "", "blocks": {}}
    return {name: value for name, value in told.items() if name in COMPONENTS[:2] or value != default[name]}


def from_dict(told: Mapping[str, Any]) -> LoraWeight:
    """The opposite; TypeError or SdloraError for what is no such thing."""
    return LoraWeight(**told)
