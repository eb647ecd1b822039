"""From a slider's move to the first step, with 1, 3 and 8 adapters of which one is moved.

diffusers' is what fused weights need: unfuse_lora, set_adapters, fuse_lora. The contenders have a pipeline each, one
after another; sdlora's two ways take turns on one. "From the base" is the same with nothing applied before: layers are
put in, untouched weights looked up in the model's file. The step that follows is timed too, for what live is paid with.
"""

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median

from benchmarks.mixing.contenders import apply, fuse, fuse_anew, load, seconds, step_of
from benchmarks.mixing.models import Setting, pipeline_of, setting_of
from benchmarks.mixing.tables import table
from sdlora.mixing.mixer import Mixer

SLIDER = (0.5, 0.7)  # the weight of the first adapter, before the move and after it
Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Seconds, one figure a round."""

    first: list[float] = field(default_factory=list)  # from the base
    move: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)

    def round(self, begin: Call, move: Call, end: Call, step: Callable[[], float]) -> None:
        """One figure more of each; nothing is applied before and after."""
        self.first.append(seconds(begin))
        step()
        self.move.append(seconds(move))
        self.step.append(step())
        end()


def ours(setting: Setting, count: int) -> tuple[dict[str, Times], str]:
    """Times by way, and what became of the untouched weights."""
    pipeline = pipeline_of(setting)
    mixer, step = Mixer(pipeline), step_of(pipeline.unet, setting.pixels)
    load(pipeline, mixer, setting, range(count))
    times = {"sdlora merged": Times(), "sdlora live": Times()}
    off = partial(mixer.set, {})
    for _ in range(setting.rounds):
        for name, one in times.items():
            live = name == "sdlora live"
            begin, move = (partial(apply, mixer, count, first, live) for first in SLIDER)
            one.round(begin, move, off, step)
    apply(mixer, count)
    copied = mixer._base.copied
    return times, f"{copied / 1e6:.0f} MB copied" if copied else "mapped from the model's file"


def theirs(setting: Setting, count: int) -> Times:
    pipeline = pipeline_of(setting)
    step, times = step_of(pipeline.unet, setting.pixels), Times()
    load(pipeline, None, setting, range(count))
    before, after = SLIDER
    begin, move = partial(fuse, pipeline, count, before), partial(fuse_anew, pipeline, count, after)
    for _ in range(setting.rounds):
        times.round(begin, move, pipeline.unfuse_lora, step)
    return times


def main(setting: Setting) -> None:
    rows, where = [], ""
    for count in setting.counts:
        found, where = ours(setting, count)
        gc.collect()  # pipelines hold themselves in circles
        found["diffusers fused"] = theirs(setting, count)
        gc.collect()
        merged = median(found["sdlora merged"].move)
        for name, times in found.items():
            first, move, step = median(times.first), median(times.move), median(times.step)
            rows.append((f"{name}, {count}", move, min(times.move), f"{move / merged:.2f}", first, step))
    head = ("adapters", "move, median s", "fastest s", "to merged", "from the base, s", "a step then, s")
    print(f"untouched weights: {where}\n\n{table(head, rows)}")


if __name__ == "__main__":
    main(setting_of(sys.argv[1]))
