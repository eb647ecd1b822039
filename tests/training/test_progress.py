"""The live line and what it says."""

import io
import os
import signal

import pytest

from sdlora.training.interrupt import interruptible
from sdlora.training.loop import Step
from sdlora.training.progress import Progress, Smoothed, bar, clock_time, describe


def step(index: int, loss: float = 0.5, seconds: float = 0.5) -> Step:
    return Step(index, 100, loss, {"unet": 1e-4, "text_encoder": 5e-5}, 0.1, seconds, ("a.png", "b.png"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line_says_step_loss_rates_speed_and_time_left() -> None:
    assert describe(step(40), 0.25, 0.5) == "40/100  loss 0.2500  lr 1.0e-04 5.0e-05  4 images/s  0:30 left"


def test_smoothing_starts_at_the_first_value_and_follows_slowly() -> None:
    smoothed = Smoothed()
    assert smoothed.add(2.0) == pytest.approx(2.0)
    assert smoothed.add(4.0) == pytest.approx(3.01, abs=0.01)
    assert [smoothed.add(1.0) for _ in range(500)][-1] == pytest.approx(1.0, abs=1e-3)


def test_a_terminal_sees_one_line_rewritten() -> None:
    out = Terminal()
    progress = Progress(out)
    for index in range(1, 101):
        progress(step(index))
    progress.close()
    text = out.getvalue()
    assert text.count("\r") == 100 and text.count("\n") == 1 and text.endswith("\n")
    assert "100/100" in text and "░" in text and bar(0.5, 4) == "██░░"


def test_elsewhere_lines_come_now_and_then() -> None:
    out, now = io.StringIO(), [0.0]
    progress = Progress(out, clock=lambda: now[0])
    for index in range(1, 101):
        now[0] += 1
        progress(step(index))
    lines = out.getvalue().splitlines()
    assert [line.split("/")[0] for line in lines] == ["1", "31", "61", "91", "100"]


def test_times() -> None:
    assert [clock_time(seconds) for seconds in (0.4, 65, 3725)] == ["0:00", "1:05", "1:02:05"]


def test_the_first_ctrl_c_asks_and_the_second_breaks_off() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as asked:
        assert not asked.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
