"""Keras callbacks for distillation."""

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
