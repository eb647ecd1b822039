"""What loading a LoRA file costs on an SDXL-sized pipeline: ours and diffusers', with more and more loaded already.

    python -m benchmarks.loading                      # rank 32 on the UNet's transformers, some 170 MB in float16
    python -m benchmarks.loading --rank 4 --loads 3   # half a minute, to see that it runs

Each contender loads the same file under new names. The weights of the models are never touched, so they need no memory
and their values do not matter. "reading the bytes" is what nobody can beat.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora.formats.architectures import sdxl
from sdlora.formats.read import describe, read
from sdlora.formats.write import write
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import LowRank
from sdlora.mixing.mixer import Mixer
from sdlora.models.load import load_pipeline

UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
OPENCLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def pipeline() -> StableDiffusionXLPipeline:
    """SDXL at full size, with weights that nobody has written to and that therefore take no memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)  # type: ignore[arg-type]
        first = CLIPTextModel(CLIPTextConfig(**CLIP_L))  # type: ignore[arg-type]
        second = CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=1280, **OPENCLIP_G))  # type: ignore[arg-type]
    parts: list[nn.Module] = [part.half().to_empty(device="cpu") for part in (unet, first, second)]
    words = load_pipeline("toybox").tokenizer
    return StableDiffusionXLPipeline(None, parts[1], parts[2], words, words, parts[0], None, add_watermarker=False)  # type: ignore[arg-type]


def lora_file(folder: Path, rank: int) -> Path:
    """A LoRA as kohya's trainer writes it by default: 722 modules of the UNet."""
    ends = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
    deltas = {}
    for path, (out, into, *_) in sdxl().shapes.items():
        if path.startswith("unet.") and path.endswith(ends):
            deltas[path] = LowRank(torch.randn(rank, into) / into**0.5, torch.randn(out, rank) * 0.01, rank / 2)
    path = folder / "lora.safetensors"
    write(Adapter(deltas), path, dtype=torch.float16)
    return path


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--loads", type=int, default=8)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = lora_file(Path(folder), flags.rank)
        mixer, theirs = Mixer(pipeline()), pipeline()
        file.read_bytes()  # into the system's cache, for all alike
        size = file.stat().st_size / 1e6
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {size:.0f} MB, 722 modules")
        print(f"reading the bytes  {timed(file.read_bytes):7.3f} s")
        print(f"its header alone   {timed(lambda: describe(file)):7.3f} s")
        print(f"read to an adapter {timed(lambda: read(file, sdxl())):7.3f} s")
        print(f"\n{'loaded before':>14}{'sdlora s':>10}{'diffusers s':>13}{'ratio':>8}")
        for i in range(flags.loads):
            ours = timed(lambda i=i: mixer.load(file, name=f"lora{i}"))  # type: ignore[misc]
            peer = timed(lambda i=i: theirs.load_lora_weights(str(file), adapter_name=f"lora{i}"))  # type: ignore[misc]
            print(f"{i:14}{ours:10.3f}{peer:13.3f}{peer / ours:8.1f}")


if __name__ == "__main__":
    main()
