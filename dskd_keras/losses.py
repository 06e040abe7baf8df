"""The distances between teacher and student, as Keras losses.

`call(y_true, y_pred)` gets the teacher's side and the student's. It returns one value an image,
`[B]`, or one value a position, such as `[B, T]` of a sequence and `[B, H, W]` of dense logits. Some
losses take more: the `temperature` of this step, the `label`, or the `mask` of valid positions.
`values` hands on to a loss what its signature names.
"""

import inspect
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from dskd_keras import checks, maps
from dskd_keras.errors import InputError, unknown_name, wrong

# Below it a vector counts as zeros: its length has no inverse that float32 can hold.
_TINY = 1e-20

# What is added to a variance before it divides, beside logits of ordinary size or, of
# probabilities, relative to their squares. Where a side hardly varies, as the logits of a student
# whose last kernel begins as zeros, the gradient would have no bound.
_VARIANCE = 1e-7


class _OnLogits(keras.losses.Loss):
    """A loss on logits that a temperature softens."""

    def __init__(self, temperature: float, reduction: str | None, name: str, dtype: Any) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.temperature = checks.temperature("temperature", temperature)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that rebuild this loss."""
        return {**super().get_config(), "temperature": self.temperature}

    def _softened(self, y_true: Any, y_pred: Any, temperature: Any) -> tuple[Any, Any, Any]:
        """Returns both logits divided by the temperature that holds, and that temperature."""
        _check_same_last("classes", y_true, y_pred)
        if temperature is None:
            temperature = self.temperature
        elif isinstance(temperature, int | float):
            temperature = checks.temperature("temperature", temperature)
        else:
            temperature = ops.cast(temperature, keras.backend.standardize_dtype(y_pred.dtype))
        return ops.divide(y_true, temperature), ops.divide(y_pred, temperature), temperature


@keras.saving.register_keras_serializable("dskd_keras")
class KLDivergence(_OnLogits):
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
        `y_true`, `y_pred`: logits `[B, C]`, or dense, such as `[B, T, C]` and `[B, H, W, C]`.
        `call` returns `[B]`, or one value a position.

    Raises:
        InputError: `temperature` is not a positive finite number, or the classes differ.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        reduction: str | None = "sum_over_batch_size",
        name: str = "kl_divergence",
        dtype: Any = None,
    ) -> None:
        super().__init__(temperature, reduction, name, dtype)

    def call(self, y_true: Any, y_pred: Any, temperature: Any = None) -> Any:
        """Returns the divergence of `y_pred` from `y_true`, both logits `[B, C]`, as `[B]`.

        `temperature`, a number or a scalar tensor, takes the place of the loss's own.
        """
        p, q, temperature = self._softened(y_true, y_pred, temperature)
        return temperature**2 * _kl_divergence(p, q)


@keras.saving.register_keras_serializable("dskd_keras")
class BinaryKLDivergence(_OnLogits):
    """Kullback-Leibler divergence of independent labels, each with one logit.

    For models that end in a sigmoid: several labels an image, or one logit for a binary
    classifier. It is `τ²` times the mean over the labels of the divergence between two Bernoulli
    distributions, `sigmoid(p/τ)` of the teacher and `sigmoid(q/τ)` of the student. The mean and not
    the sum, because `keras.losses.BinaryCrossentropy` averages over the labels, too, and the two
    are added. The factor τ² is that of `KLDivergence`. "Multi-Label Knowledge Distillation" (Yang
    et al., ICCV 2023) distils each label as such a binary problem.

    Args:
        temperature: Positive number τ. Defaults to 4.0.
        reduction: As in `keras.losses.Loss`. `call` itself never reduces.
        name: Optional name.
        dtype: The dtype of the computation. Defaults to `keras.config.floatx()`.

    Shapes:
        `y_true`, `y_pred`: logits `[B, C]` of C labels, `[B, 1]`, or dense, such as `[B, H, W, C]`.
        `call` returns `[B]`, or one value a position.

    Raises:
        InputError: `temperature` is not a positive finite number, or the labels differ in number.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        reduction: str | None = "sum_over_batch_size",
        name: str = "binary_kl_divergence",
        dtype: Any = None,
    ) -> None:
        super().__init__(temperature, reduction, name, dtype)

    def call(self, y_true: Any, y_pred: Any, temperature: Any = None) -> Any:
        """Returns the mean divergence over the labels, `[B]` for logits `[B, C]`.

        `temperature`, a number or a scalar tensor, takes the place of the loss's own.
        """
        p, q, temperature = self._softened(y_true, y_pred, temperature)
        return temperature**2 * ops.mean(_binary_kl_divergence(p, q), axis=-1)


