"""Training at real size: an SD-1.5-sized model with random weights on photographs, through `sdlora train`.

    python -m benchmarks.real_size --steps 4 --data ../shared/data/dreambooth/dog6

Beside it, in the same run and measured in the same way, on the same model, pictures and size:
    bare    forward and backward of the frozen UNet alone, no LoRA, no optimizer
    peft    diffusers' modules with peft's LoRA doing the same work: latents and text embeddings encoded once, AdamW
Each part runs in a process of its own and leaves a line per step; whoever started it reads the clock, the CPU time and
the memory. On a machine that others use too, CPU time is the fairer figure.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
DOG = ROOT.parent / "shared" / "data" / "dreambooth" / "dog6"
RANK = 16
GIB = 2**30


@dataclass(frozen=True)
class Measured:
    """Medians over all steps but the first, in seconds; peak resident memory in bytes, in all and while stepping."""

    wall: float
    cpu: float
    peak: int
    stepping: int


def build(folder: Path) -> None:
    """A StableDiffusionPipeline folder of SD 1.5's sizes, random weights in fp16 as SD 1.5 is handed out."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    text = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            sample_size=512,
        ).half(),
        text_encoder=CLIPTextModel(text).half(),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768).half(),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    parameters = sum(p.numel() for p in pipeline.unet.parameters())
    print(f"UNet of {parameters / 1e6:.1f} M parameters in {folder}", flush=True)
    pipeline.save_pretrained(folder)


def byte_tokenizer() -> Any:
    """CLIP's byte-level BPE without merges: every byte is a token."""
    from transformers import CLIPTokenizer

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    characters = [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
    tokens = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocab), str(merges), model_max_length=77)


def bare(model: Path, data: Path, size: int, steps: int) -> Iterator[None]:
    """Forward and backward of the frozen UNet, down to its input."""
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(model / "unet").float().requires_grad_(False).train()
    latents = torch.randn(1, 4, size // 8, size // 8).requires_grad_()
    states = torch.randn(1, 77, 768)
    for _ in range(steps):
        latents.grad = None
        unet(latents, torch.tensor([500]), states).sample.square().mean().backward()
        yield


def peft(model: Path, data: Path, size: int, steps: int) -> Iterator[None]:
    """What diffusers' own LoRA script does, with latents and text embeddings encoded once as sdlora does."""
    import torch
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from torch.nn import functional

    pipeline = StableDiffusionPipeline.from_pretrained(model)
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.float().requires_grad_(False)
    examples = list(encoded(pipeline, data, size))
    unet, scheduler = pipeline.unet, pipeline.scheduler
    del pipeline
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    unet.train()
    for step in range(steps):
        latents, states = examples[step % len(examples)]
        noise, timestep = torch.randn_like(latents), torch.randint(1000, (1,))
        answer = unet(scheduler.add_noise(latents, noise, timestep), timestep, states).sample
        functional.mse_loss(answer, noise).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield


def encoded(pipeline: Any, data: Path, size: int) -> Iterator[tuple[Any, Any]]:
    """Latents and text embeddings of each picture."""
    import torch
    from PIL import Image, ImageOps

    with torch.no_grad():
        for path in sorted(data.glob("*.jpg")):
            image = ImageOps.fit(Image.open(path).convert("RGB"), (size, size))
            pixels = pipeline.image_processor.preprocess(image)
            latents = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
            yield latents, pipeline.encode_prompt(path.with_suffix(".txt").read_text(), "cpu", 1, False)[0]


def measure(command: list[str], lines: Path, stdout: Path) -> Measured:
    """Run a command that appends a line per step to a file, and watch it."""
    with stdout.open("w") as out:
        process = psutil.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        times, peak, stepping = [], 0, 0
        while process.poll() is None:
            try:
                memory, used = process.memory_info().rss, process.cpu_times()
            except psutil.NoSuchProcess:
                break
            count = len(lines.read_text().splitlines()) if lines.exists() else 0
            peak = max(peak, memory)
            stepping = max(stepping, memory) if count else 0
            times += [(time.monotonic(), used.user + used.system)] * (count - len(times))
            time.sleep(0.05)
    if process.wait() != 0 or len(times) < 2:
        sys.exit(f"{' '.join(command)} failed:\n{stdout.read_text()[-2000:]}")
    pairs = list(zip(times, times[1:], strict=False))
    wall, cpu = (statistics.median(after[i] - before[i] for before, after in pairs) for i in (0, 1))
    return Measured(wall, cpu, peak, stepping)


def commands(arguments: argparse.Namespace, work: Path, model: Path) -> dict[str, tuple[list[str], Path]]:
    """What to run for each part, and the file where it leaves a line per step."""
    told = ["--steps", str(arguments.steps), "--model", str(model), "--data", str(arguments.data)]
    told += ["--size", str(arguments.size)]
    own = [sys.executable, "-m", "benchmarks.real_size", *told, "--lines"]
    train = [sys.executable, "-m", "sdlora", "train", str(arguments.data), "--model", str(model)]
    train += ["--output", str(work / "run"), "--resolution", str(arguments.size), "--steps", str(arguments.steps)]
    train += ["--rank", str(RANK), "--tracker", "none", "--save-every", "0"]
    parts = {part: ([*own, str(work / f"{part}.txt"), "--part", part], work / f"{part}.txt") for part in PARTS}
    return {"bare": parts["bare"], "sdlora": (train, work / "run" / "metrics.jsonl"), "peft": parts["peft"]}


PARTS = {"bare": bare, "peft": peft}


def report(results: dict[str, Measured]) -> None:
    """One table; ratios are to the bare forward and backward pass."""
    base = results["bare"]
    print("part     s/step  CPU s/step  ratio (CPU)  peak GiB  while stepping")
    for part, one in results.items():
        figures = f"{one.wall:6.2f}  {one.cpu:10.2f}  {one.cpu / base.cpu:11.2f}"
        print(f"{part:7}  {figures}  {one.peak / GIB:8.2f}  {one.stepping / GIB:14.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=4, help="steps of each part; the first one is not counted")
    parser.add_argument("--size", type=int, default=256, help="edge of the pictures in pixels")
    parser.add_argument("--data", type=Path, default=DOG, help="folder of captioned photographs")
    parser.add_argument("--model", type=Path, help="where the model is, or is kept (default: a temporary folder)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        for _ in PARTS[arguments.part](arguments.model, arguments.data, arguments.size, arguments.steps):
            with arguments.lines.open("a") as file:
                file.write("step\n")
        return
    work = Path(tempfile.mkdtemp(prefix="sdlora-real-size-"))
    try:
        model = (arguments.model or work / "model").resolve()
        if not (model / "model_index.json").exists():
            build(model)
        results = {}
        for part, (command, lines) in commands(arguments, work, model).items():
            results[part] = measure(command, lines, work / f"{part}.log")
            print(f"{part} measured", flush=True)
        report(results)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
