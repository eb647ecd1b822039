"""What the flags of all verbs have in common."""

from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Any

from cyclopts import Parameter, Token


def whole(_: type, tokens: Sequence[Token]) -> int:
    """cyclopts would round "1.5" in silence."""
    return int(tokens[0].value)


Whole = Annotated[int, Parameter(converter=whole)]


def flag(default: Any, help: str) -> Any:
    """A field of a class of flags."""
    return field(default=default, metadata={"help": help}, kw_only=True)
