"""Weighting strategies: how much each supervised layer counts, given its current loss."""

from typing import Any

import keras
from keras import ops

from dskd_keras import checks
from dskd_keras.errors import InputError, unknown_name, wrong


class Weighting(keras.layers.Layer):
    """Gives each supervised layer its weight, the allocation. Subclasses implement `call`.

    A strategy is a Keras layer. It can hold a state, such as a moving average of the losses, in
    variables made with `add_weight`, which the distiller tracks, saves and restores. The distiller
    keeps two copies of a strategy: one for the class-prediction losses, one for the feature-map
    losses.

    The paper's abstract (arXiv 2202.07846) says only that the allocation depends on the losses. The
    formulas here are this project's.

    Args:
        name: Optional name.

    Call arguments:
        losses: float32 `[L]`, the batch means of the L layers' losses. No gradient flows through.

    Returns:
        float32 `[L]`, not negative, summing to 1. One layer gets weight 1. Infinite losses take all
        the weight, in equal parts, so that the loss of a diverging layer makes the total infinite
        rather than NaN.

    Example:

    ```python
    @keras.saving.register_keras_serializable()
    class Squared(dskd_keras.weighting.Weighting):
        def call(self, losses):
            squares = keras.ops.square(losses)
            return squares / keras.ops.sum(squares)
    ```
    """

    def __init__(self, name: str | None = None, **kwargs: Any) -> None:
        # Losses stay in float32 whatever the student's precision is.
        kwargs["dtype"] = "float32"
        super().__init__(name=name, **kwargs)

    def __call__(self, losses: Any) -> Any:
        """Returns the allocation `[L]` for losses `[L]`, which may be infinite."""
        losses = ops.stop_gradient(ops.convert_to_tensor(losses, dtype="float32"))
        infinite = ops.isinf(losses)
        # `call` gets finite values in any case: 0 · inf would turn both branches into NaN.
        weights = super().__call__(ops.where(infinite, ops.zeros_like(losses), losses))
        if tuple(weights.shape) != tuple(losses.shape):
            raise InputError(
                f"weighting: {type(self).__name__}.call gives the shape {tuple(weights.shape)}, "
                f"which should be one weight a layer, {tuple(losses.shape)}."
            )
        infinite = ops.cast(infinite, "float32")
        count = ops.sum(infinite)
        weights = ops.where(count > 0, infinite / ops.maximum(count, 1.0), weights)
        return ops.stop_gradient(weights)

    def call(self, losses: Any) -> Any:
        """Returns the allocation `[L]` for finite losses `[L]`."""
        raise NotImplementedError(f"{type(self).__name__} should implement call(losses).")

    def compute_output_spec(self, losses: keras.KerasTensor) -> keras.KerasTensor:
        """Returns the shape and dtype of the allocation, which are those of the losses."""
        return keras.KerasTensor(losses.shape, dtype="float32")