@keras.saving.register_keras_serializable("dskd_keras")
class DecoupledKLDivergence(_OnLogits):
    """Decoupled knowledge distillation, DKD: the divergence in two parts with weights of their own.

    `τ² · (α · TCKD + β · NCKD)`. TCKD is the divergence between the probabilities of the label's
    class and of all others together. NCKD is the divergence between the distributions over the
    other classes alone. The plain divergence weighs NCKD by the probability that the teacher leaves
    to the other classes, and so hides most of it where the teacher is sure (Zhao, Cui, Song, Qiu,
    Liang, "Decoupled Knowledge Distillation", CVPR 2022).

    Args:
        temperature: Positive number τ. Defaults to 4.0.
        alpha: Coefficient α of the label's class, not negative. Defaults to 1.0.
        beta: Coefficient β of the other classes, not negative. Defaults to 8.0, the paper's for
            most pairs on CIFAR-100.
        reduction: As in `keras.losses.Loss`. `call` itself never reduces.
        name: Optional name.
        dtype: The dtype of the computation. Defaults to `keras.config.floatx()`.

    Shapes:
        `y_true`, `y_pred`: logits `[B, C]`, or dense, such as `[B, H, W, C]`; C is at least 2.
        `label`: indices `[B]` or `[B, 1]`, or one-hot `[B, C]`; the same for dense logits.
        `call` returns `[B]`, or one value a position; 0 where the index is of no class.

    Raises:
        InputError: A number is out of range, the label is missing or has another shape, or the
            classes differ. Called as Keras calls a loss, with logits alone, the label is missing.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        reduction: str | None = "sum_over_batch_size",
        name: str = "decoupled_kl_divergence",
        dtype: Any = None,
    ) -> None:
        super().__init__(temperature, reduction, name, dtype)
        self.alpha = checks.real("alpha", alpha, least=0)
        self.beta = checks.real("beta", beta, least=0)

    def call(self, y_true: Any, y_pred: Any, label: Any = None, temperature: Any = None) -> Any:
        """Returns the decoupled divergence, `[B]` for logits `[B, C]`.

        `temperature`, a number or a scalar tensor, takes the place of the loss's own.
        """
        p, q, temperature = self._softened(y_true, y_pred, temperature)
        is_target = _is_target(label, y_pred)
        (target_p, log_p), (target_q, log_q) = (_decoupled(z, is_target) for z in (p, q))
        of_target = _binary_kl_divergence(target_p, target_q)
        of_others = ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1)
        divergence = self.alpha * of_target + self.beta * of_others
        has_target = ops.any(is_target, axis=-1)
        return temperature**2 * ops.where(has_target, divergence, ops.zeros_like(divergence))

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that rebuild this loss."""
        return {**super().get_config(), "alpha": self.alpha, "beta": self.beta}


