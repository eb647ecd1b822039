"""Rendering: jobs become pictures. Denoising yields each step, so progress and cancelling belong to the caller."""

import inspect
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress, groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.generation.composition import voices
from sdlora.generation.job import SCHEDULERS, Job
from sdlora.generation.prompts.encode import Remembered, encode, encode_negative
from sdlora.generation.prompts.syntax import Part, negative_of, parts_of
from sdlora.generation.prompts.tags import refuse_tags, tag_of
from sdlora.mixing.mixer import Mixer
from sdlora.mixing.placement import obstacle
from sdlora.mixing.plan import Plan
from sdlora.mixing.schedule import progress_of
from sdlora.models.families import Conditioning, family_of

FEW_STEPS = 2  # of a job that merging would not pay for: it costs about as much as two steps of live layers
AT_ONCE = 16 * 512 * 512  # pixels that are denoised together unless the caller says how many pictures

_remembered: WeakKeyDictionary[Mixer, Remembered] = WeakKeyDictionary()


@dataclass(frozen=True)
class Progress:
    """A step is done: of `steps`, of picture `picture` (from 0) and those denoised with it, `together` in all.

    Step 0: waiting for the pipeline. Some schedulers take more steps than the job says: Heun looks twice at each but
    the last.
    """

    picture: int
    step: int
    steps: int
    together: int = 1


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture, and the job that makes it again: its own seed, count 1, sizes and hashes filled in."""

    image: Image.Image
    job: Job


@dataclass(frozen=True, eq=False)
class Told:
    """What the UNet is told of a batch: parts of the prompt by step, and what each text of them means to each job."""

    parts: tuple[Part, ...]
    negative: Part
    meanings: tuple[dict[tuple[str, bool], Conditioning], ...]

    def at(self, step: int, each: int) -> list[tuple[float, Conditioning]]:
        """Weights and conditionings of a step, the negative prompt's first; `each`: rows for each of the jobs."""
        texts = [
            (0.0, (self.negative.text_at(step), True)),
            *((p.weight, (p.text_at(step), False)) for p in self.parts),
        ]
        return [(weight, _stacked([meaning[key] for meaning in self.meanings], each)) for weight, key in texts]


def render(mixer: Mixer, *jobs: Job, rows: int | None = None) -> Generator[Progress | Picture, None, None]:
    """Render jobs: Progress at every step, a Picture whenever one is done, in the order of the jobs.

    Pictures of a single job are made one by one, so that each is what it is alone. Several jobs that differ in nothing
    but LoRA weights and seeds (a ladder, a grid) are denoised together, each with its own weights: `rows` at a time,
    None for 16 of 512x512 pixels, and more or fewer of other sizes.
    They run whole, one after another: this waits for the mixer's lock, yielding meanwhile, and holds it until it ends
    or is closed, in whatever threads. Between two events nobody can change the mix. Closing the iterator cancels within
    one step.
    """
    mixer.refuse_within()
    for job in jobs:
        refuse_tags(job)
    wanted = [replace(job, seed=job.seed + i, count=1) for job in jobs for i in range(job.count)]
    while not mixer.lock.acquire(timeout=0.1):
        yield Progress(0, 0, wanted[0].steps)
    try:
        alone = len(jobs) == 1
        events = _events(mixer, _batches(wanted, lambda job: 1 if alone else rows or _room(mixer, job)))
        while True:
            with mixer.at_work():
                event = next(events, None)
            if event is None:
                return
            yield event
    finally:
        mixer.at(None)
        mixer.lock.release()


def _events(mixer: Mixer, batches: Iterable[list[Job]]) -> Iterator[Progress | Picture]:
    """Of batches, one after another; for whoever holds the mixer's lock."""
    done = 0
    for batch in batches:
        batch, scheduler = hold(mixer, batch), scheduler_for(mixer.pipeline, batch[0])
        steps, latents = len(scheduler.timesteps), None
        for step, latents in enumerate(denoise(mixer, batch, scheduler), start=1):  # noqa: B007 the last are decoded
            yield Progress(done, step, steps, len(batch))
        assert latents is not None
        finite = [bool(torch.isfinite(one).all()) for one in latents]
        for one, job in compress(zip(latents, batch, strict=True), finite):
            yield Picture(decode(mixer.pipeline, one[None]), job)
        if not all(finite):
            raise _nan(job for job, fine in zip(batch, finite, strict=True) if not fine)
        done += len(batch)


