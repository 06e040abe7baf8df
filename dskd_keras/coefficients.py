"""Temperature and coefficients of the objective, as numbers that may change while it trains."""

from typing import Any

import keras
import numpy as np
from keras import ops

from dskd_keras import checks
from dskd_keras.errors import InputError

# In the order of the variable.
NAMES = (
    "temperature",
    "label_weight",
    "prediction_weight",
    "deep_prediction_weight",
    "deep_feature_weight",
)


def check(name: str, value: Any) -> float:
    """Returns a temperature or a coefficient as a float.

    Raises:
        InputError: It is no finite number, a temperature is not positive, or a coefficient is
            negative.
    """
    if name == "temperature":
        return checks.temperature(name, value)
    return checks.real(name, value, least=0)


def sync(model: keras.Model) -> None:
    """On JAX, gives the variables of a model their values, which a step's state holds in `fit`."""
    if keras.backend.backend() == "jax":
        model.jax_state_sync()


class Coefficients(keras.layers.Layer):
    """The five numbers in one float32 variable: a compiled step sees them change.

    A term whose coefficient is 0 at the beginning is not part of the step, so it can't be given
    another one later.

    Args:
        values: By the names in `NAMES`, checked.
    """

    def __init__(self, values: dict[str, float]) -> None:
        super().__init__(name="coefficients", dtype="float32")
        self._first = dict(values)
        self._variable = self.add_weight(
            shape=(len(NAMES),), initializer="zeros", trainable=False, name="values"
        )
        self._variable.assign(np.array([values[name] for name in NAMES], "float32"))
        self.built = True

    def in_step(self) -> dict[str, Any]:
        """Returns the numbers as scalar tensors by name, for the computation of a step."""
        return dict(zip(NAMES, ops.unstack(self._variable.value), strict=True))

    def read(self, model: keras.Model, name: str) -> float:
        """Returns a number; `model` is the one that trains with it."""
        sync(model)
        value = ops.convert_to_numpy(self._variable)[NAMES.index(name)]
        return float(str(value))  # 0.1 in float32 would be 0.10000000149 in float64

    def config(self, model: keras.Model) -> dict[str, float]:
        """Returns the numbers with which to make a distiller of the same terms.

        A term whose coefficient has fallen to 0 gets the first one. The weights hold the 0.
        """
        return {name: self.read(model, name) or self._first[name] for name in NAMES}

    def write(self, model: keras.Model, name: str, value: Any) -> None:
        """Sets a number, between two steps of `fit` too; `model` is the one that trains with it.

        Raises:
            InputError: The number can't be used, or its term is not computed.
        """
        number = check(name, value)
        if number and not self._first[name]:
            raise InputError(
                f"{name}: {number}, but it was 0 when the distiller was made, so its term is not "
                "computed. Make a distiller with a positive one; then it may fall to 0 and rise."
            )
        sync(model)
        values = np.array(ops.convert_to_numpy(self._variable))
        values[NAMES.index(name)] = number
        self._variable.assign(values)

    def load_own_variables(self, store: Any) -> None:
        """Restores the numbers; files of earlier versions hold none."""
        if store.keys():
            super().load_own_variables(store)