@keras.saving.register_keras_serializable("dskd_keras")
class DIST(_OnLogits):
    """DIST: correlation in place of divergence, for a teacher much stronger than the student.

    `τ² · (β · (1 − ρ_image) + γ · (1 − ρ_batch))` on the softened probabilities. `ρ_image` is
    Pearson's correlation over the classes of an image. `ρ_batch` is that of a class over the batch,
    averaged over the classes: one number, which is added to every image (Huang, You, Wang, Qian,
    Xu, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022). A side that does not vary
    has the correlation 0, and a batch of one image has no other over the batch. On several replicas
    the batch is that of one replica.

    Args:
        temperature: Positive number τ. Defaults to 1.0, the paper's on ImageNet; it takes 4.0 on
            CIFAR-100.
        beta: Coefficient β over the classes, not negative. Defaults to 1.0; the paper takes 2.0
            for both.
        gamma: Coefficient γ over the batch, not negative. Defaults to 1.0.
        reduction: As in `keras.losses.Loss`. `call` itself never reduces.
        name: Optional name.
        dtype: The dtype of the computation. Defaults to `keras.config.floatx()`.

    Shapes:
        `y_true`, `y_pred`: logits `[B, C]`, or dense, such as `[B, T, C]`, where each position
        counts as an image.
        `mask`: bool `[B]` or `[B, T]`. Positions that are not valid count nowhere and get 0.
        `call` returns `[B]`, or one value a position.

    Raises:
        InputError: A number is out of range, the mask has another shape, or the classes differ.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        reduction: str | None = "sum_over_batch_size",
        name: str = "dist",
        dtype: Any = None,
    ) -> None:
        super().__init__(temperature, reduction, name, dtype)
        self.beta = checks.real("beta", beta, least=0)
        self.gamma = checks.real("gamma", gamma, least=0)

    def call(self, y_true: Any, y_pred: Any, mask: Any = None, temperature: Any = None) -> Any:
        """Returns what the correlations lack to 1, `[B]` for logits `[B, C]`.

        `temperature`, a number or a scalar tensor, takes the place of the loss's own.
        """
        valid = None
        if mask is not None:
            valid = maps.valid(mask, y_pred)
            y_true, y_pred = maps.zeroed(y_true, valid), maps.zeroed(y_pred, valid)
        p, q, temperature = self._softened(y_true, y_pred, temperature)
        p, q = ops.softmax(p, axis=-1), ops.softmax(q, axis=-1)
        rows = tuple(range(len(y_pred.shape) - 1))
        of_image = 1.0 - _correlation(p, q, -1)
        of_batch = 1.0 - ops.mean(_correlation(p, q, rows, valid))
        lacking = temperature**2 * (self.beta * of_image + self.gamma * of_batch)
        return lacking if valid is None else ops.where(valid, lacking, ops.zeros_like(lacking))

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that rebuild this loss."""
        return {**super().get_config(), "beta": self.beta, "gamma": self.gamma}


@keras.saving.register_keras_serializable("dskd_keras")
class StandardizedKLDivergence(_OnLogits):
    """Kullback-Leibler divergence of standardised logits, so that their scale is left free.

    The logits of each side become `(z − mean) / standard deviation` over the classes of an image.
    `KLDivergence` with the base temperature follows (Sun, Ren, Li, Wang, Cao, "Logit
    Standardization in Knowledge Distillation", CVPR 2024, algorithm 1). The variance is divided by
    the number of classes; the authors' code divides by one less.

    Args:
        temperature: Positive number τ, the base temperature. Defaults to 2.0, the authors'.
        reduction: As in `keras.losses.Loss`. `call` itself never reduces.
        name: Optional name.
        dtype: The dtype of the computation. Defaults to `keras.config.floatx()`.

    Shapes:
        `y_true`, `y_pred`: logits `[B, C]`, or dense, such as `[B, T, C]` and `[B, H, W, C]`.
        `call` returns `[B]`, or one value a position.

    Raises:
        InputError: `temperature` is not a positive finite number, or the classes differ.
    """

    def __init__(
        self,
        temperature: float = 2.0,
        reduction: str | None = "sum_over_batch_size",
        name: str = "standardized_kl_divergence",
        dtype: Any = None,
    ) -> None:
        super().__init__(temperature, reduction, name, dtype)

    def call(self, y_true: Any, y_pred: Any, temperature: Any = None) -> Any:
        """Returns the divergence of the standardised logits, `[B]` for logits `[B, C]`.

        `temperature`, a number or a scalar tensor, takes the place of the loss's own.
        """
        p, q, temperature = self._softened(
            _standardized(y_true), _standardized(y_pred), temperature
        )
        return temperature**2 * _kl_divergence(p, q)


