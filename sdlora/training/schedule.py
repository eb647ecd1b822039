"""The course of the learning rate as a pure function of the step, so that there is nothing to save or to advance."""

import math
from collections.abc import Callable


def factor(name: str, step: int, steps: int, warmup: int) -> float:
    """What the peak learning rate is multiplied by at a step counted from 0, of `steps` in all.

    It rises from 0 over the first `warmup` steps, then follows the course of that name: the same numbers as diffusers'
    get_scheduler gives.
    """
    if step < warmup:
        return step / warmup
    return COURSES[name](min(1.0, (step - warmup) / max(1, steps - warmup)))


def _cosine(progress: float) -> float:
    """arXiv:1608.03983, from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def _restarts(progress: float, cycles: int = 4) -> float:
    """Several cosines in a row, each from 1 to 0."""
    return _cosine(progress * cycles % 1.0) if progress < 1 else 0.0


def _linear(progress: float) -> float:
    return 1 - progress


def _polynomial(progress: float, power: float = 2.0) -> float:
    """(1 - progress)²: falls faster at first than linear."""
    return (1 - progress) ** power


COURSES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _restarts,
    "polynomial": _polynomial,
}
