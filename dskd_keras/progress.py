"""What a training shows while it runs, and where in it a callback is."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import keras


class Place(NamedTuple):
    """Where a training stands.

    Attributes:
        epoch: Epochs that are done.
        step: Steps of the next epoch that are done.
    """

    epoch: int = 0
    step: int = 0


class ProgressLine(keras.callbacks.ProgbarLogger):
    """Keras's progress bar without the values of single layers, which `History` and the logs hold.

    `Distiller.fit` puts it in the place of the plain one.
    """

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Updates the bar."""
        super().on_train_batch_end(batch, _without_layers(logs))

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Ends the epoch's bar."""
        super().on_epoch_end(epoch, _without_layers(logs))


def _without_layers(logs: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (logs or {}).items() if "/" not in name}


def last_step(callback: keras.callbacks.Callback, batch: int) -> int:
    """Returns the number of the batch that just ended, from 0, as `fit` counts them.

    With `steps_per_execution` Keras counts the last steps of an epoch as if there were enough of
    them to run together.

    Args:
        callback: The callback that asks.
        batch: What `on_train_batch_end` got.
    """
    steps = (callback.params or {}).get("steps")
    return batch if steps is None else min(batch, steps - 1)


def steps_before(callback: keras.callbacks.Callback, epoch: int) -> int:
    """Returns how many steps of an epoch were done before `fit` came to it.

    `fit` counts the steps of an epoch that it goes on with from 0; where it began is
    `Distiller.resumed_at`.

    Args:
        callback: The callback that asks.
        epoch: The epoch, from 0.
    """
    place = getattr(callback.model, "resumed_at", Place())
    return place.step if epoch == place.epoch else 0
