"""A training run that can't recover ends where it broke."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from dskd_keras.errors import TrainingError
from dskd_keras.progress import last_step, steps_before

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

    Raises:
        TrainingError: From `fit`. The message begins with epoch and step; the first ones are 1.

    Example:

    ```python
    distiller.fit(x, y, callbacks=[dskd_keras.callbacks.StopOnNonFiniteLoss()])
    # TrainingError: epoch 1, step 12: the loss is not finite: deep_feature_loss/stage1=inf. …
    ```
    """

    def __init__(self) -> None:
        super().__init__()
        self._epoch = 0
        self._begin = 0

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Notes the epoch."""
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Notes the first of the steps that run together."""
        self._begin = batch

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Looks at the loss, and at its terms where it is not finite."""
        logs = logs or {}
        if math.isfinite(logs.get("loss", 0.0)):
            return
        done = steps_before(self, self._epoch)
        first, last = done + self._begin + 1, done + last_step(self, batch) + 1
        steps = f"step {last}" if first == last else f"steps {first} to {last}"
        names, advice = _cause(logs, getattr(self.model, "term_names", ()))
        bad = ", ".join(f"{name}={logs[name]}" for name in names)
        raise TrainingError(
            f"epoch {self._epoch + 1}, {steps}: the loss is not finite: {bad}. {advice}"
        )


def _cause(logs: Mapping[str, Any], terms: Sequence[str]) -> tuple[list[str], str]:
    """Returns `(names, advice)`: the terms at the root of it, and what to do in a sentence."""
    terms = [name for name in terms if name in logs]
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
