"""Schedules: how much of an adapter's weight is in force, over the denoising steps."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from math import isfinite

from sdlora.errors import SdloraError
from sdlora.formats.numbers import short

Point = tuple[float, float]  # progress from 0 (pure noise) to 1 (the picture), and the factor there

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_WINDOW = re.compile(r"(\d*\.?\d*)\s*-\s*(\d*\.?\d*)")
_POINT = re.compile(rf"({_NUMBER})\s*:\s*({_NUMBER})")
FORMS = 'write a window such as "0.2-0.8", or points such as "0:0, 0.5:1, 1:0"'


@dataclass(frozen=True)
class Schedule:
    """A curve over the denoising: straight lines between points, level before the first and behind the last.

    Two points at one place are a jump, and the second counts there. No points: 1 throughout.
    Positions out of 0..1 or not in order, and numbers that are not finite, raise SdloraError.
    """

    points: tuple[Point, ...] = ()

    def __post_init__(self) -> None:
        try:
            points = tuple((float(position), float(factor)) for position, factor in self.points)
        except (TypeError, ValueError):
            raise SdloraError(f"{self.points!r} are no points of a schedule; {FORMS}") from None
        object.__setattr__(self, "points", points)
        positions = [position for position, _ in points]
        if not all(isfinite(number) for point in points for number in point):
            raise SdloraError(f"the schedule {self} holds a number that is not finite; {FORMS}")
        if positions != sorted(positions) or any(not 0 <= position <= 1 for position in positions):
            raise SdloraError(f"the schedule {self} must have rising positions from 0 to 1; {FORMS}")

    def __str__(self) -> str:
        """As `parse_schedule` reads it back, exactly."""
        return ", ".join(f"{short(position)}:{short(factor)}" for position, factor in self.points)

    @property
    def level(self) -> float | None:
        """The one factor that is in force throughout, None where it changes."""
        factors = {factor for _, factor in self.points} or {1.0}
        return factors.pop() if len(factors) == 1 else None

    def at(self, progress: float) -> float:
        """The factor at a progress of 0 to 1."""
        if not self.points:
            return 1.0
        behind = bisect_right(self.points, progress, key=lambda point: point[0])
        if behind in (0, len(self.points)):
            return self.points[max(behind - 1, 0)][1]
        (left, low), (right, high) = self.points[behind - 1 : behind + 1]
        return low + (high - low) * (progress - left) / (right - left)


ALWAYS = Schedule()


def progress_of(step: int, steps: int) -> float:
    """Where step `step`, from 0, of `steps` stands: its middle, so that a border between two steps belongs to neither.

    Half of 20 steps are 10: those before 0.5 and those behind it.
    """
    return (step + 0.5) / steps


def window(start: float = 0.0, stop: float = 1.0) -> Schedule:
    """In force from `start` to `stop` of the progress, and nowhere else."""
    if not 0 <= start < stop <= 1:
        raise SdloraError(f"the window {start:g}-{stop:g} is none; {FORMS}")
    before = ((0.0, 0.0), (start, 0.0)) if start > 0 else ()
    behind = ((stop, 0.0), (1.0, 0.0)) if stop < 1 else ()
    return Schedule((*before, (start, 1.0), (stop, 1.0), *behind)) if before or behind else ALWAYS


def parse_schedule(text: str) -> Schedule:
    """ "0.2-0.8", "0.3-", "-0.5", or points "0:0, 0.5:1, 1:0"; nothing: 1 throughout. SdloraError for anything else."""
    text = text.strip()
    if not text:
        return ALWAYS
    spread = _WINDOW.fullmatch(text)
    if spread and any(side not in ("", ".") for side in spread.groups()):
        start, stop = (float(side) if side not in ("", ".") else None for side in spread.groups())
        return window(0.0 if start is None else start, 1.0 if stop is None else stop)
    parts = [part.strip() for part in re.split(r"[,;\s]+(?=[-+.\d])", text)]
    points = [_POINT.fullmatch(part) for part in parts if part]
    if not points or any(point is None for point in points):
        raise SdloraError(f"the schedule {text!r} is not understood; {FORMS}")
    return Schedule(tuple((float(point[1]), float(point[2])) for point in points if point))


def in_turn(index: int, of: int, steps: int, every: int) -> Schedule:
    """LoRA Switch (arXiv:2402.16843, section 3): one of `of` adapters after the other, each for `every` steps.

    index: which of them; steps: of the denoising. It is 1 while its turn lasts, else 0.
    """
    points: list[Point] = []
    for step in range(steps):
        factor = 1.0 if step // every % of == index else 0.0
        if points and points[-1][1] == factor:
            points[-1] = ((step + 1) / steps, factor)
        else:
            points += [(step / steps, factor), ((step + 1) / steps, factor)]
    return Schedule(tuple(points))


def product(one: Schedule, other: Schedule, steps: int) -> Schedule:
    """Both at once, exact in the middle of each of `steps` steps."""
    if not one.points or not other.points:
        return one if not other.points else other
    found: list[Point] = []
    for step in range(steps):
        middle = progress_of(step, steps)
        factor = one.at(middle) * other.at(middle)
        found += [(step / steps, factor), ((step + 1) / steps, factor)]
    return Schedule(tuple(found))
