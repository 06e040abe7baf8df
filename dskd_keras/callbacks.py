"""Keras callbacks for distillation."""

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


class Throughput(keras.callbacks.Callback):
    """Measures how many images a second the training steps take.

    The first step of a run is left out, since it compiles, and so is evaluation.

    Args:
        images: Images in an epoch.
        steps: Steps in an epoch.
    """

    def __init__(self, images, steps):
        super().__init__()
        self._images_per_step = images / steps
        self._steps = steps
        self._first_step = 0
        self._start = None
        self._rates = []

    @property
    def images_per_second(self):
        """Median over the epochs so far; None before the second step."""
        return statistics.median(self._rates) if self._rates else None

    def on_epoch_begin(self, epoch, logs=None):
        """Starts the clock."""
        self._start, self._first_step = time.perf_counter(), 0

    def on_train_batch_end(self, batch, logs=None):
        """Reads the clock at the end of the epoch's last step."""
        if not self._rates and batch == 0 and self._steps > 1:
            self._start, self._first_step = time.perf_counter(), 1
        if batch == self._steps - 1 and batch >= self._first_step:
            float(logs["loss"])  # waits for the steps that an accelerator has still to do
            steps = self._steps - self._first_step
            seconds = time.perf_counter() - self._start
            self._rates.append(steps * self._images_per_step / seconds)
