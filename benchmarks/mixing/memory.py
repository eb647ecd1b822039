"""The memory that contenders need, each in a process of its own, with a step taken in each state.

"Anonymous" is what belongs to the process alone. Pages of mapped files, such as the model's, are not in it: the system
takes them back when it needs them. "Resident" counts them, a page that is mapped twice twice.
"""

import ctypes
import gc
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.mixing.contenders import CONTENDERS, activate, apply, fuse, load, step_of
from benchmarks.mixing.models import Setting, pipeline_of, setting_of
from benchmarks.mixing.tables import GIB, field, table
from sdlora.mixing.mixer import Mixer

EVERY = 0.01  # seconds between two looks at a process


def held() -> int:
    """Anonymous bytes of this process, without what the C library keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return field(Path("/proc/self/smaps_rollup").read_text(), "Anonymous")


def run(contender: str, setting: Setting) -> None:
    """Print what is held with the base alone, with adapters applied, and with many more loaded."""
    pipeline = pipeline_of(setting)
    mixer = Mixer(pipeline) if contender.startswith("sdlora") else None
    step, count = step_of(pipeline.unet, setting.pixels), setting.applied
    step()
    told = [held()]
    load(pipeline, mixer, setting, range(count))
    if mixer:
        apply(mixer, count, live=contender == "sdlora live")
    elif contender == "diffusers fused":
        fuse(pipeline, count)
    else:
        activate(pipeline, count)
    step()
    told.append(held())
    if contender == "diffusers fused":
        pipeline.unfuse_lora()  # nothing can be loaded while weights are fused
    load(pipeline, mixer, setting, range(count, setting.loaded))
    if contender == "diffusers fused":
        fuse(pipeline, count)
    elif not mixer:
        activate(pipeline, count)  # loading made each new one active
    told.append(held())
    print(json.dumps([*told, field(Path("/proc/self/status").read_text(), "VmHWM")]))


def measured(contender: str, setting: Setting) -> list[int]:
    """Bytes: the three that `run` prints, the anonymous peak and the resident one."""
    command = [sys.executable, "-m", "benchmarks.mixing.memory", setting.json(), contender]
    process, peak = subprocess.Popen(command, stdout=subprocess.PIPE, text=True), 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        told = status.read_text()
        if "RssAnon" in told:  # gone when the process is
            peak = max(peak, field(told, "RssAnon"))
        time.sleep(EVERY)
    output = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{contender}: ended with {process.returncode}")
    *states, resident = json.loads(output.splitlines()[-1])
    return [*states, peak, resident]


def main(setting: Setting) -> None:
    rows = [(name, *(f"{size / GIB:.2f}" for size in measured(name, setting))) for name in CONTENDERS]
    applied, loaded = f"{setting.applied} applied", f"{setting.loaded} loaded"
    print(table(("GiB", "base alone", applied, f"{applied}, {loaded}", "peak", "resident, peak"), rows))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        run(sys.argv[2], setting_of(sys.argv[1]))
    else:
        main(setting_of(sys.argv[1]))