@keras.saving.register_keras_serializable("dskd_keras")
class FeatureMeanSquaredError(keras.losses.Loss):
    """Mean squared difference of two feature maps, over everything but the batch.

    `keras.losses.MeanSquaredError` averages the last axis alone, so that on `[B, H, W, C]` a
    `sample_weight` of shape `[B]` would be aligned with W.

    Where the teacher's map is the larger one, it is average-pooled to the student's size, and the
    other way round. Maps of different kinds, such as a sequence and an image, are compared by their
    averages over positions.

    Args:
        reduction: As in `keras.losses.Loss`. `call` itself never reduces.
        name: Optional name.
        dtype: The dtype of the computation. Defaults to `keras.config.floatx()`.

    Shapes:
        `y_true`, the teacher's map: `[B, *positions, D]` or `[B, D]`, channels last.
        `y_pred`, the student's map, projected to the same D.
        `mask`: bool `[B, *positions]` of two maps of one size.
        `call` returns `[B]`; with a mask one value a position, 0 where it is not valid.

    Raises:
        InputError: The maps differ in channels, or a mask has other positions than they.
    """

    def __init__(
        self,
        reduction: str | None = "sum_over_batch_size",
        name: str = "feature_mean_squared_error",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)

    def call(self, y_true: Any, y_pred: Any, mask: Any = None) -> Any:
        """Returns the mean squared difference for each image, `[B]`; with a mask by position."""
        _check_same_last("channels", y_true, y_pred)
        y_true, y_pred, valid = _at_common_positions(y_true, y_pred, mask)
        difference = ops.square(y_true - y_pred)
        if valid is not None:
            return ops.mean(difference, axis=-1)
        return ops.mean(difference, axis=tuple(range(1, len(difference.shape))))


@keras.saving.register_keras_serializable("dskd_keras")
class FeatureNormalizedMeanSquaredError(FeatureMeanSquaredError):
    """`FeatureMeanSquaredError` over the variance of the teacher's map: the share unexplained.

    A map that says nothing of the image, the channels' means, has the loss 1, and one that equals
    the teacher's has 0. So one coefficient serves teachers whose features differ in size. The
    variance is over the batch and the positions, within channels, and it is averaged over channels.
    The mean of the loss over a batch is 1 − R², the coefficient of determination.

    Args, shapes and errors: As in `FeatureMeanSquaredError`. A map that is the same everywhere has
    no variance; its loss is 0.
    """

    def __init__(
        self,
        reduction: str | None = "sum_over_batch_size",
        name: str = "feature_normalized_mean_squared_error",
        dtype: Any = None,
    ) -> None:
        super().__init__(reduction=reduction, name=name, dtype=dtype)

    def call(self, y_true: Any, y_pred: Any, mask: Any = None) -> Any:
        """Returns the share of the variance for each image, `[B]`; with a mask by position."""
        y_true, y_pred, valid = _at_common_positions(y_true, y_pred, mask)
        errors = super().call(y_true, y_pred, valid)
        return ops.divide_no_nan(errors, ops.stop_gradient(_variance(y_true, valid)))


@keras.saving.register_keras_serializable("dskd_keras")
class AttentionTransfer(keras.losses.Loss):
    """Mean squared difference of two attention maps: where a network looks, whatever its channels.

    The attention of a position is the mean of its channels' squares. The attentions of an image
    are divided by their length as one vector, for each side, and the squared differences are
    averaged over positions (Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017,
    section 3.1; the mean is that of the authors' code). Of two maps the larger one is
    average-pooled first. A map of zeros has no attention anywhere.

    Args:
        reduction: As in `keras.losses.Loss`. `call` itself never reduces.
        name: Optional name.
        dtype: The dtype of the computation. Defaults to `keras.config.floatx()`.

    Shapes:
        `y_true`, `y_pred`: maps of one rank, `[B, *positions, C]`; the channels need not agree.
        `mask`: bool `[B, *positions]` of two maps of one size.
        `call` returns `[B]`.

    Raises:
        InputError: A map has no positions, their ranks differ, or a mask has other positions.
    """

    def __init__(
        self,
        reduction: str | None = "sum_over_batch_size",
        name: str = "attention_transfer",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)

    def call(self, y_true: Any, y_pred: Any, mask: Any = None) -> Any:
        """Returns the mean squared difference of the attentions for each image, `[B]`."""
        if not 2 < len(y_true.shape) == len(y_pred.shape):
            raise InputError(
                f"y_pred: shape {tuple(y_pred.shape)}, and y_true: shape {tuple(y_true.shape)}, "
                "should both be [B, *positions, C], with as many axes, for attention over "
                "positions. Take FeatureMeanSquaredError or CosineFeatures for other maps."
            )
        y_true, y_pred, valid = _at_common_positions(y_true, y_pred, mask)
        difference = ops.square(_attention(y_true) - _attention(y_pred))
        axes = tuple(range(1, len(difference.shape)))
        if valid is None:
            return ops.mean(difference, axis=axes)
        count = ops.sum(ops.cast(valid, keras.backend.standardize_dtype(y_pred.dtype)), axis=axes)
        return ops.divide_no_nan(ops.sum(difference, axis=axes), count)


