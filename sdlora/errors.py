"""The one error people see, and the nearest-name hint that goes into it."""

from collections.abc import Iterable
from difflib import get_close_matches


class SdloraError(Exception):
    """One line for a person: what is wrong, where, and how to mend it. The command line prints it and exits with 2."""


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """ " (nearest: a, b)" for the names closest to `name`, or "" where none is close."""
    close = get_close_matches(name, list(names), n=count, cutoff=0.5)
    return f" (nearest: {', '.join(close)})" if close else ""