def _nan(jobs: Iterable[Job]) -> SdloraError:
    """Of the jobs that gave no picture, with the weights of their LoRAs."""
    mixes = (" ".join(tag_of(lora, job.steps) for lora in job.loras if lora.on) for job in jobs)
    told = " and ".join(f"with {mix}" for mix in dict.fromkeys(mixes) if mix)
    why = f"the picture has become nan {told}".strip()
    return SdloraError(f"{why}; use smaller LoRA weights, less guidance or another scheduler")


def hold(mixer: Mixer, batch: Sequence[Job]) -> list[Job]:
    """Have the LoRAs of these jobs at hand, and no others; returns the jobs with sizes and file hashes filled in.

    A file named twice is an error. Where a file cannot be applied, SdloraError, and the mixer is as it was.
    """
    plans = [job.plan for job in batch]
    if len(batch) > 1 or batch[0].compose != "sum":  # the UNet's part comes with the voices
        plans = [plan.only(family_of(mixer.pipeline).text_encoders) for plan in plans]
    held = mixer.hold(*plans, partial=batch[0].partial, live=_short(batch[0]))
    hashes = {lora.path: lora.sha256 for plan in held for lora in plan.loras}
    known_by = {path: receipt.autov3 for path in hashes if (receipt := mixer.receipt(path))}
    own = _own_side(mixer)
    return [
        replace(
            job,
            loras=tuple(
                replace(lora, sha256=hashes[lora.path], autov3=known_by.get(lora.path, "")) for lora in job.loras
            ),
            width=job.width or own,
            height=job.height or own,
        )
        for job in batch
    ]


def denoise(mixer: Mixer, batch: Sequence[Job], scheduler: Any = None) -> Iterator[Tensor]:
    """Latents (pictures, channels, height / 8, width / 8) of jobs at hand after each step; the last are the pictures'.

    scheduler: a fresh one of theirs, None to have it made.
    Classifier-free guidance (Ho & Salimans 2022): unconditional + guidance_scale * (conditional - unconditional); the
    parts of a prompt with AND add up what they differ by, each with its weight (Liu et al., arXiv:2206.01714).
    """
    job = batch[0]
    if scheduler is None:
        scheduler = scheduler_for(mixer.pipeline, job)
    calls = len(scheduler.timesteps)  # of the UNet; second-order schedulers make two a step
    told = _told(mixer, batch)
    sung = [voices(job) for job in batch]
    each = len(sung[0])
    plans = [Plan(job.model, voice) for one in sung for voice in one]
    whole = len(plans) == 1  # and has the text encoders' part too, which then stays for the next job
    mixer.apply(*(plans if whole else (plan.only(("unet",)) for plan in plans)), live=_short(job))
    chance = [torch.Generator().manual_seed(job.seed) for job in batch]
    latents = _noise(mixer.pipeline, batch, chance) * scheduler.init_noise_sigma
    for call, timestep in enumerate(scheduler.timesteps):
        step = call * job.steps // calls
        mixer.at(progress_of(step, job.steps))
        with torch.inference_mode():
            seen = scheduler.scale_model_input(latents, timestep).repeat_interleave(each, 0)
            prediction = _guided(mixer.pipeline, seen, timestep, told.at(step, each), job)
            prediction = prediction.unflatten(0, (len(batch), each)).mean(1)
            latents = scheduler.step(prediction, timestep, latents, **_chance(scheduler, chance)).prev_sample
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
    scheduler.set_timesteps(job.steps, device=_device(pipeline))
    return scheduler


@torch.inference_mode()
def decode(pipeline: Any, latents: Tensor) -> Image.Image:
    """The picture of latents (1, channels, height / 8, width / 8). In float32: SDXL's VAE overflows in float16."""
    vae = pipeline.vae
    dtype, fixed = vae.dtype, bool(obstacle(vae))  # quantised or offloaded, it stays as it is
    latents = latents.float() / vae.config.scaling_factor
    if fixed:
        latents = latents.to(dtype)
    elif dtype != torch.float32:
        vae.float()
    try:
        pixels = vae.decode(latents, return_dict=False)[0].float()
    finally:
        if not fixed and dtype != torch.float32:
            vae.to(dtype)
    pixels = (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels[0].permute(1, 2, 0).cpu().numpy())


