"""Several LoRAs in one picture, and pictures with weights of their own in one batch."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sdlora.errors import SdloraError
from sdlora.formats.block_weights import BLOCKS
from sdlora.formats.write import write
from sdlora.generation.composition import grid, ladder, voices
from sdlora.generation.job import Job, LoraWeight
from sdlora.generation.render import Picture, Progress, denoise, hold, render
from sdlora.lowrank.adapter import Adapter
from sdlora.mixing.mixer import Mixer
from sdlora.mixing.schedule import parse_schedule, progress_of
from sdlora.models.families import components_of
from tests.conftest import random_adapter
from tests.mixing.states import same_state, state_of
from tests.tiny import tiny_pipeline

JOB = Job(prompt="a red cat", negative_prompt="blue", model="tiny", seed=7, steps=4, width=64, height=48)


@pytest.fixture
def mixer() -> Mixer:
    return Mixer(tiny_pipeline())


@pytest.fixture
def loras(mixer: Mixer, tmp_path: Path) -> tuple[LoraWeight, ...]:
    made = []
    for seed in range(3):
        adapter, path = random_adapter(components_of(mixer.pipeline), seed), tmp_path / f"{seed}.safetensors"
        write(Adapter(adapter.deltas), path, "kohya")
        made.append(LoraWeight(path=str(path), unet=0.4, text_encoder=0.2))
    return tuple(made)


def latents_of(mixer: Mixer, *jobs: Job) -> list[torch.Tensor]:
    """The latents after each step."""
    return list(denoise(mixer, hold(mixer, jobs)))


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-4 * other.abs().max())


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("scheduler", ["default", "euler_a", "dpmpp_2m"])
def test_a_grid_is_one_batch_and_each_cell_is_the_picture_made_alone(kind: str, scheduler: str, tmp_path: Path):
    mixer, paths = Mixer(tiny_pipeline(kind)), []
    for seed in range(2):
        paths.append(tmp_path / f"{seed}.safetensors")
        write(Adapter(random_adapter(components_of(mixer.pipeline), seed).deltas), paths[-1], "diffusers")
    job = replace(JOB, scheduler=scheduler, loras=tuple(LoraWeight(path=str(path)) for path in paths))
    cells = grid(job, 0, [0.0, 0.3, -0.2], 1, [0.0, 0.4])
    assert [[lora.unet for lora in cell.loras] for cell in cells][:4] == [[0, 0], [0.3, 0], [-0.2, 0], [0, 0.4]]
    sizes: list[int] = []
    mixer.pipeline.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    together = latents_of(mixer, *cells)[-1]
    assert sizes == [12] * JOB.steps, "six cells with their negatives go through the UNet at once"
    for cell, latents in zip(cells, together, strict=True):
        assert close(latents[None], latents_of(mixer, cell)[-1])
    assert not close(together[0], together[1])


def test_a_ladder_renders_its_pictures_in_order_with_jobs_that_make_them_again(mixer: Mixer, loras):
    jobs = ladder(replace(JOB, loras=loras[:2]), 0, [0, 0.25, 0.5])
    events = list(render(mixer, *jobs, rows=2))
    assert events[0] == Progress(0, 1, 4, 2) and Progress(2, 1, 4, 1) in events
    pictures = [event for event in events if isinstance(event, Picture)]
    assert [picture.job.loras[0].unet for picture in pictures] == [0, 0.25, 0.5]
    for picture in pictures:
        (alone,) = (event for event in render(mixer, picture.job) if isinstance(event, Picture))
        difference = np.asarray(alone.image).astype(int) - np.asarray(picture.image)
        assert np.abs(difference).max() <= 2 and alone.job == picture.job


def test_large_pictures_are_denoised_few_at_a_time(mixer: Mixer, loras, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sdlora.generation.render.AT_ONCE", 3 * 64 * 48 + 1)
    events = render(mixer, *ladder(replace(JOB, loras=loras[:1]), 0, [0, 1, 2, 3, 4]))
    assert [event.together for event in events if isinstance(event, Progress) and event.step == 1] == [3, 2]


def test_pictures_beside_one_that_becomes_nan_are_given_out_and_its_weights_are_named(mixer: Mixer, loras):
    jobs = ladder(replace(JOB, loras=loras[:2]), 0, [0.25, 1e30, 0.5, -1e30])
    found: list[Picture] = []
    with pytest.raises(SdloraError) as error:
        found.extend(event for event in render(mixer, *jobs) if isinstance(event, Picture))
    assert [picture.job.loras[0].unet for picture in found] == [0.25, 0.5]
    assert str(error.value) == (
        "the picture has become nan with <lora:0:0.2:1e+30> <lora:1:0.2:0.4> and with "
        "<lora:0:0.2:-1e+30> <lora:1:0.2:0.4>; use smaller LoRA weights, less guidance or another scheduler"
    )
    assert not mixer.lock.locked()


def test_jobs_that_differ_in_more_than_weights_are_rendered_one_by_one(mixer: Mixer, loras):
    events = list(render(mixer, JOB, replace(JOB, prompt="a dog"), replace(JOB, steps=2)))
    assert {event.together for event in events if isinstance(event, Progress)} == {1}
    assert [event.job.prompt for event in events if isinstance(event, Picture)] == ["a red cat", "a dog", "a red cat"]


def test_a_schedule_gives_each_step_the_weight_it_says(mixer: Mixer, loras):
    """Against the same denoising with the weights set by hand before each step."""
    schedule = parse_schedule("0:0, 0.5:1, 0.5:0.2")
    job = replace(JOB, loras=(replace(loras[0], schedule=schedule, text_encoder=0.0),))
    ours = latents_of(mixer, job)
    plain = replace(job, loras=(replace(job.loras[0], schedule=parse_schedule("")),))
    held = hold(mixer, [plain])
    by_hand, steps = [], denoise(mixer, held)
    path = mixer.plans[0].loras[0].path
    hook = mixer.pipeline.unet.register_forward_pre_hook(
        lambda *_: mixer.set({path: {"unet": 0.4 * schedule.at(progress_of(len(by_hand), JOB.steps))}})
    )
    try:
        for latents in steps:
            by_hand.append(latents)
    finally:
        hook.remove()
    assert all(close(one, other) for one, other in zip(ours, by_hand, strict=True))
    assert not close(ours[-1], latents_of(mixer, plain)[-1])


def test_switching_is_a_schedule_of_turns(mixer: Mixer, loras):
    job = replace(JOB, steps=6, loras=loras, compose="switch", switch_every=2)
    (voice,) = voices(job)
    by_step = [[lora.schedule.at(progress_of(step, 6)) for lora in voice] for step in range(6)]
    assert by_step == [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]]
    assert not close(latents_of(mixer, job)[-1], latents_of(mixer, replace(job, compose="sum"))[-1])


@pytest.mark.parametrize(
    "silent",
    [{"on": False}, {"unet": 0.0}, {"blocks": {block: 0.0 for block in BLOCKS}}, {"schedule": "0.26-0.3"}],
    ids=lambda told: next(iter(told)),
)
def test_a_lora_that_does_nothing_in_the_unet_takes_no_turn_and_no_voice(mixer: Mixer, loras, silent):
    """Else a weight of 0 would dilute the others, and would not be what it is to be without the LoRA."""
    silenced = (replace(loras[0], text_encoder=0.0, **silent), *loras[1:])
    for compose in ("switch", "composite"):
        without = latents_of(mixer, replace(JOB, loras=loras[1:], compose=compose))
        assert close(latents_of(mixer, replace(JOB, loras=silenced, compose=compose))[-1], without[-1])
        assert not close(latents_of(mixer, replace(JOB, loras=loras, compose=compose))[-1], without[-1])


def test_a_ladder_moves_text_encoders_only_with_the_unet(loras):
    """What people set apart stays as they set it."""
    for told, found in (
        ({"text_encoder": 0.4}, (0.9, None)),
        ({"text_encoder": 0.0}, (0.0, None)),
        ({"text_encoder": 0.4, "text_encoder_2": 0.1}, (0.9, 0.1)),
        ({"text_encoder": 0.1, "text_encoder_2": 0.4}, (0.1, 0.9)),
    ):
        (job,) = ladder(replace(JOB, loras=(replace(loras[0], **told),)), 0, [0.9])
        assert (job.loras[0].unet, job.loras[0].text_encoder, job.loras[0].text_encoder_2) == (0.9, *found)


def test_a_composite_follows_the_mean_of_what_each_lora_predicts(mixer: Mixer, loras):
    """One step of the formula, with the predictions of each LoRA alone taken one by one."""
    job = replace(JOB, steps=1, loras=tuple(replace(lora, text_encoder=0.0) for lora in loras), compose="composite")
    seen: list[torch.Tensor] = []
    hook = mixer.pipeline.unet.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    for lora in job.loras:
        latents_of(mixer, replace(job, loras=(lora,)))
    alone = [without + 5 * (prompted - without) for without, prompted in seen]
    seen.clear()
    latents_of(mixer, job)
    hook.remove()
    (batch,) = seen
    without, prompted = batch.chunk(2)
    assert len(without) == 3
    assert close((without + 5 * (prompted - without)).mean(0), torch.stack(alone).mean(0))


def test_and_adds_what_each_part_differs_by(mixer: Mixer):
    job = replace(JOB, steps=1, prompt="a red cat AND a dog :0.5")
    seen: list[torch.Tensor] = []
    mixer.pipeline.unet.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    (ours,) = latents_of(mixer, job)
    (batch,) = seen
    assert len(batch) == 3
    seen.clear()
    for prompt in ("a red cat", "a dog"):
        latents_of(mixer, replace(job, prompt=prompt))
    (without, cat), (_, dog) = seen
    guided = without + 5 * (cat - without) + 2.5 * (dog - without)
    again = without + 5 * (batch[1] - batch[0]) + 2.5 * (batch[2] - batch[0])
    assert close(again, guided) and ours.shape == (1, 4, 6, 8)


def test_a_job_leaves_nothing_in_the_base(mixer: Mixer, loras):
    before = state_of(mixer.pipeline)
    for compose in ("sum", "switch", "composite"):
        list(render(mixer, replace(JOB, loras=loras, compose=compose)))
    list(render(mixer, *ladder(replace(JOB, loras=loras), 1, [0, 1])))
    mixer.hold()
    assert same_state(mixer.pipeline, before)


def test_prompts_are_encoded_anew_only_when_the_text_encoders_change(mixer: Mixer, loras):
    calls: list[int] = []
    mixer.pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for lora in (loras[0], replace(loras[0], unet=-1.0), replace(loras[0], text_encoder=0.7), loras[0]):
        calls.clear()
        latents_of(mixer, replace(JOB, loras=(lora,)))
        counts.append(len(calls))
    assert counts == [2, 0, 2, 0], "prompt and negative prompt, once for each state of the text encoder"
