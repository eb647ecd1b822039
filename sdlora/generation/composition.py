"""How several LoRAs come together in one picture: all at once, one after the other, or each by itself."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sdlora.formats.block_weights import BLOCKS
from sdlora.generation.job import Job
from sdlora.mixing.plan import LoraWeight
from sdlora.mixing.schedule import in_turn, product, progress_of

Voices = tuple[tuple[LoraWeight, ...], ...]  # what is mixed into each of the predictions whose mean a picture follows


def voices(job: Job) -> Voices:
    """What each voice of the job's picture has; one but for "composite".

    LoRA Switch and LoRA Composite (arXiv:2402.16843, section 3). Every voice hears the prompt through the text encoders
    with all the LoRAs in them, as trigger words mean nothing without. A LoRA of which the UNet gets nothing has none.
    """
    singing = [lora for lora in job.loras if sings(lora, job.steps)]
    if job.compose == "sum" or len(singing) < 2:
        return (job.loras,)
    if job.compose == "composite":
        return tuple((lora,) for lora in singing)
    turns = {lora: in_turn(i, len(singing), job.steps, job.switch_every) for i, lora in enumerate(singing)}
    schedules = {lora: product(lora.schedule, turn, job.steps) for lora, turn in turns.items()}
    return (tuple(replace(lora, schedule=schedules.get(lora, lora.schedule)) for lora in job.loras),)


def sings(lora: LoraWeight, steps: int) -> bool:
    """Whether the UNet gets anything of it in one of the steps."""
    return weighs(lora) and any(lora.schedule.at(progress_of(step, steps)) for step in range(steps))


def weighs(lora: LoraWeight) -> bool:
    """Whether it has a weight anywhere in the UNet, schedule aside."""
    return any(lora.at(("unet", block)) for block in BLOCKS)


def ladder(job: Job, index: int, weights: Sequence[float]) -> tuple[Job, ...]:
    """The job once for each weight of its LoRA number `index`.

    Text encoders that have the UNet's weight go with it; those that have one of their own keep it.
    """
    return tuple(_weighed(job, index, weight) for weight in weights)


def grid(job: Job, first: int, weights: Sequence[float], second: int, others: Sequence[float]) -> tuple[Job, ...]:
    """The job once for each pair of weights of two of its LoRAs, row by row: first all of `weights`."""
    return tuple(_weighed(_weighed(job, second, other), first, weight) for other in others for weight in weights)


def _weighed(job: Job, index: int, weight: float) -> Job:
    lora = job.loras[index]
    follow: dict[str, Any] = {
        name: weight for name in ("text_encoder", "text_encoder_2") if getattr(lora, name) == lora.unet
    }
    moved = replace(lora, unet=weight, on=True, **follow)
    return replace(job, loras=(*job.loras[:index], moved, *job.loras[index + 1 :]))
