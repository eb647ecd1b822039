"""The contenders, each as people use it: sdlora's mixer, merged and live, and diffusers with peft, live and fused."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.mixing.models import Setting, inputs
from sdlora.mixing.mixer import Mixer

CONTENDERS = ("sdlora merged", "sdlora live", "peft live", "diffusers fused")
LEVEL = 0.3  # the weight of every adapter that nobody moves


def names(numbers: Sequence[int] | range) -> list[str]:
    return [f"lora{number}" for number in numbers]


def load(pipeline: Any, mixer: Mixer | None, setting: Setting, numbers: range) -> None:
    """Load these files by the mixer, or by diffusers where there is none."""
    for number, name in zip(numbers, names(numbers), strict=True):
        if mixer:
            mixer.load(setting.lora(number), name)
        else:
            pipeline.load_lora_weights(setting.lora(number), adapter_name=name)


def apply(mixer: Mixer, count: int, first: float = LEVEL, live: bool = False) -> None:
    """The first `count` adapters of a mixer, the very first at a weight of its own."""
    weights = dict.fromkeys(names(range(count)), LEVEL)
    mixer.apply(mixer.plan({**weights, "lora0": first}), live=live)
    assert mixer.state == ("live" if live else "merged")


def activate(pipeline: Any, count: int, first: float = LEVEL) -> None:
    """The same by diffusers, live."""
    pipeline.set_adapters(names(range(count)), [first, *[LEVEL] * (count - 1)])


def fuse(pipeline: Any, count: int, first: float = LEVEL) -> None:
    """The same by diffusers, into weights that have nothing fused."""
    activate(pipeline, count, first)
    pipeline.fuse_lora(adapter_names=names(range(count)))


def fuse_anew(pipeline: Any, count: int, first: float) -> None:
    """The same where something is fused already."""
    pipeline.unfuse_lora()
    fuse(pipeline, count, first)


def step_of(unet: Any, pixels: int) -> Callable[[], float]:
    """Runs one step and returns its seconds."""
    told = inputs(unet, pixels)

    @torch.inference_mode()
    def step() -> float:
        return seconds(lambda: unet(**told))

    return step


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
