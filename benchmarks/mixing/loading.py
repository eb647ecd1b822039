"""What loading a LoRA file costs, the first and with 50 loaded already.

Every load reads a file whose content is not in memory as an adapter; the bytes are in the system's cache for all alike.
"Reading the bytes" is what nobody can beat.
"""

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.mixing.contenders import load, names, seconds
from benchmarks.mixing.models import Setting, pipeline_of, setting_of
from benchmarks.mixing.tables import table
from sdlora.mixing.mixer import Mixer


def load_times(one: Callable[[range], object], away: Callable[[str], object], setting: Setting) -> list[list[float]]:
    """Seconds of loading the first and the last file, each `rounds` times, with all others loaded in between."""
    first, last, times = range(1), range(setting.loaded, setting.loaded + 1), []
    for number in (first, last):
        found = []
        for _ in range(setting.rounds + 1):
            gc.collect()
            found.append(seconds(lambda number=number: one(number)))  # type: ignore[misc]
            away(names(number)[0])
        times.append(found[1:])  # the very first also pays for imports
        if number == first:
            one(range(setting.loaded))
    return times


def ours(setting: Setting) -> list[list[float]]:
    pipeline = pipeline_of(setting)
    mixer = Mixer(pipeline, cache=0)  # what has been unloaded is read again
    return load_times(lambda numbers: load(pipeline, mixer, setting, numbers), mixer.unload, setting)


def theirs(setting: Setting) -> list[list[float]]:
    pipeline: Any = pipeline_of(setting)

    def away(name: str) -> None:
        """The last adapter takes its layers along."""
        if pipeline.get_list_adapters()["unet"] == [name]:
            pipeline.unload_lora_weights()
        else:
            pipeline.delete_adapters(name)

    return load_times(lambda numbers: load(pipeline, None, setting, numbers), away, setting)


def main(setting: Setting) -> None:
    file = Path(setting.lora(0))
    file.read_bytes()
    bytes_alone = median(seconds(file.read_bytes) for _ in range(5))
    mine = ours(setting)
    gc.collect()
    peer = theirs(setting)
    print(f"files of {file.stat().st_size / 1e6:.0f} MB; reading the bytes takes {bytes_alone * 1e3:.1f} ms\n")
    told = []
    for before, one, other in zip((0, setting.loaded), mine, peer, strict=True):
        told.append((before, median(one), min(one), median(other), min(other), median(other) / median(one)))
    head = ("loaded before", "sdlora, median s", "fastest s", "diffusers, median s", "fastest s", "ratio of medians")
    print(table(head, told))


if __name__ == "__main__":
    main(setting_of(sys.argv[1]))
