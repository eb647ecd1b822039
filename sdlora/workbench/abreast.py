"""Work on many matrices, several abreast."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

AT_A_TIME = 4  # the largest modules of SDXL take some 0.7 GB each

S = TypeVar("S")
T = TypeVar("T")


def abreast(work: Callable[[S], T], items: Sequence[S]) -> Iterator[tuple[S, T]]:
    """(item, work(item)) in order; several at a time, each on one thread.

    Several threads gain little on one matrix of a layer's size, and where a core is busy they wait for each other.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(min(threads, AT_A_TIME), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from zip(items, pool.map(work, items), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what the workers set holds for threads to come, too
