"""Checks of the numbers and paths that a user gives, worded in one way."""

import math
import operator
import os
from typing import Any

from dskd_keras.errors import wrong

# What float32, in which all is computed, holds without losing digits.
_LARGEST, _SMALLEST = 3.4028234e38, 1.1754944e-38
# Bytes of one name on the usual file systems.
_LONGEST_NAME = 255


def real(
    field: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> float:
    """Returns a number as a float, one that float32 holds: finite, and 0 or not too small.

    Args:
        field: The field or argument that held it.
        value: What it held: anything that `float` takes, but no text and no bool.
        least: It may not be smaller.
        above: It has to be larger.
        most: It may not be larger.
        below: It has to be smaller.

    Raises:
        InputError: It is no finite number, outside its bounds, or nothing or infinite in float32.
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
    if number and not _SMALLEST <= abs(number) <= _LARGEST:
        raise wrong(field, value, f"{_rule(least, above, most, below)} that float32 holds")
    return number


def temperature(field: str, value: Any) -> float:
    """Returns a temperature as a float.

    Args:
        field: The field or argument that held it.
        value: What it held.

    Raises:
        InputError: It is no positive number, or float32 can't hold what comes of it: logits are
            divided by it, and losses are multiplied by its square.
    """
    real(field, value, above=0)
    return real(field, value, least=1e-6, most=1e6)


def whole(field: str, value: Any, least: int, most: int | None = None) -> int:
    """Returns a whole number as an int.

    Args:
        field: The field or argument that held it.
        value: What it held: an integer of Python or NumPy, but no bool.
        least: It may not be smaller.
        most: It may not be larger. Defaults to no bound.

    Raises:
        InputError: It is no whole number, or outside its bounds.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise wrong(field, value, f"a whole number of at least {least}")
    if most is not None and number > most:
        raise wrong(field, value, f"a whole number from {least} to {most}")
    return number


def path(field: str, value: str) -> None:
    """Raises `InputError` for a text that names no file, or one that errors can't show in a line.

    Args:
        field: The field or argument that held it.
        value: What it held.
    """
    if not value:
        raise wrong(field, value, "a path")
    # Bytes that are no UTF-8 are surrogates here, which can't be printed either.
    if not value.isprintable():
        raise wrong(field, value, "a path of printable characters")
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in value.split(os.sep)):
        raise wrong(field, value, f"a path, whose names have at most {_LONGEST_NAME} bytes")


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
