"""The command line answers at once, and the package imports for next to nothing."""

import resource
import subprocess
import sys

import pytest


def _seconds(*arguments: str) -> float:
    """Processor time of a Python run, the least of five: on a busy machine the clock would measure the others."""
    taken = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(taken)


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [
        (("-m", "sdlora", "--help"), 0.3),
        (("-m", "sdlora", "train", "--help"), 0.3),
        (("-c", "import sdlora"), 0.1),
    ],
    ids=["sdlora --help", "sdlora train --help", "import sdlora"],
)
def test_starts_fast(arguments: tuple[str, ...], limit: float) -> None:
    assert _seconds(*arguments) < limit


def test_everything_the_package_offers_is_there() -> None:
    import sdlora

    assert all(getattr(sdlora, name) is not None for name in dir(sdlora))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = sdlora.no_such_name
