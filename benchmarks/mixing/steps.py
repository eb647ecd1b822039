"""What a step costs with adapters: none, merged, live, and peft's.

Rounds are interleaved, so that whatever else the machine does meets all alike, and each begins with another contender;
the first round is not counted. In each state the first pass is not counted: it also pays for the memory that entering
the state let go.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import median
from typing import Any

from benchmarks.mixing.contenders import activate, apply, load, step_of
from benchmarks.mixing.models import Setting, pipeline_of, setting_of
from benchmarks.mixing.tables import table
from sdlora.mixing.mixer import Mixer

State = Callable[[], AbstractContextManager[None]]  # brings the UNet into a state, and back


def states(pipeline: Any, mixer: Mixer, setting: Setting) -> dict[str, State]:
    """The contenders: each brings the one UNet into a state and leaves it as it was."""

    def ours(count: int, live: bool) -> State:
        @contextmanager
        def state() -> Iterator[None]:
            apply(mixer, count, live=live)
            yield
            mixer.set({})

        return state

    def pefts(count: int) -> State:
        @contextmanager
        def state() -> Iterator[None]:
            load(pipeline, None, setting, range(count))
            activate(pipeline, count)
            yield
            pipeline.unload_lora_weights()

        return state

    found: dict[str, State] = {"none": nullcontext, "none again": nullcontext}
    found |= {f"sdlora merged, {count}": ours(count, live=False) for count in setting.counts}
    found |= {f"sdlora live, {count}": ours(count, live=True) for count in setting.counts}
    return found | {f"peft live, {count}": pefts(count) for count in setting.counts}


def step_times(step: Callable[[], float], wanted: Mapping[str, State], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step by contender, one figure a round."""
    times: dict[str, list[float]] = {name: [] for name in wanted}
    order = list(wanted)
    for number in range(rounds + 1):
        for name in order:
            with wanted[name]():
                step()
                elapsed = step()
            if number:
                times[name].append(elapsed)
        order = order[1:] + order[:1]
    return times


def main(setting: Setting) -> None:
    pipeline = pipeline_of(setting)
    mixer = Mixer(pipeline)
    load(pipeline, mixer, setting, range(setting.applied))
    step = step_of(pipeline.unet, setting.pixels)
    times = step_times(step, states(pipeline, mixer, setting), setting.rounds)
    none = times["none"]
    rows = []
    for name, values in times.items():
        ratios = [mine / base for mine, base in zip(values, none, strict=True)]
        rows.append((name, median(values), min(values), median(ratios), min(values) / min(none)))
    print(table(("adapters", "median s", "fastest s", "to none, median of ratios", "to none, fastest"), rows))


if __name__ == "__main__":
    main(setting_of(sys.argv[1]))
