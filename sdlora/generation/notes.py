"""What people should know of a job beside its pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sdlora.formats.architectures import Architecture
from sdlora.formats.block_weights import GROUPS, Factors, absent, blocks_of
from sdlora.formats.sources import name_of
from sdlora.generation.composition import sings, voices, weighs
from sdlora.generation.job import Job
from sdlora.mixing.mixer import Mixer
from sdlora.mixing.plan import LoraWeight


def left_out(mixer: Mixer, job: Job) -> list[str]:
    """A line for each setting of a LoRA that does nothing for the mixer's model, or lets nothing of it be seen.

    Weights of 0 and what is off are what people asked for, and are not told.
    """
    mixed = voices(job)[0] if job.compose == "switch" else job.loras
    return [
        f"{name_of(Path(lora.path))}: {note}"
        for lora, in_turn in zip(job.loras, mixed, strict=True)
        for note in _notes(mixer.architecture, job, lora, in_turn)
    ]


def _notes(architecture: Architecture, job: Job, lora: LoraWeight, in_turn: LoraWeight) -> Iterator[str]:
    """in_turn: the LoRA with its turns, if it has any, in its schedule."""
    blocks = in_vain(lora.blocks, architecture)
    if blocks:
        yield f"{architecture.label} has no {', '.join(blocks)}, so block weights there do nothing"
    if lora.text_encoder_2 is not None and "text_encoder_2" not in architecture.components:
        yield "the model has no second text encoder, so a weight of its own for that does nothing"
    if weighs(lora) and not sings(lora, job.steps):
        yield f"the schedule is 0 at every step of {job.steps}, so the UNet gets nothing of it"
    elif weighs(lora) and not sings(in_turn, job.steps):
        when = " while its schedule is not 0" if lora.schedule.points else ""
        yield f"its turn never comes in {job.steps} steps, {job.switch_every} a turn{when}: the UNet gets nothing of it"


def in_vain(factors: Factors, architecture: Architecture) -> tuple[str, ...]:
    """The blocks with a factor that the architecture does not have, as far as they were meant.

    Lists and groups reach further than many models: a side of which all absent blocks have a factor was given as a
    whole, and they are not told. They are if no other block has a factor.
    """
    missing = absent(factors, architecture)
    if len(missing) == len(factors):
        return missing
    sides = [set(GROUPS[side]).difference(blocks_of(architecture)) for side in ("IN", "OUT")]
    whole = [side for side in sides if side <= set(missing)]
    return tuple(block for block in missing if not any(block in side for side in whole))
