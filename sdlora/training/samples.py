"""Sample pictures while training: the same prompts and seeds every time, so that the pictures can be compared."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from sdlora.generation.job import Job
from sdlora.generation.render import Picture, render
from sdlora.mixing.mixer import Mixer
from sdlora.training.config import TrainConfig
from sdlora.training.loop import Training


def render_samples(training: Training, pipeline: Any, folder: Path, step: int) -> list[Path]:
    """One picture per prompt with the LoRA as it is now, in NNNNNN-n.png; returns their paths.

    Training goes on as if nothing had been: its chance comes from no shared generator, and the modules get back their
    place and their mode.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with _lent(training, pipeline), training.accelerator.autocast():
        for number, prompt in enumerate(prompts(training.config, training.examples.captions)):
            side, seed = training.config.resolution, training.config.seed
            job = Job(model=training.config.model, prompt=prompt, seed=seed, width=side, height=side)
            picture = next(event for event in render(Mixer(pipeline), job) if isinstance(event, Picture))
            path = folder / f"{step:06d}-{number}.png"
            picture.image.save(path)
            paths.append(path)
    return paths


def prompts(config: TrainConfig, captions: Sequence[str]) -> tuple[str, ...]:
    """What is sampled: the prompts of the config, or else the first two captions, without tags of other LoRAs."""
    return config.sample_prompts or tuple(dict.fromkeys(TAG.sub("", caption) for caption in captions))[:2]


TAG = re.compile(r"<(?:lora|lyco):[^<>]*>?")  # captions that were prompts once may have them


@contextmanager
def _lent(training: Training, pipeline: Any) -> Iterator[None]:
    """The pipeline on the training's device and in its mode for rendering; what waited on the CPU goes back there."""
    guests = [part for name, part in pipeline.components.items() if isinstance(part, nn.Module) and name != "unet"]
    places = [next(guest.parameters()).device for guest in guests]
    training.denoiser.eval()
    try:
        for guest in guests:
            guest.to(training.accelerator.device)
        yield
    finally:
        for guest, place in zip(guests, places, strict=True):
            guest.to(place)
        training.denoiser.train()
