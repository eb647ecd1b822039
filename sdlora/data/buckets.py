"""Aspect-ratio buckets: sizes of about one area, so that pictures are cut little and squashed never."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sdlora.data.folder import Record, listed
from sdlora.data.pictures import cover

Size = tuple[int, int]  # (width, height) in pixels


@dataclass(frozen=True)
class Bucketing:
    """The bucket of each record, in the records' order."""

    resolution: int
    sizes: tuple[Size, ...]
    upscaled: tuple[str, ...]

    def groups(self) -> dict[Size, list[int]]:
        """Indexes of the records in each bucket that holds any."""
        return {size: [i for i, own in enumerate(self.sizes) if own == size] for size in sorted(set(self.sizes))}

    def summary(self) -> str:
        """Pictures per bucket on one line, and how many had to be enlarged."""
        counts = ", ".join(f"{w}x{h}: {len(members)}" for (w, h), members in self.groups().items())
        enlarged = f"{len(self.upscaled)} pictures are smaller than their bucket and enlarged: {listed(self.upscaled)}"
        return f"buckets {counts}" + (f"\n{enlarged}" if self.upscaled else "")


def bucket_sizes(resolution: int, multiple: int = 8) -> list[Size]:
    """Sizes from 1:4 to 4:1 of at most resolution² pixels, sides in steps of about an eighth of it, at most 64 pixels.

    multiple: what every side must be divisible by, the VAE's factor.
    """
    step = max(multiple, min(64, resolution // 8) // multiple * multiple)
    area = resolution * resolution
    sides = range(step, 2 * resolution + 1, step)
    sizes = {(side, min(area // side // step * step, 2 * resolution)) for side in sides if 2 * side >= resolution}
    square = resolution // multiple * multiple
    return sorted({(square, square)} | {size for w, h in sizes if h for size in ((w, h), (h, w))})


def assign(records: Sequence[Record], resolution: int, multiple: int = 8) -> Bucketing:
    """Each record into the bucket whose aspect ratio is nearest to its own."""
    sizes = bucket_sizes(resolution, multiple)

    def nearest_size(record: Record) -> Size:
        aspect = math.log(record.width / record.height)
        # Of two equally near ratios the larger area loses less of the picture.
        return min(sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - aspect), -size[0] * size[1]))

    chosen = tuple(nearest_size(record) for record in records)
    upscaled = tuple(
        record.name
        for record, size in zip(records, chosen, strict=True)
        if cover((record.width, record.height), size) > 1
    )
    return Bucketing(resolution, chosen, upscaled)