@keras.saving.register_keras_serializable("dskd_keras")
class Softmax(Weighting):
    """`softmax(losses / temperature)`: a layer with a larger loss lags and gets more weight.

    Losses of similar size give a nearly uniform allocation; a smaller temperature sharpens it.

    Args:
        temperature: Positive number, in units of the losses. Defaults to 1.0.
        name: Optional name.
    """

    def __init__(self, temperature: float = 1.0, name: str | None = None, **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self.temperature = checks.real("weighting temperature", temperature, above=0)

    def call(self, losses: Any) -> Any:
        """Returns the allocation `[L]` for finite losses `[L]`."""
        if losses.shape[0] == 1:
            return ops.ones_like(losses)
        # The maximum is subtracted first: a large loss over a small temperature would overflow.
        return ops.softmax((losses - ops.max(losses)) / self.temperature, axis=-1)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that rebuild this strategy."""
        return {**super().get_config(), "temperature": self.temperature}


@keras.saving.register_keras_serializable("dskd_keras")
class Proportional(Weighting):
    """`losses / Σ losses`: larger loss, larger weight, whatever the losses' scale."""

    def call(self, losses: Any) -> Any:
        """Returns the allocation `[L]` for finite losses `[L]`."""
        if losses.shape[0] == 1:
            return ops.ones_like(losses)
        # As the softmax of logarithms neither the sum nor the quotient can overflow. The smallest
        # normal number replaces zero, and the slightly negative divergence that rounding can leave.
        return ops.softmax(ops.log(ops.maximum(losses, 1.2e-38)), axis=-1)


@keras.saving.register_keras_serializable("dskd_keras")
class Inverse(Weighting):
    """`(1 − softmax(losses)) / (L − 1)`: smaller loss, larger weight.

    CA-MKD ("Confidence-Aware Multi-Teacher Knowledge Distillation", Zhang, Chen and Wang, ICASSP
    2022) weighs several teachers in this form.
    """

    def call(self, losses: Any) -> Any:
        """Returns the allocation `[L]` for finite losses `[L]`."""
        layers = losses.shape[0]
        if layers == 1:
            return ops.ones_like(losses)
        return (1.0 - ops.softmax(losses, axis=-1)) / (layers - 1)


@keras.saving.register_keras_serializable("dskd_keras")
class Uniform(Weighting):
    """`1 / L`: the baseline of an ablation."""

    def call(self, losses: Any) -> Any:
        """Returns the allocation `[L]` for finite losses `[L]`."""
        return ops.ones_like(losses) / losses.shape[0]


@keras.saving.register_keras_serializable("dskd_keras")
class Relative(Weighting):
    """`r / Σ r` with `r = loss / its own running mean`: a layer lags if it lags behind itself.

    Losses of layers differ in size for reasons that have nothing to do with progress: a shallow
    layer knows less. Here every layer is measured by its own past, so that a layer whose loss has
    fallen less than the others' of late gets more weight. It starts from equal weights.

    Args:
        momentum: Of the running mean, in [0, 1). Defaults to 0.999.
        name: Optional name.
    """

    def __init__(self, momentum: float = 0.999, name: str | None = None, **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self.momentum = checks.real("momentum", momentum, least=0, below=1)

    def build(self, shape: tuple[int, ...]) -> None:
        """Creates the running means, and the share of them that has been seen."""
        self._mean = self.add_weight(shape, "zeros", name="mean", trainable=False)
        self._seen = self.add_weight((), "zeros", name="seen", trainable=False)

    def call(self, losses: Any) -> Any:
        """Returns the allocation `[L]` for finite losses `[L]`."""
        if losses.shape[0] == 1:
            return ops.ones_like(losses)
        keep = self.momentum
        # The first steps count fully, as in Adam: the sum of the weights so far divides.
        mean = keep * self._mean + (1.0 - keep) * losses
        seen = keep * self._seen + (1.0 - keep)
        self._mean.assign(mean)
        self._seen.assign(seen)
        relative = losses / ops.maximum(mean / seen, 1.2e-38)
        return ops.softmax(ops.log(ops.maximum(relative, 1.2e-38)), axis=-1)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments that rebuild this strategy."""
        return {**super().get_config(), "momentum": self.momentum}


_STRATEGIES: dict[str, type[Weighting]] = {
    "softmax": Softmax,
    "proportional": Proportional,
    "inverse": Inverse,
    "uniform": Uniform,
    "relative": Relative,
}


def names() -> list[str]:
    """Returns the names of the built-in strategies."""
    return list(_STRATEGIES)


def get(identifier: str | dict[str, Any] | Weighting) -> Weighting:
    """Returns the weighting strategy for a name, a configuration or an object.

    Args:
        identifier: A name out of `names()`, a configuration that
            `keras.saving.serialize_keras_object` made of a strategy, or a `Weighting`.

    Returns:
        A new strategy, or the object given.

    Raises:
        InputError: The name is unknown, or the object is no `Weighting`.
    """
    if isinstance(identifier, Weighting):
        return identifier
    if isinstance(identifier, str):
        if identifier not in _STRATEGIES:
            raise unknown_name("weighting", identifier, _STRATEGIES)
        return _STRATEGIES[identifier]()
    if isinstance(identifier, dict):
        strategy = keras.saving.deserialize_keras_object(identifier)
        if isinstance(strategy, Weighting):
            return strategy
    raise wrong(
        "weighting",
        identifier,
        f"one of {', '.join(_STRATEGIES)}, a configuration or a dskd_keras.weighting.Weighting",
    )


def renamed(strategy: Weighting, name: str) -> Weighting:
    """Returns a new strategy with the settings of one that is given, and none of its state."""
    # Keras imports TensorFlow to make a configuration, on every backend: it takes seconds.
    if type(strategy) is Softmax:
        return Softmax(strategy.temperature, name=name)
    if type(strategy) is Relative:
        return Relative(strategy.momentum, name=name)
    if type(strategy) in _STRATEGIES.values():
        return type(strategy)(name=name)
    try:
        return type(strategy).from_config({**strategy.get_config(), "name": name})
    except Exception as error:  # whatever a class of the user's raises
        cls = type(strategy).__name__
        raise InputError(
            f"weighting: {cls} can't be made anew from its get_config, which the distiller does "
            f"for each kind of loss. Let {cls}.__init__ take **kwargs and hand them to "
            "super().__init__, and get_config hold its other arguments."
        ) from error
