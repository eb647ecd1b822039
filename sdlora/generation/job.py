"""A job: one request for pictures, an immutable value. Rendering is a function of it, and every picture carries it."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdlora.errors import SdloraError, nearest
from sdlora.formats.block_weights import PRESETS, read_factors
from sdlora.formats.sources import split_path
from sdlora.mixing.plan import LoraWeight, Plan
from sdlora.mixing.schedule import parse_schedule

# Name ▶ (diffusers class, settings over the model's own, the name A1111 shows). "default" is the model's own scheduler.
SCHEDULERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "ddim": ("DDIMScheduler", {}, "DDIM"),
    "ddpm": ("DDPMScheduler", {}, "DDPM"),
    "euler": ("EulerDiscreteScheduler", {}, "Euler"),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}, "Euler a"),
    "heun": ("HeunDiscreteScheduler", {}, "Heun"),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}, "DPM++ 2M"),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "DPM++ 2M Karras"),
    "unipc": ("UniPCMultistepScheduler", {}, "UniPC"),
}


# How several LoRAs come together. sum: all in each step; switch: one after the other; composite: each by itself in each
# step, and the mean of what they predict (the last two: LoRA Switch and LoRA Composite, arXiv:2402.16843).
COMPOSITIONS = ("sum", "switch", "composite")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to generate. Values out of bounds raise SdloraError.

    prompt, negative_prompt: in the language of docs/prompts.md, LoRA tags aside, which stand in `loras`;
    compose: one of COMPOSITIONS; switch_every: steps after which "switch" goes on to the next LoRA;
    partial: take what fits of LoRAs that are for another model or not whole;
    width, height: pixels, None for the model's own size; guidance_scale 1 means no guidance;
    picture i of `count` has the seed seed + i and does not depend on count.
    """

    prompt: str
    negative_prompt: str = ""
    model: str = "toybox"
    loras: tuple[LoraWeight, ...] = ()
    compose: str = "sum"
    switch_every: int = 1
    partial: bool = False
    seed: int = 0
    steps: int = 20
    guidance_scale: float = 5.0
    scheduler: str = "default"
    width: int | None = None
    height: int | None = None
    count: int = 1

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt", "model", "scheduler", "compose"):
            if not isinstance(getattr(self, name), str):
                raise SdloraError(f"the {name.replace('_', ' ')} is {getattr(self, name)!r}; it must be text")
        for name in ("prompt", "negative_prompt"):
            if any("\ud800" <= character <= "\udfff" for character in getattr(self, name)):
                raise SdloraError(f"the {name.replace('_', ' ')} holds bytes that are no text; write it in UTF-8")
        _check_number("seed", self.seed, 0, 2**63 - 1, whole=True)
        _check_number("steps", self.steps, 1, 1000, whole=True)
        _check_number("count", self.count, 1, 10_000, whole=True)
        if self.seed + self.count > 2**63:
            raise SdloraError(f"seed {self.seed} has no {self.count} seeds from it on; it must be below {2**63}")
        _check_number("guidance scale", self.guidance_scale, 0, 100)
        for name in ("width", "height"):
            value = getattr(self, name)
            if value is not None:
                _check_number(name, value, 8, 4096, whole=True)
                if value % 8:
                    raise SdloraError(f"{name} is {value}; it must be a multiple of 8, such as {round(value / 8) * 8}")
        _check_number("switch_every", self.switch_every, 1, 1000, whole=True)
        if self.compose not in COMPOSITIONS:
            raise SdloraError(f"compose {self.compose!r} is unknown; choose one of {', '.join(COMPOSITIONS)}")
        if self.scheduler not in ("default", *SCHEDULERS):
            names = ", ".join(("default", *SCHEDULERS))
            raise SdloraError(f"scheduler {self.scheduler!r} is unknown{nearest(self.scheduler, SCHEDULERS)}: {names}")

    @property
    def plan(self) -> Plan:
        """What is mixed into the base."""
        return Plan(self.model, self.loras)


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of "512x768" or "512"."""
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) > 2 or not all(side.strip().isdecimal() and len(side) < 9 for side in sides):
        raise SdloraError(f"size {text!r} is not understood; write 512 or 512x768")
    return int(sides[0]), int(sides[-1])


# What can be said of a LoRA by name on the command line, and the field that it sets. lbw is the word of tags.
NAMED = {
    "unet": "unet",
    "te": "text_encoder",
    "te2": "text_encoder_2",
    "blocks": "blocks",
    "lbw": "blocks",
    "schedule": "schedule",
}


def parse_lora(text: str, presets: Mapping[str, str] = PRESETS) -> LoraWeight:
    """FILE, FILE:WEIGHT or FILE:UNET:TEXT_ENCODER, and behind that, in any order, the words of NAMED, as in te=0.5.

    One number is the text encoders' too, unless te= says theirs; unet= alone leaves them at 1. In blocks= and schedule=
    @ may stand for a colon, as in tags. Colons may stand in the name of a file, which ends in .safetensors, or of a
    folder. presets: those of blocks=. SdloraError: what is not understood, or said twice.
    """
    path, rest = split_path(text)
    bare, *named = re.split(r":(?=[a-z_0-9]+=)", rest)
    if len(bare.split(":")) > 3 or (rest and not rest.startswith(":")):
        raise SdloraError(f"--lora {text} is not understood; write FILE:0.8 or FILE:0.8:0.5 (UNet, text encoder)")
    values = [_weight(text, value) for value in bare.split(":")[1:]]
    settings: dict[str, Any] = dict(zip(("unet", "text_encoder"), values, strict=False))
    for name, _, value in (one.partition("=") for one in named):
        field = NAMED.get(name)
        if field is None:
            raise SdloraError(f"--lora {text}: {name}= is unknown{nearest(name, NAMED)}; there are {', '.join(NAMED)}")
        if field in settings:
            raise SdloraError(f"--lora {text}: {name}= is given already, by place or by name; give it once")
        settings[field] = _setting(text, field, value, presets)
    settings.setdefault("text_encoder", values[0] if values else 1.0)
    return LoraWeight(path=path, **settings)


def _setting(text: str, field: str, value: str, presets: Mapping[str, str]) -> Any:
    if field == "blocks":
        return read_factors(value.replace("@", ":"), presets)
    if field == "schedule":
        return parse_schedule(value.replace("@", ":"))
    return _weight(text, value)


def _weight(text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise SdloraError(f"--lora {text}: {value!r} is no weight; write FILE:0.8 or FILE:0.8:0.5") from None


def _check_number(name: str, value: Any, low: float, high: float, whole: bool = False) -> None:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or value != value or abs(value) == math.inf:
        raise SdloraError(f"{name} is {value!r}; it must be a {'whole ' if whole else 'finite '}number")
    if not low <= value <= high:
        raise SdloraError(f"{name} is {value}; it must lie between {low} and {high}")
