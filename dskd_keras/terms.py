"""The terms of a training step: what they compare, and each as one value an image."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from dskd_keras import labels, losses, maps, replicas
from dskd_keras.errors import InputError
from dskd_keras.labels import Labels
from dskd_keras.weighting import Weighting

# A softmax of one class is 1: what these compare is equal from the beginning.
_OF_SEVERAL_CLASSES = (
    losses.KLDivergence,
    losses.DecoupledKLDivergence,
    losses.StandardizedKLDivergence,
    losses.DIST,
)


def divergence(compiled: Any, classes: int) -> keras.losses.Loss:
    """Returns the divergence that goes with a compiled loss.

    Args:
        compiled: What `compile(loss=...)` got for the distilled output, or None.
        classes: Size of the logits' last axis.

    Raises:
        InputError: It would be zero whatever the logits are, or nothing says what the outputs mean.
    """
    kind = labels.kind(compiled)
    if kind == "binary" or (compiled is None and classes == 1):
        return losses.BinaryKLDivergence()
    if kind == "regression" or (kind is None and classes == 1):
        name = getattr(compiled, "name", None) or getattr(compiled, "__name__", compiled)
        raise InputError(
            f"prediction_loss: None, but the compiled loss '{name}' does not say that the "
            f"{classes} output(s) are logits of classes. Name the loss between student and "
            "teacher, such as prediction_loss=keras.losses.MeanSquaredError(), or set "
            "prediction_weight and deep_prediction_weight to 0."
        )
    chosen = losses.KLDivergence()
    check_not_zero(chosen, classes)
    return chosen


def check_not_zero(loss: Any, classes: int) -> None:
    """Raises `InputError` where a prediction loss is zero whatever the logits are."""
    if classes == 1 and isinstance(loss, _OF_SEVERAL_CLASSES):
        raise InputError(
            f"prediction_loss: '{loss.name}' compares classes, but the student gives one logit, "
            "so it is always zero. Compile with keras.losses.BinaryCrossentropy(from_logits=True), "
            "or give prediction_loss='binary_kl_divergence'."
        )


class Terms:
    """The terms of one training step, as they are added up.

    Args:
        layers: Names of the supervised layers.
        sample_weight: None, one weight an image `[B]`, or one a position `[B, *positions]`.
        valid: None, or bool `[B]` or `[B, *positions]`: what counts, at the logits' positions.

    Attributes:
        means: The terms by their names in the logs, scalars.
        total: Their sum, each times its coefficient: one value an image, `[B]`; None before the
            first.
        sample_weight: The weights `[B]` that `total` is still to be multiplied by, or None.
    """

    def __init__(self, layers: Sequence[str], sample_weight: Any, valid: Any) -> None:
        self.means: dict[str, Any] = {}
        self.total: Any = None
        self.valid = valid
        self.sample_weight = self._position_weight = None
        if sample_weight is not None:
            weight = in_full_precision(sample_weight)
            if len(weight.shape) > 1 and weight.shape[-1] == 1:
                weight = ops.squeeze(weight, -1)
            if len(weight.shape) > 1:
                self._position_weight = weight
            else:
                self.sample_weight = ops.reshape(weight, (-1,))
        self._layers = layers

    def add(self, name: str, coefficient: Any, values: Any) -> None:
        """Adds a term of the student's output, one value an image or a position."""
        values = self.of_images(values, self.valid)
        self.means[name] = self._mean(values)
        self._add(coefficient * values)

    def add_deep(
        self,
        kind: str,
        coefficient: Any,
        weighting: Weighting,
        loss: Callable[[str], Any],
    ) -> None:
        """Adds a term of the shallow layers; `loss` gives that of a layer, one value an image."""
        values = ops.stack([loss(layer) for layer in self._layers])
        means = self._mean(values)
        weights = in_full_precision(weighting(means))
        for layer, mean, weight in zip(
            self._layers, ops.unstack(means), ops.unstack(weights), strict=True
        ):
            self.means[f"deep_{kind}_loss/{layer}"] = mean
            self.means[f"deep_{kind}_allocation/{layer}"] = weight
        self.means[f"deep_{kind}_loss"] = ops.sum(weights * means)
        self._add(coefficient * ops.matmul(weights, values))

    def _add(self, values: Any) -> None:
        self.total = values if self.total is None else self.total + values

    def of_images(self, values: Any, valid: Any) -> Any:
        """Returns one value an image, whose mean over the batch is that over all that is valid.

        Args:
            values: `[B]` or `[B, *positions]`.
            valid: None, or bool (or shares, 0 to 1) of the same shape; `[B, *positions]` beside
                values `[B]` says which images have a valid position.
        """
        rank = len(values.shape)
        if self._position_weight is not None:
            values = values * _fitted(self._position_weight, values)
        if valid is not None:
            valid = ops.cast(valid, values.dtype)
            if len(valid.shape) > rank:
                valid = ops.max(valid, axis=tuple(range(rank, len(valid.shape))))
            elif len(valid.shape) < rank:
                valid = _fitted(valid, values)
            # As Keras does: the mean over the batch is that over its valid positions.
            values = ops.where(valid > 0, values * valid, ops.zeros_like(values))
            scale = ops.divide_no_nan(replicas.size(values), replicas.total(ops.sum(valid)))
            return _sum_over_positions(values) * scale
        return values if rank == 1 else ops.mean(values, axis=tuple(range(1, rank)))

    def _mean(self, values: Any) -> Any:
        """Returns the means of values `[B]`, or `[L, B]`, over the batch of all replicas."""
        weighted = values if self.sample_weight is None else values * self.sample_weight
        return replicas.mean(weighted)