@keras.saving.register_keras_serializable("dskd_keras")
class CosineFeatures(keras.losses.Loss):
    """One minus the cosine between the channels of two feature maps, at each position.

    It compares directions, and leaves the size of the student's features free, as the embedding
    loss of DistilBERT does (Sanh, Debut, Chaumond, Wolf, "DistilBERT, a distilled version of BERT",
    2019, section 2). Of two maps the larger one is average-pooled first. Maps of different kinds
    are compared by their averages over positions. A vector of zeros has the cosine 0.

    Args:
        reduction: As in `keras.losses.Loss`. `call` itself never reduces.
        name: Optional name.
        dtype: The dtype of the computation. Defaults to `keras.config.floatx()`.

    Shapes:
        `y_true`, the teacher's map: `[B, *positions, D]` or `[B, D]`, channels last.
        `y_pred`, the student's map, projected to the same D.
        `mask`: bool `[B, *positions]` of two maps of one size.
        `call` returns one value a position, 0 where it is not valid, or `[B]` for vectors.

    Raises:
        InputError: The maps differ in channels, or a mask has other positions than they.
    """

    def __init__(
        self,
        reduction: str | None = "sum_over_batch_size",
        name: str = "cosine_features",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)

    def call(self, y_true: Any, y_pred: Any, mask: Any = None) -> Any:
        """Returns one minus the cosine at each position, or `[B]` for vectors."""
        _check_same_last("channels", y_true, y_pred)
        y_true, y_pred, valid = _at_common_positions(y_true, y_pred, mask)
        distance = 1.0 - ops.sum(_directions(y_true, -1) * _directions(y_pred, -1), axis=-1)
        return distance if valid is None else ops.where(valid, distance, ops.zeros_like(distance))


_LOSSES: dict[str, type[keras.losses.Loss]] = {
    "kl_divergence": KLDivergence,
    "binary_kl_divergence": BinaryKLDivergence,
    "decoupled_kl_divergence": DecoupledKLDivergence,
    "dist": DIST,
    "standardized_kl_divergence": StandardizedKLDivergence,
    "feature_mean_squared_error": FeatureMeanSquaredError,
    "feature_normalized_mean_squared_error": FeatureNormalizedMeanSquaredError,
    "attention_transfer": AttentionTransfer,
    "cosine_features": CosineFeatures,
}


_ON_MAPS = (
    "feature_mean_squared_error", "feature_normalized_mean_squared_error", "attention_transfer",
    "cosine_features",
)  # fmt: skip


def names() -> list[str]:
    """Returns the names of the losses of this module."""
    return list(_LOSSES)


def get(field: str, identifier: Any) -> keras.losses.Loss | Callable[..., Any]:
    """Returns the loss for a name, a configuration, an object or a function.

    Args:
        field: The argument that held it, for messages: `"prediction_loss"` or `"feature_loss"`.
        identifier: A name out of `names()`, a configuration that
            `keras.saving.serialize_keras_object` made of a loss, a `keras.losses.Loss`, or a
            function of the teacher's side and the student's.

    Returns:
        A new loss for a name or a configuration, else the object given.

    Raises:
        InputError: The name is unknown or of a loss on the other kind, or the object is no loss.
    """
    if isinstance(identifier, str):
        choices = [name for name in _LOSSES if (name in _ON_MAPS) == (field == "feature_loss")]
        if identifier not in choices:
            raise InputError(
                f"{unknown_name(field, identifier, choices)} Any keras.losses.Loss is taken as an "
                "object, such as keras.losses.MeanSquaredError()."
            )
        return _LOSSES[identifier]()
    loss = identifier
    if isinstance(identifier, dict):
        loss = keras.saving.deserialize_keras_object(identifier)
    is_function = callable(loss) and not isinstance(loss, type)
    if isinstance(loss, keras.losses.Loss) or is_function:
        _check_arguments(field, loss)
        return loss
    raise wrong(
        field,
        identifier,
        f"one of {', '.join(_LOSSES)}, a configuration, a keras.losses.Loss object or a function",
    )


