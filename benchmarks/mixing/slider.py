"""From a slider's move to the first step, with 1, 3 and 8 adapters of which one is moved.

diffusers' is what fused weights need: unfuse_lora, set_adapters, fuse_lora. The contenders have a pipeline each, one
after another; sdlora's two ways take turns on one. "From the base" is the same with nothing applied before: layers are
put in, untouched weights looked up in the model's file. The step that follows is timed too, for what live is paid with.
"""

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.mixing.contenders import apply, fuse, load, seconds, step_of
from benchmarks.mixing.models import Setting, pipeline_of, setting_of
from benchmarks.mixing.tables import table
from sdlora.mixing.mixer import Mixer


@dataclass(frozen=True)
class Times:
    """Seconds, one figure a round."""

    first: list[float] = field(default_factory=list)  # from the base
    move: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)


def moved(times: Times, off: Callable[[], object], to: Callable[[float], object], step: Callable[[], float]) -> None:
    """One round, which begins and ends with nothing applied; to: apply with that weight of the first adapter."""
    times.first.append(seconds(lambda: to(0.5)))
    step()
    times.move.append(seconds(lambda: to(0.7)))
    times.step.append(step())
    off()


def ours(setting: Setting, count: int) -> tuple[dict[str, Times], str]:
    """Times by way, and what became of the untouched weights."""
    pipeline = pipeline_of(setting)
    mixer, step = Mixer(pipeline), step_of(pipeline.unet, setting.pixels)
    load(pipeline, mixer, setting, range(count))
    times = {"sdlora merged": Times(), "sdlora live": Times()}
    for _ in range(setting.rounds):
        for name, one in times.items():
            moved(one, lambda: mixer.set({}), lambda first, live="live" in name: apply(mixer, count, first, live), step)  # type: ignore[misc]
    apply(mixer, count)
    copied = mixer._base.copied
    return times, f"{copied / 1e6:.0f} MB copied" if copied else "mapped from the model's file"


def theirs(setting: Setting, count: int) -> dict[str, Times]:
    pipeline = pipeline_of(setting)
    load(pipeline, None, setting, range(count))
    times, fused = Times(), False

    def off() -> None:
        nonlocal fused
        pipeline.unfuse_lora()
        fused = False

    def to(first: float) -> None:
        nonlocal fused
        if fused:
            off()
        fuse(pipeline, count, first)
        fused = True

    for _ in range(setting.rounds):
        moved(times, off, to, step_of(pipeline.unet, setting.pixels))
    return {"diffusers fused": times}


def rows(found: dict[str, Times], count: int) -> list[tuple[Any, ...]]:
    """The ratio is of the medians of the moves, to sdlora merged."""
    base = median(found["sdlora merged"].move)
    return [
        (f"{name}, {count}", median(one.move), min(one.move), median(one.move) / base, median(one.first))
        + (median(one.step),)
        for name, one in found.items()
    ]


def main(setting: Setting) -> None:
    told, where = [], ""
    for count in setting.counts:
        found, where = ours(setting, count)
        gc.collect()  # pipelines hold themselves in circles
        found |= theirs(setting, count)
        gc.collect()
        told += rows(found, count)
    head = ("adapters", "move, median s", "fastest s", "to merged", "from the base, s", "a step then, s")
    print(f"untouched weights: {where}\n\n{table(head, told)}")


if __name__ == "__main__":
    main(setting_of(sys.argv[1]))
