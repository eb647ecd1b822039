"""What `sdlora conflicts` costs on two LoRAs for SDXL: random factors in float16, written to a temporary folder.

python -m benchmarks.conflicts                      # the UNet's 722 modules and both text encoders', rank 32
python -m benchmarks.conflicts --rank 4 --rounds 1  # seconds, to see that it runs

Each round is a fresh process; importing torch, which every verb that reads tensors pays, is told apart.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

from sdlora.formats.architectures import sdxl
from sdlora.formats.write import write
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import LowRank

UNET = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
TEXT_ENCODERS = ("_proj", "fc1", "fc2")
# Run apart: seconds to import torch, to read and to compare, of the clock; then the processor's for the last two.
APART = """
import sys, time
began = time.perf_counter()
import torch
imported, spent = time.perf_counter(), time.process_time()
from sdlora.workbench.conflicts import conflicts
found = conflicts(sys.argv[1:])
assert len(found.pairs[0].blocks) > 10 and found.equalised
print(imported - began, time.perf_counter() - imported, time.process_time() - spent)
"""


def lora_file(path: Path, rank: int, seed: int) -> int:
    """Write a LoRA of the attention blocks of the UNet and of both text encoders; how many modules it has."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for module, (out, into, *_) in sdxl().shapes.items():
        if module.endswith(UNET if module.startswith("unet.") else TEXT_ENCODERS):
            down = torch.randn(rank, into, generator=generator) / into**0.5
            deltas[module] = LowRank(down, torch.randn(out, rank, generator=generator) * 0.01, rank / 2)
    write(Adapter(deltas), path, dtype=torch.float16)
    return len(deltas)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{name}.safetensors") for name in "AB"]
        modules = [lora_file(file, flags.rank, seed) for seed, file in enumerate(files)][0]
        size = files[0].stat().st_size / 1e6
        for _ in range(flags.rounds):
            command = [sys.executable, "-c", APART, *map(str, files)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rounds.append([float(word) for word in done.stdout.split()])
    imported, clock, processor = (median(column) for column in zip(*rounds, strict=True))
    slowest = max(seconds for _, seconds, _ in rounds)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; two files of {size:.0f} MB, rank {flags.rank}"
    )
    print("\n| modules | importing torch, s | reading and comparing, s | slowest | of the processor, s |")
    print("|---|---|---|---|---|")
    print(f"| {modules} | {imported:.2f} | {clock:.2f} | {slowest:.2f} | {processor:.2f} |")


if __name__ == "__main__":
    main()
