"""What a mix costs on UNets of SD 1.5's and SDXL's sizes with random weights, beside diffusers and peft.

    python -m benchmarks.mixing                                              # SD 1.5 at 256 px, rank 16, attention
    python -m benchmarks.mixing --part steps --model sdxl --rounds 5
    python -m benchmarks.mixing --widths 32,64,128,128 --pixels 64 --rounds 1 --loaded 8    # to see that it runs

Parts: `steps` is time per step; `slider` the time from moving a slider to the first step; `loading` the time to load a
file; `memory` what is held. Each runs in a process of its own and prints a table for the README.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.mixing.models import WIDTHS, Setting, build
from benchmarks.mixing.tables import GIB, machine, memory

TITLES = {
    "steps": "a step, with that many adapters",
    "slider": "from a slider's move to the first step",
    "loading": "loading a file",
    "memory": "anonymous memory",
}
# Where the C library gives memory back to the system between passes, that costs more than what `steps` measures.
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
NEED = 1.8  # times the UNet in float32: mapped or loaded, its attention once more, activations, adapters


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=(*TITLES, "all"), default="all")
    parser.add_argument("--model", choices=tuple(WIDTHS), default="sd15")
    parser.add_argument("--pixels", type=int, default=256, help="picture size (default 256)")
    parser.add_argument("--rounds", type=int, default=10, help="counted rounds (default 10)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--widths", help="channels of the levels (default: the model's)")
    parser.add_argument("--loaded", type=int, default=50, help="adapters that are loaded at most (default 50)")
    parser.add_argument("--stored", choices=("float32", "float16"), default="float32", help="dtype of the model's file")
    parser.add_argument("--folder", help="where model and LoRA files are written and found again (default: temporary)")
    return parser.parse_args()


def measure(part: str, setting: Setting) -> None:
    """Run one part, and print its table."""
    print(f"\n**{TITLES[part]}**\n", flush=True)
    files = Path(setting.folder, "unet").glob("*.safetensors")
    need = NEED * sum(file.stat().st_size for file in files) * (2 if setting.stored == "float16" else 1)
    if need > memory("MemAvailable"):
        print(f"not measured: needs {need / GIB:.0f} GiB of memory, {memory('MemAvailable') / GIB:.0f} are free")
        return
    environment = {**os.environ, **QUIET, **(KEPT if part == "steps" else {})}
    done = subprocess.run([sys.executable, "-m", f"benchmarks.mixing.{part}", setting.json()], env=environment)
    if done.returncode:
        raise SystemExit(f"{part}: ended with {done.returncode}")


def main() -> None:
    flags = read_arguments()
    widths = tuple(int(width) for width in flags.widths.split(",")) if flags.widths else WIDTHS[flags.model]
    with tempfile.TemporaryDirectory() as temporary:
        setting = Setting(
            folder=str(Path(flags.folder or temporary).resolve()),
            model=flags.model,
            widths=widths,
            stored=flags.stored,
            rank=flags.rank,
            pixels=flags.pixels,
            rounds=flags.rounds,
            loaded=flags.loaded,
        )
        build(setting)
        print(f"{flags.model}, {flags.pixels} px, batch 2, rank {flags.rank}, attention, {flags.rounds} rounds")
        print(f"float32, the model's file in {flags.stored}; {machine()}")
        for part in TITLES if flags.part == "all" else (flags.part,):
            measure(part, setting)


if __name__ == "__main__":
    main()
