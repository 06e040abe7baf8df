"""The compiled loss on the labels, with one value an image as all other terms have."""

from typing import Any

import keras
import numpy as np
from keras import ops

from dskd_keras.errors import InputError, wrong

_EXAMPLE = "keras.losses.SparseCategoricalCrossentropy(from_logits=True)"


def check_loss(compiled: Any) -> Any:
    """Returns what `compile(loss=...)` got, a name too, as an object or function on logits."""
    if compiled is None:
        raise InputError(f"loss: None, but label_weight needs one: compile(loss={_EXAMPLE}).")
    if isinstance(compiled, (list, tuple, dict)):
        raise wrong("loss", compiled, "a single loss, since the student has one output")
    loss = keras.losses.get(compiled)
    from_logits = getattr(loss, "from_logits", None)
    if from_logits is None and getattr(loss, "__module__", "").startswith("keras."):
        # Keras's functions have no such attribute, and take probabilities unless told otherwise.
        from_logits = "crossentropy" not in getattr(loss, "__name__", "")
    if from_logits is False:
        name = getattr(loss, "name", None) or loss.__name__
        raise InputError(
            f"loss: '{name}' expects probabilities, but the student gives logits. Use the class "
            f"with from_logits=True, such as {_EXAMPLE}."
        )
    if getattr(loss, "reduction", "mean") not in ("sum_over_batch_size", "mean"):
        raise InputError(
            f"loss: reduction={loss.reduction!r}, but all terms of the objective are averaged over "
            "the batch. Use reduction='sum_over_batch_size', Keras's default."
        )
    return loss


def per_image_loss(compiled: Any, label: Any, logits: Any) -> Any:
    """Returns the compiled loss for each image, `[B]`, before any reduction."""
    loss = check_loss(compiled)
    if isinstance(loss, keras.losses.Loss):
        label = keras.tree.map_structure(
            lambda value: ops.convert_to_tensor(value, dtype=loss.dtype), label
        )
        values = loss.call(label, logits)
    else:
        values = loss(label, logits)
    rank = len(values.shape)
    if rank == 0:
        raise InputError(
            f"loss: {loss!r} gives one value for the whole batch. One for each image is needed."
        )
    return values if rank == 1 else ops.mean(values, axis=tuple(range(1, rank)))


def check_range(label: np.ndarray, compiled: Any, classes: int) -> None:
    """Raises `InputError` where labels that the compiled loss takes for indices are outside."""
    sparse = isinstance(compiled, keras.losses.SparseCategoricalCrossentropy)
    if not sparse or compiled.ignore_class is not None or not label.size:
        return
    lowest, highest = label.min(), label.max()
    if lowest < 0 or highest >= classes:
        outside = lowest if lowest < 0 else highest
        raise InputError(
            f"y: label {outside} is outside the student's {classes} classes, 0 to {classes - 1}."
        )
