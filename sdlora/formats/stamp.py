"""Whether a file has changed: told by its size and the time of its last change."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

# Nanoseconds: a file changed so lately may change again without another time, the clocks of disks being coarse.
SETTLED = 2 * 10**9


class Stamp(NamedTuple):
    """Of one file: bytes, and nanoseconds since 1970."""

    size: int
    changed: int

    @property
    def settled(self) -> bool:
        """Whether a change from now on must show."""
        return time.time_ns() - self.changed > SETTLED


def stamp_of(file: Path | int) -> Stamp:
    """Of a path or an open file. OSError where it is not there any more."""
    status = os.stat(file)
    return Stamp(status.st_size, status.st_mtime_ns)