def _check_arguments(field: str, loss: keras.losses.Loss | Callable[..., Any]) -> None:
    """Raises `InputError` where a loss needs what nobody gives it."""
    function = loss.call if isinstance(loss, keras.losses.Loss) else loss
    parameters = list(inspect.signature(function).parameters.values())
    given = ("mask",) if field == "feature_loss" else ("label", "mask", "temperature")
    for parameter in parameters[2:]:
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if not optional and parameter.name not in given:
            raise InputError(
                f"{field}: {getattr(loss, '__name__', type(loss).__name__)} needs "
                f"'{parameter.name}', which is not given to it. Beside the teacher's side and the "
                f"student's it may name {' and '.join(given)}."
            )


def values(
    loss: keras.losses.Loss | Callable[..., Any], y_true: Any, y_pred: Any, **extras: Any
) -> Any:
    """Returns a loss's values before any reduction.

    Args:
        loss: A `keras.losses.Loss`, whose `call` is called, or a function.
        y_true: The teacher's side.
        y_pred: The student's side.
        **extras: What a loss may take besides: `temperature`, `label`, `mask`. It gets those that
            its signature names after the first two arguments, or all if it takes `**kwargs`.

    Returns:
        What the loss returns: one value an image, `[B]`, or one value a position.
    """
    function = loss.call if isinstance(loss, keras.losses.Loss) else loss
    parameters = list(inspect.signature(function).parameters.values())
    by_position = [
        p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name for p in parameters}
    taken = {
        name: value
        for name, value in extras.items()
        if (takes_all or name in named) and name not in by_position[:2]
    }
    return function(y_true, y_pred, **taken)


def _check_same_last(what: str, y_true: Any, y_pred: Any) -> None:
    teacher, student = y_true.shape[-1], y_pred.shape[-1]
    if teacher is not None and student is not None and teacher != student:
        way_out = (
            "Project one of them, or take AttentionTransfer, which compares maps of any channels."
            if what == "channels"
            else "Both sides need logits for the same classes."
        )
        raise InputError(
            f"y_pred: shape {tuple(y_pred.shape)} should have the {teacher} {what} of y_true, "
            f"shape {tuple(y_true.shape)}. {way_out}"
        )


def _kl_divergence(p: Any, q: Any) -> Any:
    log_p, log_q = ops.log_softmax(p, axis=-1), ops.log_softmax(q, axis=-1)
    return ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1)


def _binary_kl_divergence(p: Any, q: Any) -> Any:
    log_p, log_q = ops.log_sigmoid(p), ops.log_sigmoid(q)
    log_not_p, log_not_q = ops.log_sigmoid(-p), ops.log_sigmoid(-q)
    return ops.exp(log_p) * (log_p - log_q) + ops.exp(log_not_p) * (log_not_p - log_not_q)


def _is_target(label: Any, logits: Any) -> Any:
    """Returns as bool, in the shape of the logits, whether a class is the label's."""
    expected, classes = tuple(logits.shape[:-1]), logits.shape[-1]
    if classes < 2:
        raise InputError(
            f"y_pred: shape {tuple(logits.shape)} should have at least 2 classes, to part one "
            "from the others. Take BinaryKLDivergence for one logit."
        )
    if label is None:
        raise InputError(
            "label: None, but DecoupledKLDivergence parts the label's class from the others. Give "
            "the label, as indices or one-hot, or take KLDivergence."
        )
    label = given = ops.convert_to_tensor(label)
    if len(label.shape) == len(logits.shape) and label.shape[-1] == classes:
        label = ops.argmax(label, axis=-1)
    elif len(label.shape) == len(logits.shape) and label.shape[-1] == 1:
        label = ops.squeeze(label, -1)
    if len(label.shape) != len(expected) or any(
        own is not None and other is not None and own != other
        for own, other in zip(label.shape, expected, strict=True)
    ):
        raise InputError(
            f"label: shape {tuple(given.shape)} should be {expected}, class indices, or "
            f"{tuple(logits.shape)}, one-hot."
        )
    return ops.expand_dims(ops.cast(label, "int32"), -1) == ops.arange(0, classes, dtype="int32")


