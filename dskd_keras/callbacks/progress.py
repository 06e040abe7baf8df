"""What a run shows while it trains, and how fast it is."""

import statistics
import time

import keras


class ProgressLine(keras.callbacks.ProgbarLogger):
    """Keras's progress bar without the values of single layers, which `History` and the logs hold.

    `Distiller.fit` puts it in the place of the plain one.
    """

    def on_train_batch_end(self, batch, logs=None):
        """Updates the bar."""
        super().on_train_batch_end(batch, _without_layers(logs))

    def on_epoch_end(self, epoch, logs=None):
        """Ends the epoch's bar."""
        super().on_epoch_end(epoch, _without_layers(logs))


def _without_layers(logs):
    return {name: value for name, value in (logs or {}).items() if "/" not in name}


def last_step(callback, batch):
    """Returns the number in its epoch of the step that just ended, from 0.

    With `steps_per_execution` Keras counts the last steps of an epoch as if there were enough of
    them to run together.
    """
    steps = (callback.params or {}).get("steps")
    return batch if steps is None else min(batch, steps - 1)


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

    def __init__(self, images_per_step):
        super().__init__()
        self._images_per_step = images_per_step
        self._compiled = False
        self._start = self._end = 0.0
        self._first_step = self._steps = 0
        self._rates = []

    @property
    def images_per_second(self):
        """Median over the epochs so far; None before the end of an epoch with a second step."""
        return statistics.median(self._rates) if self._rates else None

    def on_epoch_begin(self, epoch, logs=None):
        """Starts the clock."""
        self._first_step = self._steps = 0
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        """Reads the clock. Keras has waited for the step by now: the logs are Python's floats."""
        self._end, self._steps = time.perf_counter(), last_step(self, batch) + 1
        if not self._compiled:
            self._compiled = True
            self._start, self._first_step = self._end, self._steps

    def on_epoch_end(self, epoch, logs=None):
        """Notes the epoch's rate, up to its last step: evaluation came after that."""
        steps = self._steps - self._first_step
        if steps:
            self._rates.append(steps * self._images_per_step / (self._end - self._start))
