"""Chance as a function of seed and place; batches that are full, of one bucket, and fair."""

from collections import Counter
from itertools import islice

import pytest
import torch

from sdlora.training.draws import draw, dropout_chance, seed_of
from sdlora.training.order import batches, steps_of

SHAPE = (4, 8, 6)


def test_a_draw_depends_on_seed_and_sample_alone() -> None:
    before = torch.random.get_rng_state()
    one, same = (draw(3, 17, SHAPE, 1000, 0.5, 0.1) for _ in range(2))
    assert torch.equal(one.noise, same.noise) and (one.timestep, one.dropped) == (same.timestep, same.dropped)
    for other in (draw(4, 17, SHAPE, 1000, 0.5, 0.1), draw(3, 18, SHAPE, 1000, 0.5, 0.1)):
        assert not torch.equal(one.noise, other.noise)
    assert torch.equal(before, torch.random.get_rng_state())


def test_draws_have_the_distributions_they_should() -> None:
    draws = [draw(0, sample, SHAPE, 1000, 0.1, 0.0) for sample in range(4000)]
    noise = torch.stack([one.noise for one in draws])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    timesteps = torch.tensor([one.timestep for one in draws], dtype=torch.float)
    assert timesteps.min() < 10 and timesteps.max() > 989 and abs(timesteps.mean() - 499.5) < 15
    assert abs(sum(one.dropped for one in draws) / 4000 - 0.1) < 0.02


@pytest.mark.parametrize(("chance", "expected"), [(0.0, {False}), (1.0, {True})])
def test_caption_dropout_never_and_always(chance: float, expected: set[bool]) -> None:
    assert {draw(0, sample, SHAPE, 1000, chance, 0.0).dropped for sample in range(200)} == expected


def test_noise_offset_adds_variance_to_channel_means_only() -> None:
    plain, offset = (
        torch.stack([draw(0, sample, (4, 16, 16), 1000, 0.0, strength).noise for sample in range(1000)])
        for strength in (0.0, 0.5)
    )
    added = offset - plain
    torch.testing.assert_close(added, added[..., :1, :1].expand_as(added), rtol=0, atol=1e-5)
    assert abs(added[..., 0, 0].std() - 0.5) < 0.03


def test_dropout_chance_leaves_the_generator_as_it_was() -> None:
    before = torch.random.get_rng_state()
    with dropout_chance(1, 5):
        first = torch.rand(3)
    with dropout_chance(1, 5):
        assert torch.equal(first, torch.rand(3))
    assert torch.equal(before, torch.random.get_rng_state())
    assert len({seed_of(1, "dropout", 5), seed_of(1, "sample", 5), seed_of(2, "dropout", 5), seed_of(1, "x", 5)}) == 4


GROUPS = [[0, 1, 2, 3, 4], [5, 6, 7], [8]]


@pytest.mark.parametrize("batch", [1, 2, 4, 7])
def test_batches_are_full_and_of_one_bucket(batch: int) -> None:
    for members in islice(batches(GROUPS, batch, seed=0), 50):
        assert len(members) == batch
        assert any(set(members) <= set(group) for group in GROUPS)


@pytest.mark.parametrize("batch", [1, 2, 4, 7])
def test_every_picture_is_seen_equally_often_in_the_long_run(batch: int) -> None:
    epochs = 70
    seen = Counter(i for members in islice(batches(GROUPS, batch, 0), steps_of(epochs, GROUPS, batch)) for i in members)
    assert seen.keys() == set(range(9))
    assert all(epochs <= count <= epochs + batch for count in seen.values())


def test_the_first_epoch_shows_every_picture() -> None:
    steps = steps_of(1, GROUPS, 2)
    assert steps == 3 + 2 + 1
    assert {i for members in islice(batches(GROUPS, 2, 9), steps) for i in members} == set(range(9))


def test_order_follows_the_seed_and_changes_from_epoch_to_epoch() -> None:
    one, same, other = (list(islice(batches(GROUPS, 1, seed), 18)) for seed in (0, 0, 1))
    assert one == same != other
    assert one[:9] != one[9:]