def _decoupled(logits: Any, is_target: Any) -> tuple[Any, Any]:
    """Returns the logit of the target against all others, and the others' log-probabilities.

    The latter are those among the others alone, and 0 for the target.
    """
    zeros, least = ops.zeros_like(logits), ops.full_like(logits, float("-inf"))
    others = ops.logsumexp(ops.where(is_target, least, logits), axis=-1, keepdims=True)
    target = ops.sum(ops.where(is_target, logits, zeros), axis=-1)
    return target - ops.squeeze(others, -1), ops.where(is_target, zeros, logits - others)


def _standardized(logits: Any) -> Any:
    centred = logits - ops.mean(logits, axis=-1, keepdims=True)
    variance = ops.mean(ops.square(centred), axis=-1, keepdims=True)
    return centred * ops.rsqrt(variance + _VARIANCE)


def _scaled(x: Any, axis: Any) -> Any:
    """Returns vectors whose largest entry is 1 or −1, so that squares neither overflow nor vanish.

    The scale is a constant for the gradient, which is right where only directions count.
    """
    largest = ops.stop_gradient(ops.max(ops.abs(x), axis=axis, keepdims=True))
    return x / ops.where(largest > _TINY, largest, ops.ones_like(largest))


def _directions(x: Any, axis: Any) -> Any:
    """Returns vectors along `axis` divided by their length; those of zeros stay."""
    x = _scaled(x, axis)
    squares = ops.sum(ops.square(x), axis=axis, keepdims=True)
    # The largest entry is 1 unless all are zero, where a length's gradient would be NaN.
    return x * ops.rsqrt(ops.where(squares > 0.5, squares, ops.ones_like(squares)))


def _correlation(p: Any, q: Any, axis: Any, valid: Any = None) -> Any:
    """Returns Pearson's correlation of two sets of probabilities along `axis`.

    `valid` says which rows count, where `axis` is all but the last.
    """
    counted = ops.ones_like(p)
    if valid is not None:
        counted = counted * ops.cast(ops.expand_dims(valid, -1), counted.dtype)
    count = ops.maximum(ops.sum(counted, axis=axis, keepdims=True), 1.0)

    def standardized(x: Any) -> Any:
        # The probabilities of a rare class may be tiny, and their correlation counts all the same.
        x = _scaled(x * counted, axis)
        squares = ops.sum(ops.square(x), axis=axis, keepdims=True)
        x = (x - ops.sum(x, axis=axis, keepdims=True) / count) * counted
        variation = ops.sum(ops.square(x), axis=axis, keepdims=True)
        return x * ops.rsqrt(variation + _VARIANCE * ops.maximum(squares, 1.0))

    return ops.sum(standardized(p) * standardized(q), axis=axis)


def _variance(x: Any, valid: Any) -> Any:
    """Returns the variance of a map within channels, over all that is valid, as a scalar."""
    axes = tuple(range(len(x.shape) - 1))
    if valid is None:
        return ops.mean(ops.var(x, axis=axes))
    counted = ops.cast(ops.expand_dims(valid, -1), x.dtype)
    count = ops.maximum(ops.sum(counted), 1.0)
    centred = (x - ops.sum(x * counted, axis=axes) / count) * counted
    return ops.mean(ops.sum(ops.square(centred), axis=axes) / count)


def _attention(x: Any) -> Any:
    """Returns the attention of each position of `[B, *positions, C]`, of length 1 by image."""
    positions = tuple(range(1, len(x.shape) - 1))
    x = _scaled(x, (*positions, -1))
    return _directions(ops.mean(ops.square(x), axis=-1), positions)


def _at_common_positions(y_true: Any, y_pred: Any, mask: Any) -> tuple[Any, Any, Any]:
    """Returns both maps at common positions, and which are valid, None for all."""
    if mask is None:
        return maps.aligned(y_true, y_pred)
    if maps.equal_sizes(y_true, y_pred) is False:
        raise InputError(
            f"mask: shape {tuple(mask.shape)} belongs to one size, but y_true has the shape "
            f"{tuple(y_true.shape)} and y_pred {tuple(y_pred.shape)}. Bring them to equal sizes "
            "with dskd_keras.maps.aligned."
        )
    valid = maps.valid(mask, y_pred)
    return maps.zeroed(y_true, valid), maps.zeroed(y_pred, valid), valid
