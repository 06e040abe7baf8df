"""Deep supervision that ends before the training does."""

from collections.abc import Mapping
from typing import Any

import keras

from dskd_keras import checks

_COEFFICIENTS = ("deep_prediction_weight", "deep_feature_weight")


class FadeOut(keras.callbacks.Callback):
    """Takes the two coefficients of the shallow layers to 0, so that the student ends on its own.

    Each begins at what the distiller was made with, falls linearly from epoch to epoch, is 0 from
    the epoch `epochs` on (the first one is epoch 0), and stays there. From then on a step has no
    heads, and costs what plain distillation does (`Distiller.recompiles`).

    Args:
        distiller: The distiller before it is trained; its coefficients now are the first ones.
        epochs: Number of epochs with deep supervision, at least 1.

    Raises:
        InputError: `epochs` is no whole number of at least 1.

    Example:

    ```python
    distiller.fit(x, y, epochs=30, callbacks=[dskd_keras.callbacks.FadeOut(distiller, epochs=20)])
    ```
    """

    def __init__(self, distiller: keras.Model, epochs: int) -> None:
        super().__init__()
        self._epochs = checks.whole("epochs", epochs, 1)
        self._first = {name: getattr(distiller, name) for name in _COEFFICIENTS}

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Sets what holds in this epoch."""
        left = max(0.0, 1.0 - epoch / self._epochs)
        for name, first in self._first.items():
            if first:
                setattr(self.model, name, left * first)
