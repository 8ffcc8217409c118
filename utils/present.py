"""Values that are None in some settings, read where they must be there."""

from typing import TypeVar

T = TypeVar("T")


def present(value: T | None, name: str) -> T:
    """The value.

    Raises:
        ValueError: It is None; the message names it.
    """
    if value is None:
        raise ValueError(f"{name} is needed here and was not given")
    return value
