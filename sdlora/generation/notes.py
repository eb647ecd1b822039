"""What people should know of a job beside its pictures."""

from __future__ import annotations

from pathlib import Path

from sdlora.formats.architectures import Architecture
from sdlora.formats.block_weights import GROUPS, Factors, absent, blocks_of
from sdlora.formats.sources import name_of
from sdlora.generation.job import Job
from sdlora.mixing.mixer import Mixer


def left_out(mixer: Mixer, job: Job) -> list[str]:
    """A line for each LoRA that has settings which do nothing for the mixer's model."""
    notes = []
    for lora in job.loras:
        blocks = in_vain(lora.blocks, mixer.architecture)
        if blocks:
            has_no = f"{mixer.architecture.label} has no {', '.join(blocks)}"
            notes.append(f"{name_of(Path(lora.path))}: {has_no}, so block weights there do nothing")
    return notes


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
