"""Work on many matrices, several abreast."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock
from typing import TypeVar

import torch

AT_A_TIME = 4  # the largest modules of SDXL take some 0.7 GB each

S = TypeVar("S")
T = TypeVar("T")

_starting = Lock()


def abreast(work: Callable[[S], T], items: Sequence[S]) -> Iterator[tuple[S, T]]:
    """(item, work(item)) in order; several at a time, each on one thread.

    Several threads gain little on one matrix of a layer's size, and where a core is busy they wait for each other.
    """
    pool = _workers()
    try:
        yield from zip(items, pool.map(work, items), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _workers() -> ThreadPoolExecutor:
    """Started threads in which torch works on one thread each.

    What a thread sets for itself torch gives to all that come after, too. So all workers start at once, and it is put
    back before anybody else looks.
    """
    with _starting:
        threads = torch.get_num_threads()
        count = min(threads, AT_A_TIME)
        pool = ThreadPoolExecutor(count, initializer=_on_one_thread)
        all_there = Barrier(count)
        list(pool.map(lambda _: all_there.wait(), range(count)))
        torch.set_num_threads(threads)
    return pool


def _on_one_thread() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread looks once, the first time that it needs to know
