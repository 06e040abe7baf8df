"""A training run that can't recover ends where it broke."""

import math

import keras

from dskd_keras.callbacks.progress import last_step
from dskd_keras.errors import TrainingError

# What the other terms are made of; after the slash comes the layer.
_LABEL = "label_loss"
_PREDICTION = "prediction_loss"
_DEEP = ("deep_prediction_loss/", "deep_feature_loss/")


class StopOnNonFiniteLoss(keras.callbacks.Callback):
    """Stops the training at the step whose loss is NaN or infinite, and says which terms are.

    `keras.callbacks.TerminateOnNaN` ends `fit` as if it had finished: the callbacks' `on_train_end`
    runs, and a script goes on to save a student full of NaN. With `raise_error=True` it names the
    batch, not what went wrong in it. Here an error is raised at that very step (with
    `steps_per_execution`, after the steps that ran together) and names the terms of a `Distiller`
    at the root of it, with their layers. Weights that became NaN in a step with a finite loss show
    in the next one.

    With mixed precision it stops too: loss scaling mends gradients that overflow, not a loss.

    The loss is all that it looks at as long as that is finite, so it costs next to nothing. Put it
    before callbacks that save: they then never see the broken model.

    Args:
        first_step: Steps of the epoch that were done before, where `fit` continues within one and
            counts its batches from 0. It counts for the first epoch of the next `fit`, and may be
            set as an attribute before each. Defaults to 0.

    Raises:
        TrainingError: From `fit`. The message begins with epoch and step, counted from 1.

    Example:

    ```python
    distiller.fit(x, y, callbacks=[dskd_keras.callbacks.StopOnNonFiniteLoss()])
    # TrainingError: epoch 1, step 12: the loss is not finite: deep_feature_loss/stage1=inf. …
    ```
    """

    def __init__(self, first_step=0):
        super().__init__()
        self.first_step = first_step
        self._epoch = 0
        self._begin = 0

    def on_epoch_begin(self, epoch, logs=None):
        """Notes the epoch."""
        self._epoch = epoch

    def on_epoch_end(self, epoch, logs=None):
        """The next epoch begins at its first step."""
        self.first_step = 0

    def on_train_batch_begin(self, batch, logs=None):
        """Notes the first of the steps that run together."""
        self._begin = batch

    def on_train_batch_end(self, batch, logs=None):
        """Looks at the loss, and at its terms where it is not finite."""
        loss = (logs or {}).get("loss", 0.0)
        if math.isfinite(loss):
            return
        first = self.first_step + self._begin + 1
        last = self.first_step + last_step(self, batch) + 1
        steps = f"step {last}" if first == last else f"steps {first} to {last}"
        bad, advice = _cause(logs, getattr(self.model, "term_names", ()))
        bad = ", ".join(f"{name}={logs[name]}" for name in bad)
        raise TrainingError(
            f"epoch {self._epoch + 1}, {steps}: the loss is not finite: {bad}. {advice}"
        )


def _cause(logs, terms):
    """Returns `(names, advice)`: the terms at the root of it, and what to do in a sentence."""
    bad = [name for name in terms if not math.isfinite(logs[name])]
    roots = [name for name in terms if name in (_LABEL, _PREDICTION) or name.startswith(_DEEP)]
    bad_roots = [name for name in roots if name in bad]
    if not terms:
        return ["loss"], "Lower the learning_rate, or look for NaN in the data."
    if not bad:
        return ["loss"], (
            "Its terms are finite: look at the student's regularisation losses, and lower the "
            "learning_rate."
        )
    if not bad_roots:
        allocations = [name for name in bad if "_allocation/" in name]
        return allocations or bad, "The losses of the layers are finite: look at the weighting."
    if bad_roots == roots:
        teacher = " and the teacher's outputs" if roots != [_LABEL] else ""
        return bad_roots, (
            "Lower the learning_rate, or look for NaN in the images, the sample weights"
            f"{teacher} of this step."
        )
    if bad_roots == [_LABEL]:
        return bad_roots, "The student's logits are finite: look at the labels and compiled loss."
    if _LABEL in roots and _LABEL not in bad_roots and _PREDICTION in bad_roots:
        return bad_roots, "The student's logits are finite: look for NaN in the teacher's outputs."
    return bad_roots, (
        "Lower the learning_rate or the coefficients of these terms, or look for NaN in the "
        "teacher's outputs."
    )
