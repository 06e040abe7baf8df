"""The two distances between teacher and student, as Keras losses that give one value an image."""

from typing import Any

import keras
from keras import ops

from dskd_keras import checks


@keras.saving.register_keras_serializable("dskd_keras")
class KLDivergence(keras.losses.Loss):
    """Kullback-Leibler divergence between two sets of logits, softened by a temperature.

    `τ² · Σ_c softmax(p/τ)_c · (log_softmax(p/τ)_c − log_softmax(q/τ)_c)` for teacher logits `p` and
    student logits `q`. The factor τ² keeps the size of the gradient independent of the temperature
    (Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", section 2).

    Args:
        temperature: Positive number τ. Defaults to 4.0, the literature's value on CIFAR-100.
        reduction: As in `keras.losses.Loss`. `call` itself never reduces.
        name: Optional name.
        dtype: The dtype of the computation. Defaults to `keras.config.floatx()`.

    Shapes:
        `y_true`, `y_pred`: logits `[B, C]`; `call` returns `[B]`.

    Raises:
        InputError: `temperature` is not a positive finite number.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        reduction: str | None = "sum_over_batch_size",
        name: str = "kl_divergence",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.temperature = checks.real("temperature", temperature, above=0)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Returns the divergence of `y_pred` from `y_true`, both logits `[B, C]`, as `[B]`."""
        log_p = ops.log_softmax(ops.divide(y_true, self.temperature), axis=-1)
        log_q = ops.log_softmax(ops.divide(y_pred, self.temperature), axis=-1)
        divergence = ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1)
        return self.temperature**2 * divergence

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that rebuild this loss."""
        return {**super().get_config(), "temperature": self.temperature}


@keras.saving.register_keras_serializable("dskd_keras")
class FeatureMeanSquaredError(keras.losses.Loss):
    """Mean squared difference of two feature maps, over everything but the batch.

    `keras.losses.MeanSquaredError` averages the last axis alone, so that on `[B, H, W, C]` a
    `sample_weight` of shape `[B]` would be aligned with W.

    Where the teacher's map is the larger one, it is average-pooled to the student's size. Maps of
    different kinds, such as a sequence and an image, are compared by their averages over positions.

    Args:
        reduction: As in `keras.losses.Loss`. `call` itself never reduces.
        name: Optional name.
        dtype: The dtype of the computation. Defaults to `keras.config.floatx()`.

    Shapes:
        `y_true`, the teacher's map: `[B, H, W, D]`, `[B, T, D]` or `[B, D]`, channels last.
        `y_pred`, the student's map, projected to the same D: one of these shapes too.
        `call` returns `[B]`.
    """

    def __init__(
        self,
        reduction: str | None = "sum_over_batch_size",
        name: str = "feature_mean_squared_error",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Returns the mean squared difference of `y_true` and `y_pred` for each image, `[B]`."""
        if len(y_true.shape) != len(y_pred.shape):
            y_true, y_pred = _mean_over_positions(y_true), _mean_over_positions(y_pred)
        size = tuple(y_pred.shape[1:-1])
        if tuple(y_true.shape[1:-1]) != size:
            y_true = ops.adaptive_average_pool(y_true, size, data_format="channels_last")
        difference = ops.square(y_true - y_pred)
        return ops.mean(difference, axis=tuple(range(1, len(difference.shape))))


def _mean_over_positions(x: Any) -> Any:
    axes = tuple(range(1, len(x.shape) - 1))
    return ops.mean(x, axis=axes) if axes else x