def _batches(jobs: Sequence[Job], room: Callable[[Job], int]) -> Iterator[list[Job]]:
    """Neighbours that differ in nothing but LoRA weights and seed, as many as there is room for pictures of their size.

    A composite is a batch by itself.
    """
    batch: list[Job] = []
    for job in jobs:
        alike = batch and _frame(job) == _frame(batch[0]) and job.compose != "composite"
        if batch and not (alike and len(batch) < room(job)):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def _room(mixer: Mixer, job: Job) -> int:
    own = _own_side(mixer)
    return max(1, AT_ONCE // ((job.width or own) * (job.height or own)))


def _own_side(mixer: Mixer) -> int:
    """Pixels of the model's own pictures."""
    return mixer.pipeline.unet.config.sample_size * mixer.pipeline.vae_scale_factor


def _frame(job: Job) -> tuple[Job, frozenset[str]]:
    """What pictures of one batch have in common: all but weights and seed. Other LoRAs may bring other tokens."""
    return replace(job, loras=(), seed=0), frozenset(lora.path for lora in job.loras)


def _short(job: Job) -> bool:
    return job.steps <= FEW_STEPS


def _told(mixer: Mixer, batch: Sequence[Job]) -> Told:
    """All that the prompts say in any step, as the text encoders of each job read it."""
    job, encoders = batch[0], family_of(mixer.pipeline).text_encoders
    parts, negative = parts_of(job.prompt, job.steps), negative_of(job.negative_prompt, job.steps)
    texts = dict.fromkeys([(text, True) for _, text in negative.spans])
    texts |= dict.fromkeys((text, False) for part in parts for _, text in part.spans)
    remembered = _remembered.setdefault(mixer, Remembered())
    meanings = []
    for job in batch:
        if len(batch) > 1:
            mixer.apply(job.plan.only(encoders))
        key = mixer.reading, mixer.pipeline.dtype, str(_device(mixer.pipeline))
        meanings.append({told: _meaning(mixer.pipeline, remembered, key, *told) for told in texts})
    return Told(parts, negative, tuple(meanings))


def _meaning(pipeline: Any, remembered: Remembered, key: Hashable, text: str, negative: bool) -> Conditioning:
    return remembered.get((key, text, negative), lambda: (encode_negative if negative else encode)(pipeline, text))


def _stacked(meanings: Sequence[Conditioning], each: int) -> Conditioning:
    """Those of the jobs, each `each` times, as rows."""
    return {name: torch.cat([meaning[name] for meaning in meanings]).repeat_interleave(each, 0) for name in meanings[0]}


def _guided(pipeline: Any, seen: Tensor, timestep: Tensor, told: list[tuple[float, Conditioning]], job: Job) -> Tensor:
    (_, negative), *parts = told
    if job.guidance_scale == 1 and [weight for weight, _ in parts] == [1.0]:
        return _predicted(pipeline, seen, timestep, [parts[0][1]])[0]
    without, *heard = _predicted(pipeline, seen, timestep, [negative, *(one for _, one in parts)])
    apart = (job.guidance_scale * weight * (one - without) for (weight, _), one in zip(parts, heard, strict=True))
    return without + sum(apart)


def _predicted(pipeline: Any, seen: Tensor, timestep: Tensor, told: Sequence[Conditioning]) -> list[Tensor]:
    """What the UNet predicts for each conditioning; those of one length in one pass."""
    predict, found = family_of(pipeline).predict, list[Tensor]()
    for _, alike in groupby(told, lambda one: one["encoder_hidden_states"].shape[1]):
        group = list(alike)
        joined = {name: torch.cat([one[name] for one in group]) for name in group[0]}
        prediction = predict(pipeline.unet, torch.cat([seen] * len(group)), timestep, joined, None)
        found += prediction.chunk(len(group))
    return found


def _noise(pipeline: Any, batch: Sequence[Job], chance: Sequence[torch.Generator]) -> Tensor:
    factor, unet = pipeline.vae_scale_factor, pipeline.unet
    height, width = batch[0].height, batch[0].width
    assert height and width
    shape = (1, unet.config.in_channels, height // factor, width // factor)
    return torch.cat([torch.randn(shape, generator=one) for one in chance]).to(_device(pipeline), unet.dtype)


def _device(pipeline: Any) -> torch.device:
    """Where it computes, which for offloaded models is not where the weights lie."""
    return pipeline._execution_device


def _chance(scheduler: Any, chance: Sequence[torch.Generator]) -> dict[str, Any]:
    """Only some schedulers draw noise as they go."""
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return {}
    return {"generator": list(chance) if len(chance) > 1 else chance[0]}
