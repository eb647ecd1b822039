"""Trains toybox's UNet and text encoder on the world's captioned scenes, in the latents of its VAE.

    python -m tools.toybox.base --steps 8000 --work outputs/toybox

Needs `vae.pt` of tools.toybox.vae. Deterministic given the seed, resumable like the VAE.
Velocity prediction (Salimans & Ho 2022) weighted by min-SNR (arXiv:2303.09556), caption dropout of 10 %, EMA weights.
"""

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tools.toybox import tokenizer, vae
from tools.toybox.world import BASE_STYLES, Scene, caption, draw, random_scene

CAPTION_DROPOUT = 0.1
MIN_SNR_GAMMA = 5.0
FLAT_SHARE = 0.75  # the rest of the scenes is drawn in the other styles
TEXT_WIDTH = 128


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=vae.LATENT_CHANNELS,
        out_channels=vae.LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(96, 160),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(3, 5),  # the number of heads, as in SD 1.5's config; 32 channels each
    )


def build_text_encoder(words: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.eos_token_id,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """SD's schedule with a larger last beta: almost no signal is left at the last step, so nights come out dark."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def scene(index: int, seed: int) -> Scene:
    rng = random.Random(f"scene {seed} {index}")
    return random_scene(rng, style="flat" if rng.random() < FLAT_SHARE else rng.choice(BASE_STYLES[1:]))


def sample_captions(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [caption(scene(i, seed), rng) for i in range(count)]


def standardise(model: AutoencoderKL, latents: Tensor) -> None:
    """Folds the latents' mean and deviation by channel into the two 1x1 convolutions around them: they become N(0, 1).

    The encoder's variance, untrained so far, becomes the noise that the decoder was trained to bear.
    """
    mean, std = latents.float().mean(dim=(0, 2, 3)), latents.float().std(dim=(0, 2, 3))
    before, after, n = model.quant_conv, model.post_quant_conv, len(mean)
    assert before is not None and after is not None and before.bias is not None and after.bias is not None
    with torch.no_grad():
        after.bias += after.weight[:, :, 0, 0] @ mean
        after.weight *= std[None, :, None, None]
        before.weight[:n] /= std[:, None, None, None]
        before.bias[:n] = (before.bias[:n] - mean) / std
        before.weight[n:] = 0
        before.bias[n:] = 2 * torch.log(vae.LATENT_NOISE / std)
    model.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def encode_scenes(model: AutoencoderKL, count: int, seed: int) -> Tensor:
    """Latents (count, 12, 16, 16) in float16 of the first `count` scenes."""
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    latents = torch.empty(count, vae.LATENT_CHANNELS, 16, 16, dtype=torch.float16)
    for first in range(0, count, 64):
        pictures = np.stack(
            [np.asarray(draw(scene(i, seed)), np.float32) for i in range(first, min(first + 64, count))]
        )
        batch = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(batch.contiguous(memory_format=torch.channels_last)).latent_dist
        latents[first : first + 64] = posterior.mode().half()
    return latents


def prepare(work: Path, count: int, seed: int) -> Tensor:
    """The cached latents of the training scenes; makes them, and the standardised VAE, on first use."""
    file = work / "latents.pt"
    if not file.exists():
        model = vae.build().eval()
        model.load_state_dict(torch.load(work / "vae.pt", weights_only=True)["vae"])
        standardise(model, encode_scenes(model, 2048, seed + 1))
        torch.save(model.state_dict(), work / "vae_standardised.pt")
        began = time.monotonic()
        torch.save(encode_scenes(model, count, seed), file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)
        print(f"encoded {count} scenes in {time.monotonic() - began:.0f} s", flush=True)
    return torch.load(file, weights_only=True, mmap=True)


class Base(nn.Module):
    """UNet and text encoder, trained together."""

    def __init__(self, words: CLIPTokenizer) -> None:
        super().__init__()
        self.unet, self.text_encoder = build_unet(), build_text_encoder(words)

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        conditioning = self.text_encoder(tokens)[0]
        return self.unet(latents, timesteps, conditioning, return_dict=False)[0]


def batch(step: int, seed: int, size: int, latents: Tensor, words: CLIPTokenizer) -> tuple[Tensor, Tensor]:
    """Latents (size, 12, 16, 16) and tokens (size, 77) of one step."""
    rng = random.Random(f"batch {seed} {step}")
    indices = [rng.randrange(len(latents)) for _ in range(size)]
    captions = ["" if rng.random() < CAPTION_DROPOUT else caption(scene(i, seed), rng) for i in indices]
    tokens = words(captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    return latents[indices].float(), tokens


def train(options: argparse.Namespace) -> None:
    work, seed, steps = options.work, options.seed, options.steps
    latents = prepare(work, options.scenes, seed)
    words = tokenizer.build(sample_captions(20_000, seed), work / "tokenizer")
    torch.manual_seed(seed)
    model = Base(words).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    print({name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}, flush=True)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), options.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, steps, pct_start=0.05, cycle_momentum=False)
    file, start, seconds = work / "base.pt", 0, 0.0
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        average, start, seconds = state["average"], state["step"], state["seconds"]
    alphas = build_scheduler().alphas_cumprod
    model.unet.set_attn_processor(
        AttnProcessor()
    )  # plain products: on a CPU twice as fast to train as the fused kernel
    model.text_encoder.set_attn_implementation("eager")
    began, smooth = time.monotonic(), 0.0
    for step in range(start, steps):
        x0, tokens = batch(step, seed, options.batch, latents, words)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        noise = torch.randn(x0.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (len(x0),), generator=generator)
        a = alphas[timesteps].view(-1, 1, 1, 1)
        noisy, velocity = a.sqrt() * x0 + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x0
        with torch.autocast("cpu", torch.bfloat16):
            prediction = model(noisy.contiguous(memory_format=torch.channels_last), timesteps, tokens)
        snr = (a / (1 - a)).flatten()
        weight = snr.clamp(max=MIN_SNR_GAMMA) / (snr + 1)
        loss = (weight * (prediction.float() - velocity).square().mean(dim=(1, 2, 3))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        decay = min(0.999, (step + 1) / (step + 10))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                average[name].lerp_(value, 1 - decay)
        smooth = loss.item() if step == start else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 49:
            print(f"base {step + 1}/{steps} loss {smooth:.4f} {seconds + time.monotonic() - began:.0f} s", flush=True)
        if step % 250 == 249 or step == steps - 1:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
            }
            state |= {"average": average, "step": step + 1, "seconds": seconds + time.monotonic() - began}
            torch.save(state, file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=8000)
    arguments.add_argument("--batch", type=int, default=32)
    arguments.add_argument("--rate", type=float, default=1e-3)
    arguments.add_argument("--scenes", type=int, default=32_000)
    arguments.add_argument("--work", type=Path, default=Path("outputs/toybox"))
    arguments.add_argument("--seed", type=int, default=0)
    train(arguments.parse_args())


if __name__ == "__main__":
    main()
