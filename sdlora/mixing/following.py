"""How far a denoising is, as whoever calls the UNet shows it: so schedules hold in diffusers' own pipelines, too."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdlora.mixing.schedule import progress_of


@dataclass(frozen=True, eq=False)
class Follower:
    """The weights of live layers for a pass of the UNet.

    pipeline: the one whose scheduler knows the timesteps; None when it is gone, and then there are no other weights.
    weights: of slots, by progress from 0 to 1.
    """

    pipeline: Callable[[], Any]
    weights: Callable[[float], Tensor]

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """args, kwargs: those of the pass."""
        pipeline = self.pipeline()
        if pipeline is None:
            return None
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        return self.weights(progress_shown(pipeline.scheduler, float(torch.as_tensor(timestep).flatten()[0])))


def progress_shown(scheduler: Any, timestep: float) -> float:
    """The middle of the step, among all the scheduler's, that a timestep belongs to.

    img2img leaves out the first steps, and what a schedule says of them. Second-order schedulers come to a timestep
    twice, at the end of a step and at the beginning of the next; which of them it is, they count themselves.
    """
    away = [abs(float(one) - timestep) for one in scheduler.timesteps]
    calls = [call for call, distance in enumerate(away) if distance == min(away)]
    counted = getattr(scheduler, "step_index", None)
    call = counted if counted in calls else calls[0]
    steps = scheduler.num_inference_steps or len(away)
    return progress_of(call * steps // len(away), steps)
