"""The compiled loss on the labels: what it expects, and one value an image or a position."""

from typing import Any

import keras
import numpy as np
from keras import ops

from dskd_keras.errors import InputError, wrong

_EXAMPLE = "keras.losses.SparseCategoricalCrossentropy(from_logits=True)"

_SPARSE = (keras.losses.SparseCategoricalCrossentropy,)
_CATEGORICAL = (
    keras.losses.CategoricalCrossentropy,
    keras.losses.CategoricalFocalCrossentropy,
    keras.losses.CategoricalHinge,
)
_BINARY = (keras.losses.BinaryCrossentropy, keras.losses.BinaryFocalCrossentropy)
_REGRESSION = (
    keras.losses.MeanSquaredError,
    keras.losses.MeanAbsoluteError,
    keras.losses.MeanAbsolutePercentageError,
    keras.losses.MeanSquaredLogarithmicError,
    keras.losses.Huber,
    keras.losses.LogCosh,
    keras.losses.Poisson,
    keras.losses.CosineSimilarity,
)


def kind(compiled: Any) -> str | None:
    """Returns what a compiled loss is for.

    Returns:
        `"sparse"` (one class, given by its index), `"categorical"` (one class, given by a row of
        probabilities), `"binary"` (independent labels), `"regression"`, or None where nothing is
        known of it.
    """
    kinds = {
        "sparse": _SPARSE, "categorical": _CATEGORICAL, "binary": _BINARY,
        "regression": _REGRESSION,
    }  # fmt: skip
    loss = keras.losses.get(compiled) if isinstance(compiled, str) else compiled
    cls = _class_of(loss) or type(loss)
    return next((name for name, classes in kinds.items() if issubclass(cls, classes)), None)


def _class_of(loss: Any) -> type | None:
    """Returns the class of one of Keras's functions, which has its name in camel case."""
    if not (getattr(loss, "__module__", "").startswith("keras.") and hasattr(loss, "__name__")):
        return None
    camel = "".join(part.capitalize() for part in loss.__name__.split("_"))
    return getattr(keras.losses, camel, None)


def _name(loss: Any) -> str:
    return loss.__name__ if isinstance(loss, type) else type(loss).__name__


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
        cls = loss if isinstance(loss, keras.losses.Loss) else _class_of(loss)
        on_logits = _EXAMPLE if cls is None else f"keras.losses.{_name(cls)}(from_logits=True)"
        raise InputError(
            f"loss: '{name}' expects probabilities, but the student gives logits. Use the class "
            f"with from_logits=True: {on_logits}."
        )
    if getattr(loss, "reduction", "mean") not in ("sum_over_batch_size", "mean"):
        raise InputError(
            f"loss: reduction={loss.reduction!r}, but all terms of the objective are averaged over "
            "the batch. Use reduction='sum_over_batch_size', Keras's default."
        )
    return loss


class Labels:
    """The labels of a batch, in the shape that the compiled loss wants beside the logits.

    Args:
        label: Labels as they came: indices `[B]`, `[B, 1]`, `[B, T]`, `[B, H, W]`, or rows
            `[B, C]`, `[B, T, C]`, …, for binary losses 0 to 1 in the shape of the logits.
        logits: `[B, C]`, `[B, T, C]`, `[B, H, W, C]`.
        compiled: What `compile(loss=...)` got.

    Attributes:
        values: The labels; those that no class allows are brought into the range, since what the
            backends do with them ranges from an exception to nothing at all.
        valid: bool `[B]` or `[B, *positions]`, False where the label is the compiled loss's
            `ignore_class`; None where nothing is ignored.
        outside: How many labels are outside the range, a scalar; None where no range is known.

    Raises:
        InputError: The shapes don't go with the compiled loss.
    """

    def __init__(self, label: Any, logits: Any, compiled: Any) -> None:
        self._loss = compiled
        self.kind = kind(compiled)
        self.valid: Any = None
        self.outside: Any = None
        self.values = label
        is_one = not isinstance(label, (dict, list, tuple))
        if self.kind not in (None, "regression") and is_one:
            self.values = self._shaped(ops.convert_to_tensor(label), logits)
            self._bring_into_range(logits.shape[-1])

    def _shaped(self, label: Any, logits: Any) -> Any:
        check_shape(label, logits, self._loss)
        rank, of_logits = len(label.shape), len(logits.shape)
        if self.kind == "sparse":
            return ops.squeeze(label, -1) if rank == of_logits else label
        return ops.expand_dims(label, -1) if rank < of_logits else label

    def _bring_into_range(self, classes: int) -> None:
        label = self.values
        if self.kind == "sparse":
            lowest, highest = 0, classes - 1
        elif self.kind == "binary":
            lowest, highest = 0, 1
        else:
            return
        inside = ops.clip(label, lowest, highest)
        outside = ops.not_equal(label, inside)
        ignored = getattr(self._loss, "ignore_class", None)
        if ignored is not None:
            self.valid = ops.not_equal(label, ops.cast(ignored, label.dtype))
            outside = ops.logical_and(outside, self.valid)
        self.outside = ops.sum(ops.cast(outside, "int32"))
        self.values = ops.where(outside, inside, label)

    def loss(self, logits: Any) -> Any:
        """Returns the compiled loss of logits, `[B]` or `[B, *positions]`, before any reduction."""
        loss = check_loss(self._loss)
        if isinstance(loss, keras.losses.Loss):
            label = keras.tree.map_structure(
                lambda value: ops.convert_to_tensor(value, dtype=loss.dtype),
                self.values,
            )
            values = loss.call(label, logits)
        else:
            values = loss(self.values, logits)
        if len(values.shape) == 0:
            raise InputError(
                f"loss: {loss!r} gives one value for the whole batch. One for each image is needed."
            )
        return values


