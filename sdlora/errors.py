"""The one error people see, and the nearest-name hint that goes into it."""

from collections.abc import Iterable
from difflib import get_close_matches


class SdloraError(Exception):
    """One line for a person: what is wrong, where, and how to mend it. The command line prints it and exits with 2."""


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """ " (nearest: a, b)" for the names closest to `name`, capitals aside, or "" where none is close."""
    by_letters: dict[str, list[str]] = {}
    for one in names:
        by_letters.setdefault(one.casefold(), []).append(one)
    close = get_close_matches(name.casefold(), list(by_letters), n=count, cutoff=0.5)
    found = [one for letters in close for one in by_letters[letters]][:count]
    return f" (nearest: {', '.join(found)})" if found else ""
