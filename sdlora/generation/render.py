"""Rendering: a job becomes pictures. Denoising yields each step, so progress and cancelling belong to the caller."""

import inspect
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.generation.job import SCHEDULERS, Job, LoraWeight
from sdlora.mixing.mixer import Mixer
from sdlora.models.families import Conditioning, family_of, truncated


@dataclass(frozen=True)
class Progress:
    """A step is done: of `steps`, of picture `picture` (from 0). Step 0: waiting for the pipeline.

    Some schedulers take more steps than the job says: Heun looks twice at each but the last.
    """

    picture: int
    step: int
    steps: int


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture, the job that makes exactly it again (its own seed, count 1, sizes and hashes filled in), and notes."""

    image: Image.Image
    job: Job
    notes: tuple[str, ...] = ()


def render(mixer: Mixer, job: Job) -> Generator[Progress | Picture, None, None]:
    """Render a job: Progress at every step, a Picture whenever one is done.

    Jobs run whole, one after another: this waits for the mixer's lock, yielding meanwhile, and holds it until it ends
    or is closed. Closing the iterator cancels the job within one step.
    """
    while not mixer.lock.acquire(timeout=0.1):
        yield Progress(0, 0, job.steps)
    try:
        job = hold(mixer, job)
        notes, steps = _notes(mixer.pipeline, job), len(scheduler_for(mixer.pipeline, job).timesteps)
        for i in range(job.count):
            one = replace(job, seed=job.seed + i, count=1)
            latents: Tensor | None = None
            for step, latents in enumerate(denoise(mixer.pipeline, one), start=1):  # noqa: B007 the last ones are decoded
                yield Progress(i, step, steps)
            assert latents is not None
            yield Picture(decode(mixer.pipeline, latents), one, notes)
    finally:
        mixer.lock.release()


def hold(mixer: Mixer, job: Job) -> Job:
    """Bring the mixer to exactly the job's LoRAs; returns the job with sizes and file hashes filled in.

    Files that a former job used and this one does not are unloaded. A file named twice is an error. Where a file
    cannot be applied, SdloraError, and the mixer is as it was.
    """
    names = [adapter_name(lora) for lora in job.loras]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise SdloraError(f"{twice} is given twice; give each LoRA once, with the sum of its weights")
    wanted = {name: (lora.path, _weights(mixer.pipeline, lora)) for name, lora in zip(names, job.loras, strict=True)}
    receipts = mixer.hold(wanted, job.partial)
    own = mixer.pipeline.unet.config.sample_size * mixer.pipeline.vae_scale_factor
    hashes = (receipts[name].sha256 for name in names)
    loras = tuple(replace(lora, sha256=sha256) for lora, sha256 in zip(job.loras, hashes, strict=True))
    return replace(job, loras=loras, width=job.width or own, height=job.height or own)


def adapter_name(lora: LoraWeight) -> str:
    """What the mixer calls a job's LoRA: its file, whichever way the path to it was written."""
    return os.path.realpath(lora.path)


@torch.inference_mode()
def conditioning_of(pipeline: Any, job: Job) -> tuple[Conditioning, Conditioning]:
    """What the UNet is told: the prompt's conditioning and the negative prompt's."""
    family = family_of(pipeline)
    return family.encode(pipeline, [job.prompt]), family.unconditional(pipeline, [job.negative_prompt])


def denoise(pipeline: Any, job: Job) -> Iterator[Tensor]:
    """Latents (1, channels, height / 8, width / 8) after each step; the last are the picture's.

    Classifier-free guidance (Ho & Salimans 2022): unconditional + guidance_scale * (conditional - unconditional).
    """
    assert job.width and job.height
    family, unet = family_of(pipeline), pipeline.unet
    prompt, negative = conditioning_of(pipeline, job)
    guided = job.guidance_scale != 1
    told = {name: torch.cat([negative[name], prompt[name]]) if guided else prompt[name] for name in prompt}
    generator = torch.Generator().manual_seed(job.seed)
    scheduler = scheduler_for(pipeline, job)
    factor = pipeline.vae_scale_factor
    shape = (1, unet.config.in_channels, job.height // factor, job.width // factor)
    latents = torch.randn(shape, generator=generator).to(unet.device, unet.dtype) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        with torch.inference_mode():
            seen = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, timestep)
            prediction = family.predict(unet, seen, timestep, told, None)
            if guided:
                without, with_prompt = prediction.chunk(2)
                prediction = without + job.guidance_scale * (with_prompt - without)
            latents = scheduler.step(prediction, timestep, latents, **_chance(scheduler, generator)).prev_sample
        yield latents


def scheduler_for(pipeline: Any, job: Job) -> Any:
    """A fresh scheduler with the model's own noise schedule and prediction type, set to the job's steps."""
    import diffusers

    own = pipeline.scheduler
    if job.scheduler == "default":
        scheduler = type(own).from_config(own.config)
    else:
        name, settings, _ = SCHEDULERS[job.scheduler]
        scheduler = getattr(diffusers, name).from_config(own.config, **settings)
    scheduler.set_timesteps(job.steps, device=pipeline.unet.device)
    return scheduler


@torch.inference_mode()
def decode(pipeline: Any, latents: Tensor) -> Image.Image:
    """The picture of latents (1, channels, height / 8, width / 8). In float32: SDXL's VAE overflows in float16."""
    if not torch.isfinite(latents).all():
        raise SdloraError("the picture has become nan; use smaller LoRA weights, less guidance or another scheduler")
    vae = pipeline.vae
    dtype = vae.dtype
    latents = latents.float() / vae.config.scaling_factor
    if dtype != torch.float32:
        vae.float()
    try:
        pixels = vae.decode(latents, return_dict=False)[0]
    finally:
        if dtype != torch.float32:
            vae.to(dtype)
    pixels = (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels[0].permute(1, 2, 0).cpu().numpy())


def _weights(pipeline: Any, lora: LoraWeight) -> dict[str, float]:
    encoders = family_of(pipeline).text_encoders
    return {"unet": lora.unet, **dict.fromkeys(encoders, lora.text_encoder)}


def _chance(scheduler: Any, generator: torch.Generator) -> dict[str, Any]:
    """Only some schedulers draw noise as they go."""
    return {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}


def _notes(pipeline: Any, job: Job) -> tuple[str, ...]:
    cut = {"prompt": truncated(pipeline, job.prompt), "negative prompt": truncated(pipeline, job.negative_prompt)}
    return tuple(f"the {name} is too long, ignored: {rest!r}" for name, rest in cut.items() if rest)