def check_shape(label: Any, logits: Any, compiled: Any) -> None:
    """Raises `InputError` where labels don't have the shape that a compiled loss takes.

    Args:
        label: Labels, or a structure of them, which is left to the loss.
        logits: What they are compared with.
        compiled: What `compile(loss=...)` got.
    """
    what = kind(compiled)
    if what in (None, "regression") or not hasattr(label, "shape"):
        return
    shape, wanted = tuple(label.shape), tuple(logits.shape)
    if what == "sparse":
        of_one = len(shape) == len(wanted) and shape[-1] == 1
        shape = shape[:-1] if of_one else shape
        expected: tuple[int | None, ...] = wanted[:-1]
        advice = "; keras.losses.CategoricalCrossentropy(from_logits=True) takes rows"
    else:
        of_one = len(shape) == len(wanted) - 1 and wanted[-1] == 1
        shape = (*shape, 1) if of_one else shape
        expected = wanted
        advice = f"; {_EXAMPLE} takes indices" if what == "categorical" else ""
    if len(shape) != len(expected) or any(
        a is not None and b is not None and a != b
        for a, b in zip(shape[1:], expected[1:], strict=True)
    ):
        name = getattr(compiled, "name", None) or getattr(compiled, "__name__", compiled)
        raise InputError(
            f"y: labels of shape {_shown(shape)}, but the compiled loss '{name}' expects "
            f"{_shown(expected)} for logits {_shown(wanted)}{advice}."
        )


def _shown(shape: tuple[int | None, ...]) -> str:
    """Returns a shape with its batch axis named, so that the size of a batch does not distract."""
    return f"[{', '.join(['B', *('?' if size is None else str(size) for size in shape[1:])])}]"


def check_range(label: np.ndarray, compiled: Any, classes: int) -> None:
    """Raises `InputError` where labels are outside what the compiled loss can take."""
    if not label.size or label.dtype.kind not in "iufb":
        return
    lowest, highest = label.min(), label.max()
    if kind(compiled) == "sparse" and getattr(compiled, "ignore_class", None) is None:
        if lowest < 0 or highest >= classes:
            outside = lowest if lowest < 0 else highest
            raise InputError(
                f"y: label {outside} is outside the student's {classes} classes, 0 to "
                f"{classes - 1}."
            )
    elif kind(compiled) == "binary" and (lowest < 0 or highest > 1):
        outside = lowest if lowest < 0 else highest
        raise InputError(f"y: label {outside} is outside 0 to 1, which binary losses take.")


def outside_range(count: int, compiled: Any, classes: int) -> InputError:
    """Returns the error for so many labels of a stream that are outside the range."""
    allowed = "0 to 1" if kind(compiled) == "binary" else f"the {classes} classes, 0 to"
    allowed += "" if kind(compiled) == "binary" else f" {classes - 1}"
    return InputError(
        f"y: {count} label(s) of the batches so far are outside {allowed}. Look at the labels of "
        "the data set, or give the student more classes."
    )


class LabelCheck(keras.callbacks.Callback):
    """Stops the training where the labels of a stream are outside the range.

    A compiled step can't raise an error, so it counts such labels. This looks at the count after
    the steps 1, 2, 4, 8, … and after every epoch. `Distiller.fit` puts it first.
    """

    def __init__(self) -> None:
        super().__init__()
        self._steps = 0
        self._next = 1

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Looks, where it is time to."""
        self._steps += 1
        if self._steps >= self._next:
            self._next *= 2
            self.model.check_labels_seen()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Looks."""
        self.model.check_labels_seen()
