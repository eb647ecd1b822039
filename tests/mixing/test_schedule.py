"""Schedules: what is in force at each step, and how it is written."""

import pytest

from sdlora.errors import SdloraError
from sdlora.mixing.schedule import ALWAYS, Schedule, in_turn, parse_schedule, product, progress_of, window


def steps_of(schedule: Schedule, steps: int) -> list[float]:
    return [schedule.at(progress_of(step, steps)) for step in range(steps)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("0.2-0.8", [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]),
        ("0.5-", [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]),
        ("-.5", [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]),
        ("0:0, 1:1", [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95]),
        ("0:-1 0.5:-1 0.5:2", [-1, -1, -1, -1, -1, 2, 2, 2, 2, 2]),
        ("0.5:0.3", [0.3] * 10),
    ],
)
def test_texts_mean_what_they_say_at_each_of_ten_steps(text: str, expected: list[float]):
    schedule = parse_schedule(text)
    assert steps_of(schedule, 10) == pytest.approx(expected)
    assert parse_schedule(str(schedule)) == schedule


@pytest.mark.parametrize("text", ["0.8-0.2", "0.5", "often", "0:0, 0.5", "1:0, 0:1", "0:0, 2:1", "0:1e999", "-", "0-2"])
def test_what_is_no_schedule_is_refused_with_an_example(text: str):
    with pytest.raises(SdloraError, match='write a window such as "0.2-0.8"'):
        parse_schedule(text)


def test_a_schedule_knows_whether_it_moves():
    assert ALWAYS.level == 1 and Schedule(((0, 0.4), (1, 0.4))).level == 0.4
    assert window(0.2).level is None and window() is ALWAYS


def test_thirds_survive_being_written():
    schedule = window(1 / 3, 2 / 3)
    assert parse_schedule(str(schedule)) == schedule
    assert steps_of(schedule, 3) == [0, 1, 0] and sum(steps_of(schedule, 300)) == 100


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_turns_take_every_step_once_in_order(steps: int, every: int):
    turns = [steps_of(in_turn(index, 3, steps, every), steps) for index in range(3)]
    assert [column.index(1) for column in zip(*turns, strict=True)] == [step // every % 3 for step in range(steps)]
    assert all(sum(column) == 1 for column in zip(*turns, strict=True))


def test_a_product_is_exact_at_every_step():
    one, other = parse_schedule("0:0, 1:1"), window(0.25, 0.75)
    expected = [a * b for a, b in zip(steps_of(one, 8), steps_of(other, 8), strict=True)]
    assert steps_of(product(one, other, 8), 8) == pytest.approx(expected)
    assert product(one, ALWAYS, 8) is one and product(ALWAYS, other, 8) is other
