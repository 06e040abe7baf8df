"""Checks of the numbers that a user gives, worded in one way."""

import math
import operator
from typing import Any

from dskd_keras.errors import wrong


def real(
    field: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> float:
    """Returns a finite number as a float.

    Args:
        field: The field or argument that held it.
        value: What it held: anything that `float` takes, but no text and no bool.
        least: It may not be smaller.
        above: It has to be larger.
        most: It may not be larger.
        below: It has to be smaller.

    Raises:
        InputError: It is no finite number, or outside its bounds.
    """
    number = _float(value)
    if (
        number is None
        or not math.isfinite(number)
        or (least is not None and number < least)
        or (above is not None and number <= above)
        or (most is not None and number > most)
        or (below is not None and number >= below)
    ):
        raise wrong(field, value, _rule(least, above, most, below))
    return number


def whole(field: str, value: Any, least: int) -> int:
    """Returns a whole number as an int.

    Args:
        field: The field or argument that held it.
        value: What it held: an integer of Python or NumPy, but no bool.
        least: It may not be smaller.

    Raises:
        InputError: It is no whole number, or too small.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise wrong(field, value, f"a whole number of at least {least}")
    return number


def _float(value: Any) -> float | None:
    if isinstance(value, str | bytes | bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _rule(least: float | None, above: float | None, most: float | None, below: float | None) -> str:
    if (least, above, most, below) == (None, 0, None, None):
        return "a positive number"
    bounds = [
        f"{words} {bound}"
        for words, bound in (
            ("of at least", least),
            ("above", above),
            ("up to", most),
            ("below", below),
        )
        if bound is not None
    ]
    return " and ".join([f"a number {bounds[0]}", *bounds[1:]]) if bounds else "a finite number"