class Predictions:
    """The loss between logits and a teacher's, or several teachers'.

    Args:
        loss: A Keras loss or a function.
        teacher: Logits `[B, *positions, C]`, of each teacher.
        weights: A number for each teacher, or one an image or position; None for a single one.
        label: `Labels` or None.
        valid: As in `Terms`.
        temperature: A scalar, or None where the loss has its own.
    """

    def __init__(
        self,
        loss: Any,
        teacher: Sequence[Any],
        weights: Sequence[Any] | None,
        label: Labels | None,
        valid: Any,
        temperature: Any,
    ) -> None:
        self._loss = loss
        self._teacher = teacher
        self._weights = weights
        self._extras = {"label": None if label is None else label.values, "mask": valid}
        if temperature is not None:
            self._extras["temperature"] = temperature

    def __call__(self, logits: Any) -> Any:
        """Returns the loss of logits `[B, *positions, C]`, one value an image or a position."""
        if len(logits.shape) > 2:
            # A head sees its layer's positions, which may be fewer than the outputs'.
            logits, _ = maps.resized(logits, maps.sizes(self._teacher[0]))
        values = [losses.values(self._loss, each, logits, **self._extras) for each in self._teacher]
        for value in values:
            check_per_image("prediction_loss", self._loss, value)
        if self._weights is None:
            return values[0]
        return sum(
            (weight if isinstance(weight, float) else _fitted(weight, value)) * value
            for weight, value in zip(self._weights, values, strict=True)
        )


