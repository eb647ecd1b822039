"""How several LoRAs come together in one picture: all at once, one after the other, or each by itself."""

from collections.abc import Sequence
from dataclasses import replace

from sdlora.generation.job import Job
from sdlora.mixing.plan import LoraWeight
from sdlora.mixing.schedule import in_turn, product

Voices = tuple[tuple[LoraWeight, ...], ...]  # what is mixed into each of the predictions whose mean a picture follows


def voices(job: Job) -> Voices:
    """What each voice of the job's picture has; one but for "composite".

    LoRA Switch and LoRA Composite (arXiv:2402.16843, section 3). Every voice hears the prompt through the text encoders
    with all the LoRAs in them, as trigger words mean nothing without.
    """
    loras = tuple(lora for lora in job.loras if lora.on)
    if job.compose == "sum" or len(loras) < 2:
        return (job.loras,)
    if job.compose == "composite":
        return tuple((lora,) for lora in loras)
    turns = [in_turn(i, len(loras), job.steps, job.switch_every) for i in range(len(loras))]
    schedules = [product(lora.schedule, turn, job.steps) for lora, turn in zip(loras, turns, strict=True)]
    return (tuple(replace(lora, schedule=one) for lora, one in zip(loras, schedules, strict=True)),)


def ladder(job: Job, index: int, weights: Sequence[float]) -> tuple[Job, ...]:
    """The job once for each weight of its LoRA number `index`, in the UNet and the text encoders alike."""
    return tuple(_weighed(job, index, weight) for weight in weights)


def grid(job: Job, first: int, weights: Sequence[float], second: int, others: Sequence[float]) -> tuple[Job, ...]:
    """The job once for each pair of weights of two of its LoRAs, row by row: first all of `weights`."""
    return tuple(_weighed(_weighed(job, second, other), first, weight) for other in others for weight in weights)


def _weighed(job: Job, index: int, weight: float) -> Job:
    loras = list(job.loras)
    loras[index] = replace(loras[index], unet=weight, text_encoder=weight, text_encoder_2=None, on=True)
    return replace(job, loras=tuple(loras))
