"""The loop: its loss against diffusers' own parts, its invariances, what is frozen and what leaves memory."""

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdlora.data import pictures
from sdlora.data.folder import scan
from sdlora.errors import SdloraError
from sdlora.training.config import TrainConfig
from sdlora.training.draws import draw
from sdlora.training.loop import Diverged, Step, Training, train
from sdlora.training.order import batches
from sdlora.training.prepare import bucketed, open_accelerator, prepare
from tests.tiny import tiny_pipeline

Configure = Callable[..., TrainConfig]


def prepared(config: TrainConfig, pipeline: Any) -> Training:
    dataset = scan(Path(config.dataset))
    return prepare(config, open_accelerator(config), pipeline, dataset, bucketed(config, pipeline, dataset))


def steps_of(config: TrainConfig, kind: str = "sd1", prediction_type: str = "epsilon") -> tuple[list[Step], Training]:
    training = prepared(config, tiny_pipeline(kind, prediction_type=prediction_type))
    return list(train(training)), training


def factors(training: Training) -> dict[str, torch.Tensor]:
    deltas = training.injection.adapter().deltas
    return {f"{path}.{name}": getattr(delta, name) for path, delta in deltas.items() for name in ("down", "up")}


def expected_losses(config: TrainConfig, kind: str) -> Iterator[float]:
    """The first losses of a run, from diffusers' scheduler and pipeline as the papers say; LoRA has no effect yet."""
    pipeline = tiny_pipeline("sd1", prediction_type=kind)
    dataset = scan(Path(config.dataset))
    bucketing = bucketed(config, pipeline, dataset)
    members = next(batches(list(bucketing.groups().values()), config.batch_size, config.seed))
    for number, member in enumerate(members):
        record, size = dataset.records[member], bucketing.sizes[member]
        pixels = pictures.pixels(pictures.fit(pictures.load(record.path), size))[None]
        latents = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
        chance = draw(config.seed, number, latents.shape[1:], 1000, config.caption_dropout, config.noise_offset)
        timestep, noise = torch.tensor([chance.timestep]), chance.noise[None]
        caption = "" if chance.dropped else record.caption
        states = pipeline.encode_prompt(caption, "cpu", 1, False)[0]
        answer = pipeline.unet(pipeline.scheduler.add_noise(latents, noise, timestep), timestep, states).sample
        target = noise if kind == "epsilon" else pipeline.scheduler.get_velocity(latents, noise, timestep)
        alpha = float(pipeline.scheduler.alphas_cumprod[chance.timestep])
        snr = alpha / (1 - alpha)
        weight = min(snr, 5.0) / (snr if kind == "epsilon" else snr + 1)
        yield weight * float(torch.nn.functional.mse_loss(answer, target))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_the_loss_is_what_diffusers_parts_give(configure: Configure, kind: str) -> None:
    config = configure(steps=1, batch_size=3, min_snr_gamma=5.0, noise_offset=0.1, caption_dropout=0.5)
    with torch.enable_grad():
        ((step,), _) = steps_of(config, prediction_type=kind)
    losses = list(expected_losses(config, kind))
    assert step.loss == pytest.approx(sum(losses) / 3, rel=1e-4)


def test_training_learns_and_changes_the_lora_only(configure: Configure) -> None:
    config = configure(steps=12, learning_rate=5e-3, batch_size=2)
    training = prepared(config, tiny_pipeline("sd1"))
    before = {name: p.clone() for name, p in training.denoiser.named_parameters() if not p.requires_grad}
    list(train(training))
    assert all(torch.equal(before[name], p) for name, p in training.denoiser.named_parameters() if name in before)
    again = list(train(replace(training, config=replace(config, learning_rate=1e-30), rates={"unet": 0.0})))
    fresh = list(train(prepared(replace(config, learning_rate=1e-30), tiny_pipeline("sd1"))))
    assert sum(step.loss for step in again) < 0.97 * sum(step.loss for step in fresh)


def test_how_a_batch_is_shared_out_changes_nothing(configure: Configure) -> None:
    # SGD, for Adam divides by the gradient's own size and so makes much of how a small one was rounded.
    changes = {"optimizer": "sgd", "learning_rate": 0.1}
    whole, first = steps_of(configure(batch_size=4, **changes))
    parts, second = steps_of(configure(batch_size=1, gradient_accumulation=4, **changes))
    assert [step.pictures for step in whole] == [step.pictures for step in parts]
    assert [step.loss for step in whole] == pytest.approx([step.loss for step in parts], rel=1e-5)
    for name, factor in factors(first).items():
        torch.testing.assert_close(factor, factors(second)[name], rtol=1e-3, atol=1e-6)


