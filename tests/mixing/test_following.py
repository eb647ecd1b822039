"""Schedules follow whoever denoises, by the timesteps that the UNet is given."""

from typing import Any

import diffusers
import pytest
import torch

from sdlora.generation.job import SCHEDULERS
from sdlora.mixing.following import progress_shown
from sdlora.mixing.schedule import progress_of

OTHERS = {
    "ddim": ("DDIMScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
}
KINDS = {**{name: told[:2] for name, told in SCHEDULERS.items()}, **OTHERS}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_every_call_of_every_scheduler_is_in_the_step_that_it_makes(name: str, steps: int):
    """As `render` counts them: calls are spread evenly over the steps where a scheduler makes two a step."""
    kind, settings = KINDS[name]
    scheduler: Any = getattr(diffusers, kind)(**settings)
    chance = torch.Generator().manual_seed(0)
    for _ in range(2):
        scheduler.set_timesteps(steps)
        calls = len(scheduler.timesteps)
        latents = torch.zeros(1, 4, 2, 2)
        for call, timestep in enumerate(scheduler.timesteps):
            assert progress_shown(scheduler, float(timestep)) == progress_of(call * steps // calls, steps), call
            scheduler.scale_model_input(latents, timestep)
            more = {"generator": chance} if name in ("euler_a", "lcm") else {}
            latents = scheduler.step(torch.zeros_like(latents), timestep, latents, **more).prev_sample


def test_img2img_begins_where_it_begins():
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(20)
    assert progress_shown(scheduler, float(scheduler.timesteps[12])) == progress_of(12, 20)


def test_a_timestep_in_half_precision_is_known():
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(7)
    for step, timestep in enumerate(scheduler.timesteps.half()):
        assert progress_shown(scheduler, float(timestep)) == progress_of(step, 7)


def test_timesteps_of_ones_own_are_counted_by_themselves():
    scheduler = diffusers.DDPMScheduler()
    for before in (50, 2):
        scheduler.set_timesteps(before)
        scheduler.set_timesteps(timesteps=[900, 600, 300, 10])
        shown = [progress_shown(scheduler, float(one)) for one in scheduler.timesteps]
        assert shown == [progress_of(step, 4) for step in range(4)]


def test_what_another_scheduler_asks_for_is_told_by_its_noise():
    scheduler, other = diffusers.EulerDiscreteScheduler(), diffusers.DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(3)
    for timestep in scheduler.timesteps:  # one of which the other has too
        scheduler.step(torch.zeros(1, 4, 2, 2), timestep, torch.zeros(1, 4, 2, 2))
    other.set_timesteps(10)
    shown = [progress_shown(scheduler, float(one)) for one in other.timesteps]
    assert shown == pytest.approx([progress_of(step, 10) for step in range(10)], abs=0.06)
    assert shown == sorted(set(shown))
