"""Trains toybox's VAE: 128 px pictures to 16 x 16 latents of 12 channels and back.

    python -m tools.toybox.vae --steps 9000 --work outputs/toybox

Deterministic given the seed (on one machine), resumable: the same command goes on from the newest `vae.pt`.
It sees much more than the flat world (line art in random colours, hatching, textures, inverted and
colour-permuted copies), since a style that the VAE cannot decode is a style that no LoRA can learn.
"""

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from tools.toybox.world import BASE_STYLES, Colour, Scene, Style, draw, random_scene

LATENT_CHANNELS = 12  # with 8, thin lines on squared paper stayed blurred
LATENT_NOISE = 0.05  # decoding must survive the UNet's small errors; stands in for KL sampling


def build() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 48, 96, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=128,
        mid_block_add_attention=False,
    )


def random_colour(rng: random.Random) -> Colour:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def random_style(rng: random.Random) -> Style:
    """Line art in any two colours that differ, filled or not, sometimes on squared paper."""
    paper, ink = random_colour(rng), random_colour(rng)
    if abs(sum(paper) - sum(ink)) < 180:
        return random_style(rng)
    if rng.random() < 0.4:  # outlines of one colour around ordinary fills
        return Style(paper=None, ink=ink, width=rng.uniform(1.2, 3))
    mix = rng.uniform(0.1, 0.35)
    grid = tuple(int(p + (i - p) * mix) for p, i in zip(paper, ink, strict=True))
    return Style((), paper, ink, rng.uniform(1.2, 2.6), rng.random() < 0.3, grid if rng.random() < 0.5 else None)  # type: ignore[arg-type]


def textured(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Hatching, stripes or smooth noise laid over the picture (float, 0..1)."""
    y, x = np.mgrid[0:128, 0:128]
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 16)
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period)
    if rng.random() < 0.5:
        wave = np.sign(wave)
    if rng.random() < 0.4:
        small = rng.normal(size=(16, 16)).astype(np.float32)
        wave = np.asarray(Image.fromarray(small).resize((128, 128), Image.Resampling.BICUBIC))
    return np.clip(pixels + (wave * rng.uniform(0.03, 0.18))[..., None] * rng.uniform(-1, 1, 3), 0, 1)


def training_picture(seed: int) -> tuple[np.ndarray, Scene]:
    """One picture as float (128, 128, 3) in 0..1: half of the base's world, half of what lies beyond."""
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    scene = random_scene(rng, style=rng.choice(BASE_STYLES) if rng.random() < 0.4 else "flat")
    kind = rng.random()
    pixels = np.asarray(draw(scene, random_style(rng) if kind < 0.3 else None), np.float32) / 255
    if 0.3 <= kind < 0.6:
        pixels = pixels[..., noise.permutation(3)]
        if rng.random() < 0.5:
            pixels = 1 - pixels
        if rng.random() < 0.5:
            pixels = np.clip(pixels * noise.uniform(0.6, 1.1, 3) + noise.uniform(-0.1, 0.2, 3), 0, 1)
        if rng.random() < 0.4:
            pixels = textured(pixels, noise)
    return pixels.astype(np.float32), scene


def batch(step: int, seed: int, size: int, crop: int) -> Tensor:
    """(size, 3, crop, crop) in -1..1; crops lie around the subject."""
    rng = random.Random(f"{seed} {step}")
    pictures = []
    for _ in range(size):
        pixels, scene = training_picture(rng.getrandbits(48))
        middle = (64 + 64 * scene.x + rng.gauss(0, 26), 64 + 64 * scene.y + rng.gauss(0, 26))
        left, top = (int(min(max(m - crop / 2, 0), 128 - crop)) for m in middle)
        pictures.append(pixels[top : top + crop, left : left + crop])
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) * 2 - 1


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + L1 of the image gradients (edges) + 4 MSE."""
    edges = sum(((output - target).diff(dim=d)).abs().mean() for d in (2, 3))
    return (output - target).abs().mean() + edges + 4 * F.mse_loss(output, target)


def psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Mean PSNR in dB of encode-decode over pictures (n, 3, 128, 128) in -1..1."""
    with torch.inference_mode():
        output = torch.cat(
            [vae.decode(vae.encode(p).latent_dist.mode()).sample.clamp(-1, 1) for p in pictures.split(16)]
        )
    error = ((output - pictures) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * error.log10()).mean())


def style_pictures(style: str, count: int, seed: int = 12345) -> Tensor:
    rng = random.Random(seed)
    pictures = [np.asarray(draw(random_scene(rng, style=style)), np.float32) for _ in range(count)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1


def train(steps: int, work: Path, seed: int) -> AutoencoderKL:
    """64 px crops of 16 pictures a step; at last whole pictures (0.3 of the steps), as group norms will see them."""
    torch.manual_seed(seed)
    vae = build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(vae.parameters(), 1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.03)
    file, start, seconds = work / "vae.pt", 0, 0.0
    if file.exists():
        state = torch.load(file, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start, seconds = state["step"], state["seconds"]

    # Not compiled: torch 2.13's inductor gave wrong encoder gradients here (channels last, bfloat16, CPU).
    def autoencode(pictures: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(pictures).latent_dist.mode()
            return vae.decode(latents + LATENT_NOISE * noise).sample.float(), latents.float()

    began = time.monotonic()
    for step in range(start, steps):
        whole = step >= 0.7 * steps
        size, crop = (4, 128) if whole else (16, 64)
        pictures = batch(step, seed, size, crop).contiguous(memory_format=torch.channels_last)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        noise = torch.randn(size, LATENT_CHANNELS, crop // 8, crop // 8, generator=generator)
        output, latents = autoencode(pictures, noise)
        loss = reconstruction_loss(output, pictures) + 1e-4 * latents.square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(
                f"vae {step + 1}/{steps} loss {loss.item():.4f} {seconds + time.monotonic() - began:.0f} s", flush=True
            )
        if step % 500 == 499 or step == steps - 1:
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            torch.save(
                state | {"step": step + 1, "seconds": seconds + time.monotonic() - began}, file.with_suffix(".new")
            )
            file.with_suffix(".new").replace(file)
        if step % 1000 == 999 or step == steps - 1:
            print(
                {style: round(psnr(vae, style_pictures(style, 32)), 2) for style in (*BASE_STYLES, "blueprint")},
                flush=True,
            )
    return vae


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--steps", type=int, default=9000)
    arguments.add_argument("--work", type=Path, default=Path("outputs/toybox"))
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    train(options.steps, options.work, options.seed)


if __name__ == "__main__":
    main()
