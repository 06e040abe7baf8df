"""The compiled loss on the labels, with one value an image as all other terms have."""

from typing import Any

import keras
import numpy as np
from keras import ops

from dskd_keras.errors import InputError, wrong

_EXAMPLE = "keras.losses.SparseCategoricalCrossentropy(from_logits=True)"


def check_loss(compiled: Any) -> Any:
    """Returns what `compile(loss=...)` got as an object or function on logits.

    Args:
        compiled: A `keras.losses.Loss`, a function of labels and logits, or a name.

    Raises:
        InputError: There is none, it expects probabilities, or it is not averaged over the batch.
    """
    if compiled is None:
        raise InputError(f"loss: None, but label_weight needs one: compile(loss={_EXAMPLE}).")
    if isinstance(compiled, (list, tuple, dict)):
        raise wrong("loss", compiled, "a single loss, since the student has one output")
    loss = keras.losses.get(compiled)
    # Keras's losses on probabilities have this switch; a bare function or a name can't be told.
    from_logits = getattr(loss, "from_logits", None)
    if from_logits is False or (from_logits is None and _is_keras_crossentropy(loss)):
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
    """Returns the compiled loss for each image, `[B]`, before any reduction.

    Args:
        compiled: As for `check_loss`.
        label: The labels, in the form that the loss takes.
        logits: `[B, C]`.

    Raises:
        InputError: As `check_loss`, or the loss gives one value for the whole batch.
    """
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
    """Raises `InputError` where class indices lie outside the classes.

    Args:
        label: Array of labels.
        compiled: The compiled loss. Nothing is checked unless it is a
            `SparseCategoricalCrossentropy`.
        classes: Number of classes.
    """
    sparse = isinstance(compiled, keras.losses.SparseCategoricalCrossentropy)
    if not sparse or compiled.ignore_class is not None or not label.size:
        return
    lowest, highest = label.min(), label.max()
    if lowest < 0 or highest >= classes:
        outside = lowest if lowest < 0 else highest
        raise InputError(
            f"y: label {outside} is outside the student's {classes} classes, 0 to {classes - 1}."
        )


def _is_keras_crossentropy(loss: Any) -> bool:
    module, name = getattr(loss, "__module__", ""), getattr(loss, "__name__", "")
    return module.startswith("keras.") and "crossentropy" in name
