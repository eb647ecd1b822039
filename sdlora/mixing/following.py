"""How far a denoising is, as whoever calls the UNet shows it: so schedules hold in diffusers' own pipelines, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdlora.mixing.schedule import progress_of

HALF = 0.5  # by so much a timestep below 1000 may differ once it was in half precision


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

    def __deepcopy__(self, memo: Any) -> Follower:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A UNet that is saved whole goes without the pipeline."""
        return Follower, (_nobody, self.weights)


def _nobody() -> None:
    """Where a pipeline was."""


def progress_shown(scheduler: Any, timestep: float) -> float:
    """The middle of the step, among all the scheduler's, that a timestep belongs to.

    img2img leaves out the first steps, and what a schedule says of them. Where a scheduler comes to a timestep twice,
    as those of second order at the end of a step and at the beginning of the next, it counts them itself. A timestep
    that it does not have, or comes when it is done, is another scheduler's; then its noise tells how far that is.
    """
    times = torch.as_tensor(scheduler.timesteps).tolist()
    counted = getattr(scheduler, "step_index", getattr(scheduler, "counter", None))
    away = [abs(one - timestep) for one in times]
    if not away or min(away) > HALF or counted == len(times):
        return 1 - (timestep + 0.5) / scheduler.config.num_train_timesteps
    calls = [call for call, distance in enumerate(away) if distance == min(away)]
    call = counted if counted in calls else calls[0]
    return progress_of(call * _steps(scheduler) // len(times), _steps(scheduler))


def _steps(scheduler: Any) -> int:
    """Of its run. Where timesteps are given one by one, schedulers keep the number of the run before."""
    calls, steps = len(scheduler.timesteps), scheduler.num_inference_steps or 0
    return steps if steps <= calls <= max(2 * steps - 1, steps + 1) else calls
