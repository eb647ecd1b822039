"""A job: one request for pictures, an immutable value. Rendering is a function of it, and every picture carries it."""

import math
from dataclasses import dataclass
from typing import Any

from sdlora.errors import SdloraError, nearest

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


@dataclass(frozen=True, kw_only=True)
class LoraWeight:
    """A LoRA file and its weights. sha256 is filled in when the file is read."""

    path: str
    unet: float = 1.0
    text_encoder: float = 1.0
    sha256: str = ""

    def __post_init__(self) -> None:
        for name in ("unet", "text_encoder"):
            _check_number(f"weight of {self.path} ({name})", getattr(self, name), -math.inf, math.inf)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to generate. Values out of bounds raise SdloraError.

    partial: take what fits of LoRAs that are for another model or not whole;
    width, height: pixels, None for the model's own size; guidance_scale 1 means no guidance;
    picture i of `count` has the seed seed + i and does not depend on count.
    """

    prompt: str
    negative_prompt: str = ""
    model: str = "toybox"
    loras: tuple[LoraWeight, ...] = ()
    partial: bool = False
    seed: int = 0
    steps: int = 20
    guidance_scale: float = 5.0
    scheduler: str = "default"
    width: int | None = None
    height: int | None = None
    count: int = 1

    def __post_init__(self) -> None:
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
        if self.scheduler not in ("default", *SCHEDULERS):
            names = ", ".join(("default", *SCHEDULERS))
            raise SdloraError(f"scheduler {self.scheduler!r} is unknown{nearest(self.scheduler, SCHEDULERS)}: {names}")


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of "512x768" or "512"."""
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) > 2 or not all(side.strip().isdecimal() and len(side) < 9 for side in sides):
        raise SdloraError(f"size {text!r} is not understood; write 512 or 512x768")
    return int(sides[0]), int(sides[-1])


def parse_lora(text: str) -> LoraWeight:
    """FILE, FILE:WEIGHT or FILE:UNET:TEXT_ENCODER. Colons may stand in the file's name, which ends in .safetensors."""
    cut = text.lower().rfind(".safetensors")
    path, rest = (text, "") if cut < 0 else (text[: cut + 12], text[cut + 12 :])
    if cut < 0 and ":" in text:
        path, _, rest = text.partition(":")
        rest = f":{rest}"
    weights = rest.split(":")[1:]
    try:
        values = [float(weight) for weight in weights]
    except ValueError:
        raise SdloraError(f"--lora {text}: {rest[1:]!r} is no weight; write FILE:0.8 or FILE:0.8:0.5") from None
    if len(values) > 2 or (rest and not rest.startswith(":")):
        raise SdloraError(f"--lora {text} is not understood; write FILE:0.8 or FILE:0.8:0.5 (UNet, text encoder)")
    unet = values[0] if values else 1.0
    return LoraWeight(path=path, unet=unet, text_encoder=values[1] if len(values) > 1 else unet)


def _check_number(name: str, value: Any, low: float, high: float, whole: bool = False) -> None:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or value != value or abs(value) == math.inf:
        raise SdloraError(f"{name} is {value!r}; it must be a {'whole ' if whole else 'finite '}number")
    if not low <= value <= high:
        raise SdloraError(f"{name} is {value}; it must lie between {low} and {high}")
