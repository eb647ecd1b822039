"""Teaches the decoder of toybox's VAE squared paper and the UNet's small errors; the encoder stays as it is.

    python -m tools.toybox.decoder --steps 2500 --work outputs/toybox

Needs `vae_standardised.pt` of tools.toybox.base, writes `vae_final.pt`. Since the latents stay what they were, this
can be done before, after or beside the training of the UNet. Deterministic given the seed, resumable.
"""

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from tools.toybox import vae
from tools.toybox.world import BASE_STYLES, STYLES, Style, draw, random_scene

SQUARED_SHARE = 0.5  # of the pictures; the others are those that the whole VAE was trained on, half of them base's
NOISE = (0.5, 3.0)  # range of the noise on the latents, in units of what the VAE was trained with


def squared_paper(rng: random.Random) -> Style:
    """A line drawing in any three colours on squared paper."""
    while True:
        style = vae.random_style(rng)
        if style.paper is not None and style.ink is not None:
            mix = rng.uniform(0.1, 0.4)
            grid = tuple(int(p + (i - p) * mix) for p, i in zip(style.paper, style.ink, strict=True))
            return Style((), style.paper, style.ink, style.width, rng.random() < 0.2, grid)  # type: ignore[arg-type]


def picture(rng: random.Random) -> np.ndarray:
    """(128, 128, 3) in 0..1."""
    if rng.random() < SQUARED_SHARE:
        return np.asarray(draw(random_scene(rng), squared_paper(rng)), np.float32) / 255
    if rng.random() < 0.5:
        return np.asarray(draw(random_scene(rng, style=rng.choice(BASE_STYLES))), np.float32) / 255
    return vae.training_picture(rng.getrandbits(48))[0]


def batch(step: int, seed: int, size: int) -> Tensor:
    """(size, 3, 128, 128) in -1..1."""
    rng = random.Random(f"decoder {seed} {step}")
    return torch.from_numpy(np.stack([picture(rng) for _ in range(size)])).permute(0, 3, 1, 2) * 2 - 1


def train(steps: int, size: int, rate: float, work: Path, seed: int) -> AutoencoderKL:
    model = vae.build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.load_state_dict(torch.load(work / "vae_standardised.pt", weights_only=True))
    model.requires_grad_(False)
    trained = [*model.decoder.parameters(), *model.post_quant_conv.parameters()]  # type: ignore[union-attr]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    file, start, seconds = work / "decoder.pt", 0, 0.0
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start, seconds = state["step"], state["seconds"]
    began = time.monotonic()
    for step in range(start, steps):
        pictures = batch(step, seed, size).contiguous(memory_format=torch.channels_last)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                posterior = model.encode(pictures).latent_dist
            spread = NOISE[0] + (NOISE[1] - NOISE[0]) * torch.rand(size, 1, 1, 1, generator=generator)
            noise = torch.randn(posterior.mean.shape, generator=generator)
            output = model.decode(posterior.mean + spread * posterior.std * noise).sample.float()
        loss = vae.reconstruction_loss(output, pictures)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            passed = seconds + time.monotonic() - began
            print(f"decoder {step + 1}/{steps} loss {loss.item():.4f} {passed:.0f} s", flush=True)
        if step % 250 == 249 or step == steps - 1:
            state = {"vae": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            torch.save(
                state | {"step": step + 1, "seconds": seconds + time.monotonic() - began}, file.with_suffix(".new")
            )
            file.with_suffix(".new").replace(file)
            print({style: round(vae.psnr(model, vae.style_pictures(style, 32)), 2) for style in STYLES}, flush=True)
    torch.save(model.state_dict(), work / "vae_final.pt")
    return model


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=2500)
    arguments.add_argument("--batch", type=int, default=4)
    arguments.add_argument("--rate", type=float, default=6e-4)
    arguments.add_argument("--work", type=Path, default=Path("outputs/toybox"))
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    train(options.steps, options.batch, options.rate, options.work, options.seed)


if __name__ == "__main__":
    main()