def feature_values(
    terms: Terms,
    loss: Any,
    teacher: Any,
    student: Any,
    teacher_mask: Any,
    student_mask: Any,
) -> Any:
    """Returns the loss between two feature maps, one value an image.

    Positions that a mask of either side leaves out don't count, nor do those whose label is
    ignored, where labels and maps have positions of one kind.
    """
    teacher_mask = _if_it_fits(teacher_mask, teacher)
    student_mask = _if_it_fits(student_mask, student)
    valid = terms.valid
    of_images = of_positions = None
    if valid is not None and len(valid.shape) == 1:
        of_images = valid
    elif valid is not None and len(valid.shape) == len(student.shape) - 1:
        of_positions = valid
    teacher, student, mask = maps.aligned(teacher, student, teacher_mask, student_mask)
    if of_positions is not None and len(valid.shape) == len(student.shape) - 1:
        share = ops.expand_dims(_cast(of_positions), -1)
        counts = maps.resized(share, maps.sizes(student))[0][..., 0] > 0
        mask = counts if mask is None else ops.logical_and(mask, counts)
    if mask is not None and of_images is not None:
        whole = ops.reshape(of_images, (-1, *[1] * (len(mask.shape) - 1)))
        mask = ops.logical_and(mask, whole)
    extras = {} if mask is None else {"mask": mask}
    values = losses.values(loss, teacher, student, **extras)
    check_per_image("feature_loss", loss, values)
    if mask is not None and len(values.shape) == 1 and not _takes_mask(loss):
        raise InputError(
            f"feature_loss: {_name(loss)} gives one value an image and takes no mask, but some "
            "positions are padding. Let it return one value a position, or take mask as "
            "call(y_true, y_pred, mask=None)."
        )
    return terms.of_images(values, of_images if mask is None else mask)


def check_sample_weight(sample_weight: Any, logits: Any) -> None:
    """Raises `InputError` unless weights are one an image, or one a position of dense logits."""
    if sample_weight is None:
        return
    shape, positions = list(sample_weight.shape), list(logits.shape[1:-1])
    if len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 1 and (
        len(shape) - 1 != len(positions)
        or any(None not in (a, b) and a != b for a, b in zip(shape[1:], positions, strict=True))
    ):
        allowed = f"[B] or {['B', *positions]}" if positions else "[B]"
        raise InputError(
            f"sample_weight: shape {tuple(sample_weight.shape)} should be {allowed}, one weight an "
            f"image{' or a position' if positions else ''}."
        )


def check_per_image(field: str, loss: Any, values: Any) -> None:
    """Raises `InputError` where a loss gives one value for the whole batch."""
    if len(getattr(values, "shape", ())) == 0:
        raise InputError(
            f"{field}: {_name(loss)} gives one value for the whole batch, where one for each image "
            "[B], or for each position, is needed."
        )


def in_full_precision(x: Any) -> Any:
    """Returns a tensor of numbers in `keras.config.floatx()`; masks stay."""
    x = ops.convert_to_tensor(x)
    return x if keras.backend.standardize_dtype(x.dtype) == "bool" else _cast(x)


def _cast(x: Any) -> Any:
    return ops.cast(x, keras.config.floatx())


def _takes_mask(loss: Any) -> bool:
    function = loss.call if isinstance(loss, keras.losses.Loss) else loss
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == "mask" or p.kind is p.VAR_KEYWORD for p in parameters)


def _name(loss: Any) -> str:
    return str(getattr(loss, "name", None) or getattr(loss, "__name__", type(loss).__name__))


def _if_it_fits(mask: Any, x: Any) -> Any:
    """Returns a mask if its positions are those of a map: not where the map was made smaller."""
    if mask is None or len(mask.shape) != len(x.shape) - 1:
        return None
    known = all(
        a is None or b is None or a == b for a, b in zip(mask.shape[1:], x.shape[1:-1], strict=True)
    )
    return mask if known else None


def _sum_over_positions(values: Any) -> Any:
    rank = len(values.shape)
    return values if rank == 1 else ops.sum(values, axis=tuple(range(1, rank)))


def _fitted(weight: Any, values: Any) -> Any:
    """Returns weights of images or positions, brought to the positions of values."""
    own, rank = len(weight.shape), len(values.shape)
    if own == rank and own > 1:
        resized, _ = maps.resized(ops.expand_dims(weight, -1), maps.sizes(values[..., None]))
        return resized[..., 0]
    if own > rank or (own > 1 and own != rank):
        weight = ops.mean(weight, axis=tuple(range(1, own)))
    return ops.reshape(weight, (-1, *[1] * (rank - 1)))
