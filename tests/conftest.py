"""What several tests share."""

import os
import sys
from pathlib import Path

# Small models gain nothing from a second thread, and lose much to it where something else runs too. Torch looks once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))  # for tools.toybox, which is not part of the package

from sdlora.lowrank.adapter import Adapter  # noqa: E402
from sdlora.lowrank.laws import LowRank  # noqa: E402
from sdlora.lowrank.targets import modules_of  # noqa: E402


def random_adapter(components: dict[str, torch.nn.Module], seed: int, rank: int = 4, suffix: str = "") -> Adapter:
    """An adapter with noticeable random factors on every module whose path ends in `suffix`; alpha != rank."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for path, module in modules_of(components).items():
        if path.endswith(suffix):
            out, into, *kernel = module.weight.shape  # type: ignore[misc]
            down = torch.randn(rank, into, *kernel, generator=generator) / into**0.5
            up = torch.randn(out, rank, *[1] * len(kernel), generator=generator) * 0.2
            deltas[path] = LowRank(down, up, alpha=rank / 2)
    return Adapter(deltas)


@pytest.fixture
def adapter_of():
    return random_adapter
