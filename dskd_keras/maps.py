"""Feature maps brought to common positions. A map is `[B, *positions, C]`, channels last.

Sizes are integers where they are known. The others are scalars of a TensorFlow graph.
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from dskd_keras.errors import InputError


def sizes(x: Any) -> tuple[Any, ...]:
    """Returns the number of positions along each axis of a map `[B, *positions, C]`.

    Each is an int where it is known, else an int32 scalar. A map `[B, C]` has none.
    """
    return tuple(ops.shape(x)[1:-1])


def equal_sizes(a: Any, b: Any) -> bool | None:
    """Returns whether two maps have the same positions, None where only a run can tell."""
    if len(a.shape) != len(b.shape):
        return False
    pairs = list(zip(sizes(a), sizes(b), strict=True))
    known = [one == other for one, other in pairs if _known(one, other)]
    if not all(known):
        return False
    return True if len(known) == len(pairs) else None


def valid(mask: Any, x: Any) -> Any:
    """Returns the valid positions of a map as booleans.

    Args:
        mask: `[B, *positions]`, booleans, or weights that are positive at valid positions.
        x: The map that it belongs to, `[B, *positions, C]`.

    Returns:
        bool `[B, *positions]`.

    Raises:
        InputError: The mask has another shape.
    """
    mask = _checked(mask, x)
    return mask if keras.backend.standardize_dtype(mask.dtype) == "bool" else mask > 0


def zeroed(x: Any, mask: Any) -> Any:
    """Returns a map `[B, *positions, C]` with zeros where a mask `[B, *positions]` is not valid.

    What was there reaches neither a value nor a gradient, NaN included.
    """
    return ops.where(ops.expand_dims(valid(mask, x), -1), x, ops.zeros_like(x))


def resized(x: Any, sizes: Sequence[Any], mask: Any = None) -> tuple[Any, Any]:
    """Brings a map to given sizes by averages over windows.

    Window i of an axis begins at `floor(i · in / out)` and ends before `ceil((i + 1) · in / out)`,
    as in PyTorch's adaptive average pooling. Where `out > in` the nearest position is repeated.

    Args:
        x: Floats `[B, *positions, C]`.
        sizes: The new number of positions along each axis: ints or, in a TensorFlow graph, scalars.
        mask: `[B, *positions]`, booleans or weights that are not negative. Averages are then taken
            over valid positions alone, by weight. Defaults to None, all positions alike.

    Returns:
        `(x, mask)`: the map `[B, *sizes, C]`, with zeros where no position of a window was valid,
        and bool `[B, *sizes]`, true where any was; None without a mask.

    Raises:
        InputError: The number of sizes or the shape of the mask is not that of the map.
    """
    own, sizes = tuple(ops.shape(x)[1:-1]), tuple(sizes)
    if len(own) != len(sizes):
        raise InputError(
            f"sizes: {sizes} should have one number for each axis of positions of a map of shape "
            f"{tuple(x.shape)}."
        )
    if mask is None:
        return _resized(x, own, sizes), None
    if _known(*own, *sizes) and own == sizes:
        return zeroed(x, mask), valid(mask, x)
    weights = _weights(mask, x)
    x = zeroed(x, mask) * weights
    for axis, (size, out) in enumerate(zip(own, sizes, strict=True), start=1):
        x = _averaged(x, axis, size, out)
        weights = _averaged(weights, axis, size, out)
    return ops.divide_no_nan(x, weights), ops.squeeze(weights, -1) > 0


def mean_over_positions(x: Any, mask: Any = None) -> Any:
    """Returns the average of a map `[B, *positions, C]` over its positions, `[B, C]`.

    With a mask `[B, *positions]`, booleans or weights, it is the average over the valid positions,
    by weight, and zero where there are none. A map `[B, C]` is its own average.
    """
    axes = tuple(range(1, len(x.shape) - 1))
    if not axes:
        return x if mask is None else zeroed(x, mask)
    if mask is None:
        return ops.mean(x, axis=axes)
    weights = _weights(mask, x)
    total = ops.sum(zeroed(x, mask) * weights, axis=axes)
    return ops.divide_no_nan(total, ops.sum(weights, axis=axes))


def aligned(a: Any, b: Any, mask_a: Any = None, mask_b: Any = None) -> tuple[Any, Any, Any]:
    """Brings two maps to the same positions: along each axis to the smaller size.

    Maps of different ranks, such as a sequence and an image, become their averages over positions.

    Args:
        a: Floats `[B, *positions, C]`.
        b: Floats `[B, *positions, D]`.
        mask_a: `[B, *positions]` of `a`, booleans or weights. Defaults to None, all valid.
        mask_b: The same for `b`.

    Returns:
        `(a, b, mask)`: the maps, and as bool `[B, *positions]` where both are valid. The mask is
        None where none was given and for maps of different ranks.

    Raises:
        InputError: A mask has not the positions of its map.
    """
    if len(a.shape) != len(b.shape):
        return mean_over_positions(a, mask_a), mean_over_positions(b, mask_b), None
    common = [_smaller(one, other) for one, other in zip(sizes(a), sizes(b), strict=True)]
    a, mask_a = resized(a, common, mask_a)
    b, mask_b = resized(b, common, mask_b)
    if mask_a is None or mask_b is None:
        return a, b, mask_b if mask_a is None else mask_a
    return a, b, ops.logical_and(mask_a, mask_b)


def _known(*numbers: Any) -> bool:
    return all(isinstance(number, int) for number in numbers)


def _smaller(one: Any, other: Any) -> Any:
    return min(one, other) if _known(one, other) else ops.minimum(one, other)


def _checked(mask: Any, x: Any) -> Any:
    mask = ops.convert_to_tensor(mask)
    own, expected = tuple(mask.shape), tuple(x.shape[:-1])
    if len(own) != len(expected) or any(
        one != other
        for one, other in zip(own, expected, strict=True)
        if one is not None and other is not None
    ):
        raise InputError(
            f"mask: shape {own} should be {expected}, one value for each position of a map of "
            f"shape {tuple(x.shape)}."
        )
    return mask


def _weights(mask: Any, x: Any) -> Any:
    return ops.expand_dims(ops.cast(_checked(mask, x), _dtype(x)), -1)


def _dtype(x: Any) -> str:
    return keras.backend.standardize_dtype(x.dtype)


def _resized(x: Any, own: tuple[Any, ...], sizes: tuple[Any, ...]) -> Any:
    if _known(*own, *sizes):
        if own == sizes:
            return x
        if all(size >= out for size, out in zip(own, sizes, strict=True)):
            if _keras_pools(sizes):
                return ops.adaptive_average_pool(x, sizes, data_format="channels_last")
            if not any(size % out for size, out in zip(own, sizes, strict=True)):
                window = tuple(size // out for size, out in zip(own, sizes, strict=True))
                return ops.average_pool(x, window, window, "valid", "channels_last")
    for axis, (size, out) in enumerate(zip(own, sizes, strict=True), start=1):
        x = _averaged(x, axis, size, out)
    return x


def _keras_pools(sizes: tuple[int, ...]) -> bool:
    """Returns whether Keras's adaptive pooling to these sizes can be relied on.

    Keras 3.15 finds the windows on JAX by a division that XLA turns into a product with the
    inexact reciprocal: a map of 14 × 14 pooled to 7 × 7 is NaN. On TensorFlow it can't compile the
    pooling to one position, for which it also makes a window larger than the map.
    """
    if keras.backend.backend() == "jax":
        return all(size & (size - 1) == 0 for size in sizes)
    return keras.backend.backend() != "tensorflow" or 1 not in sizes


def _averaged(x: Any, axis: int, size: Any, out: Any) -> Any:
    """Returns a map whose axis of positions has become the averages over `out` windows."""
    if _known(size, out) and size == out:
        return x
    matrix = _windows(size, out, _dtype(x))
    return ops.moveaxis(ops.matmul(matrix, ops.moveaxis(x, axis, -2)), -2, axis)


def _windows(size: Any, out: Any, dtype: str) -> Any:
    """Returns the matrix `[out, size]` whose row i averages over window i."""
    window = ops.expand_dims(ops.arange(0, out, dtype="int32"), 1)
    position = ops.expand_dims(ops.arange(0, size, dtype="int32"), 0)
    start = window * size // out
    end = ops.where(out > size, start + 1, ((window + 1) * size + out - 1) // out)
    inside = ops.cast(ops.logical_and(position >= start, position < end), dtype)
    return inside / ops.sum(inside, axis=1, keepdims=True)
