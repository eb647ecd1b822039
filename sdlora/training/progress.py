"""The live line of a training run: step, smoothed loss, learning rate, images/s, time left."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import TextIO

from sdlora.training.loop import Step

SMOOTHING = 0.98  # of the mean over the past; about the last 50 steps count
LINE_EVERY = 30.0  # seconds between lines where the output is no terminal


@dataclass
class Smoothed:
    """Exponential mean without the pull to 0 that its start would have (as Adam's, arXiv:1412.6980 section 3)."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float) -> float:
        """Take in a value; the mean including it."""
        self.total = SMOOTHING * self.total + (1 - SMOOTHING) * value
        self.weight = SMOOTHING * self.weight + (1 - SMOOTHING)
        return self.total / self.weight


@dataclass
class Progress:
    """Call it with every step. On a terminal one line is rewritten; elsewhere a line is written now and then."""

    out: TextIO = field(default_factory=lambda: sys.stderr)
    clock: Callable[[], float] = monotonic
    loss: Smoothed = field(default_factory=Smoothed)
    seconds: Smoothed = field(default_factory=Smoothed)
    written: float = -LINE_EVERY
    open: bool = False

    def __call__(self, step: Step) -> None:
        text = describe(step, self.loss.add(step.loss), self.seconds.add(step.seconds))
        last = step.index == step.steps
        if self.out.isatty():
            width = shutil.get_terminal_size().columns - 1
            self.out.write(f"\r{bar(step.index / step.steps)} {text}"[: width + 1].ljust(width + 1))
            self.open = True
        elif last or self.clock() - self.written >= LINE_EVERY:
            self.out.write(text + "\n")
            self.written = self.clock()
        self.out.flush()
        if last:
            self.close()

    def close(self) -> None:
        """End the live line, so that what is printed next stands on its own."""
        if self.open:
            self.out.write("\n")
            self.out.flush()
        self.open = False


def describe(step: Step, loss: float, seconds: float) -> str:
    """ "120/1000  loss 0.1234  lr 1.0e-04  3.2 images/s  4:35 left" """
    rates = " ".join(f"{rate:.1e}" for rate in dict.fromkeys(step.learning_rates.values()))
    speed = len(step.pictures) / max(seconds, 1e-9)
    left = clock_time((step.steps - step.index) * seconds)
    return f"{step.index}/{step.steps}  loss {loss:.4f}  lr {rates}  {speed:.3g} images/s  {left} left"


def clock_time(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def bar(share: float, width: int = 20) -> str:
    """A bar of block characters for a share from 0 to 1."""
    filled = int(share * width)
    return "█" * filled + "░" * (width - filled)
