"""Finishes toybox's VAE: it learns squared paper and to bear the UNet's small errors, and the base's latents stay.

    python -m tools.toybox.finish --work outputs/toybox

Four phases: the decoder alone; all of it, the encoder tied to what it said before about pictures in the base's
styles; at last the same twice more for the squared error. Needs `vae_standardised.pt` of tools.toybox.base, writes
`vae_final.pt`. Since the latents that the UNet knows do not change, this can be done before, after or beside its
training. Deterministic given the seed, resumable.
"""

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from tools.toybox import vae
from tools.toybox.world import BASE_STYLES, STYLES, Style, draw, random_scene

BATCH = 4
SQUARED_SHARE = 0.5  # of the pictures; the others are half the base's, half those that the whole VAE was trained on
ANCHOR = 5.0  # weight of how far the base's latents move


@dataclass(frozen=True)
class Phase:
    """noise: range of the noise on the latents, in units of what the VAE was trained with; mse: its further weight."""

    name: str
    steps: int
    rate: float
    noise: tuple[float, float]
    encoder: bool
    mse: float = 0.0


PHASES = (
    Phase("decoder", 2500, 6e-4, (0.5, 3.0), False),
    Phase("whole", 3500, 4e-4, (0.5, 2.0), True),
    Phase("settle", 1500, 2e-4, (0.5, 1.0), True, mse=12.0),
    Phase("sharpen", 2500, 3e-4, (0.2, 0.8), True, mse=30.0),
)


def squared_paper(rng: random.Random) -> Style:
    """A line drawing in any three colours on squared paper."""
    while True:
        style = vae.random_style(rng)
        if style.paper is not None and style.ink is not None:
            mix = rng.uniform(0.1, 0.4)
            grid = tuple(int(p + (i - p) * mix) for p, i in zip(style.paper, style.ink, strict=True))
            return Style((), style.paper, style.ink, style.width, rng.random() < 0.2, grid)  # type: ignore[arg-type]


def picture(rng: random.Random) -> tuple[np.ndarray, bool]:
    """(128, 128, 3) in 0..1, and whether it is in one of the base's styles."""
    if rng.random() < SQUARED_SHARE:
        return np.asarray(draw(random_scene(rng), squared_paper(rng)), np.float32) / 255, False
    if rng.random() < 0.5:
        return np.asarray(draw(random_scene(rng, style=rng.choice(BASE_STYLES))), np.float32) / 255, True
    return vae.training_picture(rng.getrandbits(48))[0], False


def batch(seed: str) -> tuple[Tensor, Tensor]:
    """Pictures (4, 3, 128, 128) in -1..1, and which of them (4,) are in the base's styles."""
    rng = random.Random(seed)
    pictures, flags = zip(*(picture(rng) for _ in range(BATCH)), strict=True)
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) * 2 - 1
    return pixels.contiguous(memory_format=torch.channels_last), torch.tensor(flags)


def load(file: Path) -> AutoencoderKL:
    model = vae.build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.requires_grad_(False)


def loss_of(model: AutoencoderKL, anchor: AutoencoderKL, phase: Phase, step: int, seed: int) -> Tensor:
    pictures, base = batch(f"{phase.name} {seed} {step}")
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    low, high = phase.noise
    spread = low + (high - low) * torch.rand(BATCH, 1, 1, 1, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            before = anchor.encode(pictures).latent_dist
        latents = model.encode(pictures).latent_dist.mean if phase.encoder else before.mean
        noise = torch.randn(latents.shape, generator=generator)
        output = model.decode(latents + spread * before.std * noise).sample.float()
    loss = vae.reconstruction_loss(output, pictures) + phase.mse * F.mse_loss(output, pictures)
    if phase.encoder and base.any():
        loss = loss + ANCHOR * F.mse_loss(latents[base].float(), before.mean[base].float())
    return loss


def train(phase: Phase, model: AutoencoderKL, anchor: AutoencoderKL, work: Path, seed: int) -> None:
    parts = [model.decoder, model.post_quant_conv, *((model.encoder, model.quant_conv) if phase.encoder else ())]
    trained = [parameter.requires_grad_(True) for part in parts for parameter in part.parameters()]  # type: ignore[union-attr]
    optimizer = torch.optim.AdamW(trained, phase.rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, phase.rate, phase.steps, pct_start=0.05)
    file, start, seconds = work / f"{phase.name}.pt", 0, 0.0
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start, seconds = state["step"], state["seconds"]
    began = time.monotonic()
    for step in range(start, phase.steps):
        loss = loss_of(model, anchor, phase, step, seed)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 250 == 249 or step == phase.steps - 1:
            passed = seconds + time.monotonic() - began
            state = {"vae": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            torch.save(state | {"step": step + 1, "seconds": passed}, file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)
            found = {style: round(vae.psnr(model, vae.style_pictures(style, 32)), 2) for style in STYLES}
            print(f"{phase.name} {step + 1}/{phase.steps} {passed:.0f} s {found}, moved {moved(model, anchor):.4f}")


@torch.inference_mode()
def moved(model: AutoencoderKL, anchor: AutoencoderKL) -> float:
    """Root mean square of how far the flat world's latents moved, in their standard deviations."""
    pictures = vae.style_pictures("flat", 32)
    now, before = (one.encode(pictures).latent_dist.mean for one in (model, anchor))
    return float((now - before).square().mean().sqrt())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--work", type=Path, default=Path("outputs/toybox"))
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    file = options.work / "vae_standardised.pt"
    model, anchor = load(file), load(file)
    for phase in PHASES:
        train(phase, model, anchor, options.work, options.seed)
    torch.save(model.state_dict(), options.work / "vae_final.pt")


if __name__ == "__main__":
    main()
