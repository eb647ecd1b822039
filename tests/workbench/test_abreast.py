"""Work abreast goes on one thread each, and leaves torch's threads to everybody else as they were."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Event

import pytest
import torch

from sdlora.workbench.abreast import abreast


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def threads_elsewhere() -> int:
    """What torch takes in a thread that has just begun."""
    with ThreadPoolExecutor(1) as new:
        return new.submit(torch.get_num_threads).result()


def test_results_come_in_order_each_made_on_one_thread() -> None:
    found = list(abreast(lambda item: (item * item, torch.get_num_threads()), range(20)))
    assert found == [(item, (item * item, 1)) for item in range(20)]


def test_threads_that_begin_meanwhile_have_all_of_torch_s() -> None:
    for _ in abreast(str, range(5)):
        assert threads_elsewhere() == 3
    assert torch.get_num_threads() == threads_elsewhere() == 3


def test_two_at_once_from_new_threads_leave_all_of_torch_s() -> None:
    with ThreadPoolExecutor(1) as caller:
        first, second = iter(abreast(str, range(5))), iter(abreast(str, range(5)))
        next(first)
        caller.submit(next, second).result()
        assert len(list(first)) == 4 and len(caller.submit(list, second).result()) == 4
    assert torch.get_num_threads() == threads_elsewhere() == 3


def test_two_that_begin_at_once_leave_all_of_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let in, the second would take one thread for what torch had, and put that back last."""
    workers, first_there, second_there, first_done = count(1), Event(), Event(), Event()

    def on_one_thread() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()
        worker = next(workers)
        if worker == 3:
            first_there.set()
            second_there.wait(0.5)
        elif worker > 3:
            second_there.set()
            first_done.wait(5)

    def second() -> list[tuple[int, str]]:
        first_there.wait()
        return list(abreast(str, range(5)))

    monkeypatch.setattr(sys.modules[abreast.__module__], "_on_one_thread", on_one_thread)
    with ThreadPoolExecutor(1) as caller:
        waiting = caller.submit(second)
        found = list(abreast(str, range(5)))
        first_done.set()
        assert waiting.result() == found
    assert torch.get_num_threads() == threads_elsewhere() == 3


def test_what_a_worker_raises_comes_out() -> None:
    with pytest.raises(ZeroDivisionError):
        list(abreast(lambda item: 1 / item, [1, 0]))
    assert threads_elsewhere() == 3
