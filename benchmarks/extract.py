"""What an extraction costs on an SDXL-sized model: base and tuned are folders of random weights in float16.

python -m benchmarks.extract                       # every module at rank 64: minutes, and 14 GB of disk for a while
python -m benchmarks.extract --component text_encoder --rank 8   # half a minute, to see that it runs
"""

import argparse
import resource
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import save_file

from sdlora.formats.architectures import sdxl
from sdlora.formats.checkpoints import open_checkpoint
from sdlora.lowrank.truncation import Keep
from sdlora.workbench.extract import Recipe, extract


def model(folder: Path, seed: int) -> Path:
    """A diffusers folder of SDXL's weights; another seed is the same model plus noise of a hundredth."""
    for component, name in {
        "unet": "diffusion_pytorch_model",
        "text_encoder": "model",
        "text_encoder_2": "model",
    }.items():
        generator = torch.Generator().manual_seed(0)
        noise = torch.Generator().manual_seed(seed)
        tensors = {}
        for path, shape in (sdxl().shapes | sdxl().norms).items():
            if path.startswith(f"{component}."):
                weight = torch.randn(shape, generator=generator)
                change = torch.randn(shape, generator=noise) * 0.01 if seed and len(shape) > 1 else 0
                tensors[f"{path.partition('.')[2]}.weight"] = (weight + change).half()
        (folder / component).mkdir(parents=True)
        save_file(tensors, folder / component / f"{name}.safetensors", {"format": "pt"})
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--component", action="append")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder, "base"), Path(folder, "tuned")]
        with get_context("spawn").Pool(1) as apart:  # whose memory does not count
            apart.starmap(model, zip(places, (0, 1), strict=True))
        base, tuned = map(open_checkpoint, places)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        began, modules = time.perf_counter(), 0
        for step in extract(base, tuned, Recipe(Keep(rank=flags.rank), components=flags.component)):
            modules = step.total
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, rank {flags.rank}")
    print(f"{modules} modules in {seconds:.0f} s; peak {peak:.1f} GiB, {before:.1f} before it began")


if __name__ == "__main__":
    main()
