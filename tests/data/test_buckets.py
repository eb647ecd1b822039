"""Aspect-ratio buckets: one area, sides the VAE can take, each picture where it loses least."""

import math
from pathlib import Path

import pytest

from sdlora.data.buckets import assign, bucket_sizes
from sdlora.data.folder import Record


def record(width: int, height: int) -> Record:
    return Record(Path("a.png"), f"{width}x{height}", "", width, height, "")


SIZES = [(64, 8), (128, 8), (256, 8), (512, 8), (1024, 8), (136, 8), (64, 2)]


@pytest.mark.parametrize(("resolution", "multiple"), SIZES)
def test_buckets_have_one_area_and_hold_the_square(resolution: int, multiple: int) -> None:
    sizes = bucket_sizes(resolution, multiple)
    assert (resolution, resolution) in sizes
    for width, height in sizes:
        assert width % multiple == height % multiple == 0
        assert (height, width) in sizes
        assert 0.5 * resolution**2 < width * height <= resolution**2


def test_sd1_gets_the_usual_buckets() -> None:
    assert {(512, 512), (448, 576), (384, 640), (768, 320), (1024, 256)} <= set(bucket_sizes(512))


def test_pictures_go_where_their_shape_is_nearest() -> None:
    bucketing = assign([record(1000, 1000), record(3000, 2000), record(2000, 3000), record(300, 4000)], 512)
    square, landscape, portrait, tower = bucketing.sizes
    assert square == (512, 512)
    assert landscape == portrait[::-1]
    assert abs(math.log(landscape[0] / landscape[1] / 1.5)) < 0.12
    assert tower == (256, 1024)


def test_enlarged_pictures_are_named_and_groups_never_mix_sizes() -> None:
    bucketing = assign([record(600, 600), record(100, 100), record(512, 512), record(1200, 800)], 512)
    assert bucketing.upscaled == ("100x100",)
    assert sorted(index for group in bucketing.groups().values() for index in group) == [0, 1, 2, 3]
    assert bucketing.groups()[512, 512] == [0, 1, 2]
    assert "1 pictures are smaller" in bucketing.summary()
