"""From a config, a pipeline and a dataset to a training that can be run."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    ProjectConfiguration,
)

from sdlora.data.buckets import Bucketing, assign
from sdlora.data.cache import encode_captions, encode_latents
from sdlora.data.folder import Dataset
from sdlora.data.pictures import placement
from sdlora.errors import SdloraError
from sdlora.lowrank.inject import inject
from sdlora.models.families import Family, family_of
from sdlora.training import optimizers
from sdlora.training.config import TrainConfig
from sdlora.training.denoiser import Denoiser
from sdlora.training.draws import generator
from sdlora.training.loop import Examples, Training, global_batch
from sdlora.training.objective import PREDICTION_TYPES
from sdlora.training.order import steps_of

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What Accelerate's launcher hands on of its own settings, and its default; by the names of ours.
LAUNCHED = {
    "mixed_precision": ("ACCELERATE_MIXED_PRECISION", "no"),
    "gradient_accumulation": ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"),
}
SHARDED = {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}


def open_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate as the config asks for it, whatever was run before in this Python process."""
    if config.tracker not in ("none", *(tracker.value for tracker in get_available_trackers())):
        raise SdloraError(
            f"tracker {config.tracker!r} is not installed; pip install {config.tracker.replace('_', '-')}, "
            "or give --tracker none"
        )
    _refuse_other_launch(config)
    # One Python process may train several times; Accelerate would insist on the first run's precision.
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.gradient_accumulation, sync_with_dataloader=False
            ),
            log_with=None if config.tracker == "none" else config.tracker,
            project_config=ProjectConfiguration(logging_dir=str(config.folder)),
            # SDXL reads its first text encoder before the last layer, so that layer's LoRA gets no gradient.
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=config.text_encoder_learning_rate > 0)
            ],
        )
    except ValueError as error:
        raise SdloraError(f"mixed_precision {config.mixed_precision!r} does not work here: {error}") from error
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise SdloraError("mixed_precision fp16 needs a GPU, and none is found; choose bf16 or no")
    if accelerator.distributed_type in SHARDED:
        kind = accelerator.distributed_type.value
        raise SdloraError(
            f"training is not sharded over {kind} yet; choose plain data parallelism in `accelerate config`"
        )
    return accelerator


def bucketed(config: TrainConfig, pipeline: Any, dataset: Dataset) -> Bucketing:
    """The dataset's buckets at the config's resolution, or else the model's own."""
    factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    return assign(dataset.records, config.resolution or pipeline.unet.config.sample_size * factor, factor)


def prepare(
    config: TrainConfig, accelerator: Accelerator, pipeline: Any, dataset: Dataset, bucketing: Bucketing
) -> Training:
    """Wrap the targets, cache what the frozen parts make of the dataset, free these parts, hand over to Accelerate.

    Without sample pictures the VAE and, unless it is trained, the text encoder leave memory; with them they wait on
    the CPU. The cheap checks come first: targets, prediction type and optimizer raise SdloraError before anything is
    encoded.
    """
    family = family_of(pipeline)
    kind = pipeline.scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES or not hasattr(pipeline.scheduler, "alphas_cumprod"):
        raise SdloraError(
            f"{config.model}: cannot train for the scheduler's {kind!r}; {', '.join(PREDICTION_TYPES)} can"
        )
    trained = family.text_encoders if config.text_encoder_learning_rate else ()
    dtype = DTYPES[config.mixed_precision]
    components = {name: getattr(pipeline, name) for name in ("unet", *trained)}
    for component in components.values():
        component.to(dtype)
    injection = inject(
        components, config.targets, config.rank, config.alpha, config.dropout, generator=generator(config.seed, "lora")
    )
    rates = {
        name: config.text_encoder_learning_rate if name in trained else config.learning_rate for name in components
    }
    trainable = {name: (injection.parameters(name), rate) for name, rate in rates.items()}
    optimizer = optimizers.build(config.optimizer, trainable, config.weight_decay)
    examples = _examples(accelerator.device, family, pipeline, dataset, bucketing, frozen=not trained)
    if not config.sample_every:
        for name in ("vae", *(name for name in family.text_encoders if name not in trained)):
            setattr(pipeline, name, None)
    if config.gradient_checkpointing:
        _checkpoint_gradients(components)
    denoiser, optimizer = accelerator.prepare(Denoiser(pipeline, family, trained), optimizer)
    batch = global_batch(config, accelerator)
    return Training(
        config=config,
        accelerator=accelerator,
        denoiser=denoiser,
        optimizer=optimizer,
        injection=injection,
        rates=rates,
        examples=examples,
        alphas_cumprod=pipeline.scheduler.alphas_cumprod.float().to(accelerator.device),
        prediction_type=kind,
        steps=steps_of(config.epochs, examples.groups, batch) if config.epochs else config.steps,
    )


def _examples(
    device: torch.device, family: Family, pipeline: Any, dataset: Dataset, bucketing: Bucketing, *, frozen: bool
) -> Examples:
    """The dataset encoded; frozen: the text encoders are not trained, so captions are encoded too."""
    captions = [record.caption for record in dataset.records]
    with _on(device, [pipeline.vae]):
        latents = encode_latents(pipeline.vae, dataset.records, bucketing.sizes)
    conditioning = None
    if frozen:
        with _on(device, [getattr(pipeline, name) for name in family.text_encoders]):
            # As in Denoiser.forward: `unconditional` is `encode` but for the empty caption.
            conditioning = encode_captions([*captions, ""], partial(family.unconditional, pipeline))
    return Examples(
        names=[record.name for record in dataset.records],
        captions=captions,
        latents=latents,
        placements=[placement((r.width, r.height), s) for r, s in zip(dataset.records, bucketing.sizes, strict=True)],
        groups=list(bucketing.groups().values()),
        conditioning=conditioning,
    )


@contextmanager
def _on(device: torch.device, modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """The modules on a device for a while, then on the CPU again."""
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module in modules:
            module.to("cpu")


def _checkpoint_gradients(components: Mapping[str, Any]) -> None:
    """Recompute activations in the backward pass; diffusers and transformers spell the switch differently."""
    for name, component in components.items():
        if name == "unet":
            component.enable_gradient_checkpointing()
        else:
            enable = "activation_checkpointing_enable"  # since transformers 5.2x; the older name warns there
            old = "gradient_checkpointing_enable"
            getattr(component, enable if hasattr(component, enable) else old)({"use_reentrant": False})


def _refuse_other_launch(config: TrainConfig) -> None:
    """`accelerate launch` and `accelerate config` have words for settings of ours; where they differ, one must win."""
    for name, (variable, default) in LAUNCHED.items():
        told, own = os.environ.get(variable, default), str(getattr(config, name))
        if told not in (default, own):
            flag = f"--{name.replace('_', '-')}"
            raise SdloraError(f"Accelerate is told {told!r} and sdlora {own!r} as {name}; give sdlora {flag} {told}")
