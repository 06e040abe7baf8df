"""How fast a training is."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import keras

from dskd_keras.progress import last_step


class Throughput(keras.callbacks.Callback):
    """Measures how many images a second the training steps take.

    The first step of a run is left out, since it compiles (with `steps_per_execution`, the first
    execution), and so is evaluation. An epoch may have any number of steps, also fewer than the
    others, as where a run is continued within it.

    Args:
        images_per_step: Number of images in a step: the mean where the last batch is smaller.

    Example:

    ```python
    throughput = dskd_keras.callbacks.Throughput(images_per_step=64)
    distiller.fit(x, y, batch_size=64, epochs=3, callbacks=[throughput])
    throughput.images_per_second
    ```
    """

    def __init__(self, images_per_step: float) -> None:
        super().__init__()
        self._images_per_step = images_per_step
        self._compiled = False
        self._start = self._end = 0.0
        self._first_step = self._steps = 0
        self._rates: list[float] = []

    @property
    def images_per_second(self) -> float | None:
        """Median over the epochs so far; None before the end of an epoch with a second step."""
        return statistics.median(self._rates) if self._rates else None

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Starts the clock."""
        self._first_step = self._steps = 0
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Reads the clock. Keras has waited for the step by now: the logs are Python's floats."""
        self._end, self._steps = time.perf_counter(), last_step(self, batch) + 1
        if not self._compiled:
            self._compiled = True
            self._start, self._first_step = self._end, self._steps

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Notes the epoch's rate, up to its last step: evaluation came after that."""
        steps = self._steps - self._first_step
        if steps:
            self._rates.append(steps * self._images_per_step / (self._end - self._start))
