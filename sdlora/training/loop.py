"""The training loop: a generator of steps. Whoever drives it saves, samples, draws and cancels."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from sdlora.data.cache import stacked
from sdlora.errors import SdloraError
from sdlora.lowrank.inject import Injection
from sdlora.training import objective
from sdlora.training.config import TrainConfig
from sdlora.training.draws import draw, dropout_chance
from sdlora.training.order import batches
from sdlora.training.schedule import factor


class Diverged(SdloraError):
    """The loss or the gradients are no finite numbers any more, from step `step` on."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class Step:
    """One optimizer step. index counts from 1 to steps; loss: mean over all processes; seconds: what the step took."""

    index: int
    steps: int
    loss: float
    learning_rates: Mapping[str, float]  # by component
    grad_norm: float
    seconds: float
    pictures: tuple[str, ...]  # names of the pictures it saw, on all processes


@dataclass(frozen=True, eq=False)
class Examples:
    """The dataset as the loop needs it, everything on the CPU.

    latents: (channels, height, width) each; placements: how each picture was cut, see `pictures.placement`;
    groups: picture indexes of each bucket; conditioning: by caption, None where text encoders are trained.
    """

    names: Sequence[str]
    captions: Sequence[str]
    latents: Sequence[Tensor]
    placements: Sequence[Sequence[int]]
    groups: Sequence[Sequence[int]]
    conditioning: Mapping[str, Mapping[str, Tensor]] | None


@dataclass(frozen=True, eq=False)
class Training:
    """All parts of a run, prepared: what the loop reads and changes. Made by `prepare.prepare`.

    denoiser, optimizer: as Accelerate wrapped them; rates: peak learning rate by component, in the order of the
    optimizer's groups; alphas_cumprod: ᾱ of the model's scheduler, on the accelerator's device.
    """

    config: TrainConfig
    accelerator: Accelerator
    denoiser: Any
    optimizer: Any
    injection: Injection
    rates: Mapping[str, float]
    examples: Examples
    alphas_cumprod: Tensor
    prediction_type: str
    steps: int

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step, over all processes."""
        return global_batch(self.config, self.accelerator)


def global_batch(config: TrainConfig, accelerator: Accelerator) -> int:
    """Samples per optimizer step, over all processes."""
    return config.batch_size * config.gradient_accumulation * accelerator.num_processes


def train(training: Training, done: int = 0) -> Iterator[Step]:
    """Take the steps after the first `done` and yield each when it is complete; Diverged ends it before any harm."""
    config = training.config
    order = batches(training.examples.groups, training.global_batch, config.seed)
    for index, members in enumerate(islice(order, done, training.steps), done):
        began = perf_counter()
        learning_rates = _set_learning_rates(training, index)
        losses, grad_norm = training_step(training, index, members)
        names = tuple(training.examples.names[member] for member in members)
        yield Step(
            index=index + 1,
            steps=training.steps,
            loss=float(losses.mean()),
            learning_rates=learning_rates,
            grad_norm=grad_norm,
            seconds=perf_counter() - began,
            pictures=names,
        )


def training_step(training: Training, index: int, members: Sequence[int]) -> tuple[Tensor, float]:
    """One optimizer step on a global batch: the loss of each sample, in the batch's order, and the gradient's norm.

    Each process takes its share of the batch in `gradient_accumulation` forward passes. Samples are numbered over the
    run, and their chance comes from that number, so how a batch is shared out changes nothing (but the LoRA's dropout,
    which is drawn for a forward pass).
    """
    config, accelerator = training.config, training.accelerator
    training.denoiser.train()
    collected = []
    for turn in range(config.gradient_accumulation):
        slot = (turn * accelerator.num_processes + accelerator.process_index) * config.batch_size
        first = index * len(members) + slot
        with accelerator.accumulate(training.denoiser), dropout_chance(config.seed, first):
            losses = _losses(training, first, members[slot : slot + config.batch_size])
            accelerator.backward(losses.mean())
        collected.append(accelerator.gather(losses.detach()))
    losses = torch.cat(collected).cpu()
    _refuse_divergence(training, index, losses, members)
    grad_norm = float(accelerator.clip_grad_norm_(training.injection.parameters(), config.max_grad_norm or math.inf))
    # With fp16, infinite gradients are the loss scale's affair: it skips the step and lowers itself.
    if not math.isfinite(grad_norm) and accelerator.scaler is None:
        _diverged(training, index, "gradient", [training.examples.names[member] for member in members])
    training.optimizer.step()
    training.optimizer.zero_grad()
    return losses, grad_norm


def _losses(training: Training, first: int, members: Sequence[int]) -> Tensor:
    """The weighted loss of each sample, (n,). first: number of the first sample over the whole run."""
    config, examples, device = training.config, training.examples, training.accelerator.device
    alphas, kind = training.alphas_cumprod, training.prediction_type
    shape = examples.latents[members[0]].shape
    draws = [
        draw(config.seed, first + i, shape, len(alphas), config.caption_dropout, config.noise_offset)
        for i in range(len(members))
    ]
    latents = torch.stack([examples.latents[member] for member in members]).to(device)
    noise = torch.stack([one.noise for one in draws]).to(device)
    timesteps = torch.tensor([one.timestep for one in draws], device=device)
    captions = ["" if one.dropped else examples.captions[member] for one, member in zip(draws, members, strict=True)]
    prompt = captions if examples.conditioning is None else _conditioning(examples.conditioning, captions, device)
    placements = torch.tensor([examples.placements[member] for member in members], device=device)
    noisy = objective.noised(latents, noise, alphas, timesteps)
    prediction = training.denoiser(noisy, timesteps, prompt, placements)
    losses = objective.sample_losses(prediction, objective.target(latents, noise, alphas, timesteps, kind))
    if config.min_snr_gamma is None:
        return losses
    return losses * objective.min_snr_weight(objective.snr(alphas, timesteps), config.min_snr_gamma, kind)


def _conditioning(
    cached: Mapping[str, Mapping[str, Tensor]], captions: Sequence[str], device: torch.device
) -> dict[str, Tensor]:
    rows = stacked([cached[caption] for caption in captions])
    return {name: tensor.to(device) for name, tensor in rows.items()}


def _set_learning_rates(training: Training, index: int) -> dict[str, float]:
    """Give the optimizer's groups the rates of a step counted from 0."""
    config = training.config
    share = factor(config.lr_scheduler, index, training.steps, config.warmup_steps)
    rates = {component: peak * share for component, peak in training.rates.items()}
    for group, rate in zip(training.optimizer.param_groups, rates.values(), strict=True):
        group["lr"] = rate
    return rates


def _refuse_divergence(training: Training, index: int, losses: Tensor, members: Sequence[int]) -> None:
    bad = [training.examples.names[member] for member, fine in zip(members, losses.isfinite(), strict=True) if not fine]
    if bad:
        _diverged(training, index, "loss", bad)


def _diverged(training: Training, index: int, what: str, names: Sequence[str]) -> None:
    training.optimizer.zero_grad()
    named = ", ".join(dict.fromkeys(names))
    raise Diverged(f"the {what} became nan or infinite at step {index + 1} on {named}", index + 1)
