"""Which pictures each step sees: endless, always full batches, never from two buckets, every picture equally often."""

from collections.abc import Iterator, Sequence

import torch

from sdlora.training.draws import generator


def batches(groups: Sequence[Sequence[int]], batch: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of picture indexes, each from one group (bucket).

    Each bucket is an endless stream, its pictures shuffled anew at each pass, cut into full batches; a batch may reach
    into the next pass. In every epoch a bucket gives as many batches as its share has come to by then, and the batches
    of an epoch are shuffled. So no picture is left out or preferred in the long run, and no batch is ever short, which
    would make gradient accumulation and several processes weigh its pictures differently.
    """
    epoch = 0
    while True:
        due = [
            (group, number)
            for group, members in enumerate(groups)
            for number in range(_due(epoch, len(members), batch), _due(epoch + 1, len(members), batch))
        ]
        for choice in _shuffled(len(due), seed, "epoch", epoch):
            group, number = due[choice]
            yield [
                _member(groups[group], position, seed, group)
                for position in range(number * batch, (number + 1) * batch)
            ]
        epoch += 1


def steps_of(epochs: int, groups: Sequence[Sequence[int]], batch: int) -> int:
    """How many batches the first epochs hold."""
    return sum(_due(epochs, len(members), batch) for members in groups)


def _due(epochs: int, members: int, batch: int) -> int:
    """Batches that a bucket has given after so many epochs: rounded up, so the first epoch shows every picture."""
    return -(-epochs * members // batch)


def _member(members: Sequence[int], position: int, seed: int, group: int) -> int:
    """The picture at a position of a bucket's endless stream."""
    turn, place = divmod(position, len(members))
    return members[_shuffled(len(members), seed, "bucket", group, turn)[place]]


def _shuffled(count: int, seed: int, *purpose: str | int) -> list[int]:
    return torch.randperm(count, generator=generator(seed, *purpose)).tolist()
