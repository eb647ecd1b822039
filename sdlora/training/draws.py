"""Chance as an argument: everything random in training is a function of the seed and of what it is for.

No generator is carried from step to step, so a resumed run, and any number of processes, draw the same.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """What chance adds to one sample. noise: (channels, height, width); dropped: its caption is left empty."""

    timestep: int
    dropped: bool
    noise: Tensor


def seed_of(seed: int, *purpose: str | int) -> int:
    """A seed of 63 bits for one purpose, such as ("sample", 17); different purposes give unrelated seeds."""
    text = ":".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator for one purpose, so that every device sees the same numbers."""
    return torch.Generator().manual_seed(seed_of(seed, *purpose))


def draw(
    seed: int, sample: int, shape: Sequence[int], timesteps: int, caption_dropout: float, noise_offset: float
) -> Draw:
    """The chance of one sample, numbered over the whole run and all processes.

    noise_offset adds that multiple of one normal number per channel, crosslabs.org/blog/diffusion-with-offset-noise.
    """
    chance = generator(seed, "sample", sample)
    timestep = int(torch.randint(timesteps, (), generator=chance))
    dropped = float(torch.rand((), generator=chance)) < caption_dropout
    offset_c11 = torch.randn(shape[0], 1, 1, generator=chance)
    noise_chw = torch.randn(tuple(shape), generator=chance)
    return Draw(timestep, dropped, noise_chw + noise_offset * offset_c11 if noise_offset else noise_chw)


@contextmanager
def dropout_chance(seed: int, sample: int) -> Iterator[None]:
    """Dropout inside draws as the first sample of the forward pass decides; torch's generators stay as they were.

    Dropout, and gradient checkpointing which rewinds it, know no other generator than torch's own.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed_of(seed, "dropout", sample))
        yield