def test_gradient_checkpointing_changes_nothing_but_memory(configure: Configure) -> None:
    changes = {"text_encoder_learning_rate": 1e-3, "dropout": 0.2}
    plain, first = steps_of(configure(**changes))
    recomputed, second = steps_of(configure(**changes, gradient_checkpointing=True))
    assert [step.loss for step in plain] == pytest.approx([step.loss for step in recomputed], rel=1e-6)
    for name, factor in factors(first).items():
        torch.testing.assert_close(factor, factors(second)[name], rtol=1e-4, atol=1e-7)


def test_bf16_keeps_the_lora_in_float32_and_comes_near(configure: Configure) -> None:
    exact, _ = steps_of(configure(steps=1))
    rounded, training = steps_of(configure(steps=1, mixed_precision="bf16"))
    assert rounded[0].loss == pytest.approx(exact[0].loss, rel=0.05)
    assert {p.dtype for p in training.injection.parameters()} == {torch.float32}
    assert next(training.denoiser.unet.parameters()).dtype == torch.bfloat16


def test_fp16_without_a_gpu_is_refused(configure: Configure) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SdloraError, match="fp16 needs a GPU"):
        open_accelerator(configure(mixed_precision="fp16"))


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_text_encoders_learn_at_their_own_rate(configure: Configure, kind: str) -> None:
    steps, training = steps_of(configure(learning_rate=1e-3, text_encoder_learning_rate=1e-4, optimizer="sgd"), kind)
    encoders = ["text_encoder"] + ["text_encoder_2"] * (kind == "sdxl")
    assert steps[0].learning_rates == {"unet": 1e-3, **dict.fromkeys(encoders, 1e-4)}
    learned = factors(training)
    for component in ("unet", *encoders):
        assert any(path.startswith(f"{component}.") and path.endswith(".up") and t.any() for path, t in learned.items())


def test_sdxl_trains_with_frozen_text_encoders(configure: Configure) -> None:
    (step,), training = steps_of(configure(steps=1, caption_dropout=0.5, batch_size=2), "sdxl")
    assert step.loss > 0 and all(path.startswith("unet.") for path in training.injection.layers)


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({}, {"vae", "text_encoder"}),
        ({"text_encoder_learning_rate": 1e-4}, {"vae"}),
        ({"sample_every": 1}, set()),
    ],
)
def test_what_is_encoded_once_leaves_memory(configure: Configure, changes: dict[str, Any], gone: set[str]) -> None:
    pipeline = tiny_pipeline("sd1")
    parts = {name: weakref.ref(getattr(pipeline, name)) for name in ("vae", "text_encoder")}
    training = prepared(configure(**changes), pipeline)
    gc.collect()
    assert {name for name, part in parts.items() if part() is None} == gone
    assert next(train(training)).loss > 0


def test_the_course_of_the_learning_rate_does_not_depend_on_accumulation(configure: Configure) -> None:
    changes = {"steps": 4, "lr_scheduler": "linear", "warmup_steps": 2, "learning_rate": 1.0, "optimizer": "sgd"}
    for accumulation in (1, 2):
        steps, _ = steps_of(configure(**changes, gradient_accumulation=accumulation, max_grad_norm=1e-6))
        assert [step.learning_rates["unet"] for step in steps] == [0.0, 0.5, 1.0, 0.5]


def test_a_loss_that_is_nan_names_step_and_picture_and_changes_nothing(configure: Configure) -> None:
    training = prepared(configure(steps=9, batch_size=2), tiny_pipeline("sd1"))
    training.examples.latents[3][:] = float("nan")
    before: dict[str, torch.Tensor] = {}
    with pytest.raises(Diverged, match=r"the loss became nan or infinite at step \d on 3\.png$"):
        for _ in train(training):
            before = factors(training)
    assert before and all(torch.equal(before[name], factor) for name, factor in factors(training).items())


def test_gradients_that_overflow_stop_the_run_too(configure: Configure) -> None:
    training = prepared(configure(), tiny_pipeline("sd1"))
    with torch.no_grad():
        training.injection.parameters()[1].fill_(1e-20)
    training.injection.parameters()[0].register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(Diverged, match="the gradient became"):
        next(train(training))


def test_targets_and_schedulers_that_do_not_fit_are_refused(configure: Configure) -> None:
    with pytest.raises(SdloraError, match="matches no"):
        prepared(configure(targets=("nonsense",)), tiny_pipeline("sd1"))
    pipeline = tiny_pipeline("sd1", prediction_type="epsilon")
    pipeline.scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(SdloraError, match="'flow'"):
        prepared(configure(), pipeline)
