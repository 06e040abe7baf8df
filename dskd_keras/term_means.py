"""The means of the objective's terms: over a batch for the loss, over an epoch for the logs."""

from typing import Any

import keras
from keras import ops

from dskd_keras import replicas


class BatchMean(keras.losses.Loss):
    """The mean of one value an image: Σ w·l / B.

    `tf.distribute` sums the gradients of the replicas, and a Keras loss scales itself by their
    number. That is right where all have as many images. Here the gradient is that of the replica's
    share of the sum over the batch of all replicas, so that a smaller last batch, which doesn't
    divide among them, has the gradient that one device finds.
    """

    def __init__(self) -> None:
        super().__init__(name="batch_mean")

    def __call__(self, values: Any, sample_weight: Any = None) -> Any:
        """Returns the mean of values `[B]`, each times its weight, if there are weights `[B]`."""
        # Keras pairs predictions with targets. Here the values are both.
        mean = super().__call__(values, values, sample_weight)
        if replicas.count() == 1:
            return mean
        weighted = values if sample_weight is None else values * sample_weight
        share = ops.sum(weighted) / replicas.size(values)
        # The value stays the replica's own mean: Keras's tracker of the loss weighs it by the
        # replica's number of images.
        return share + ops.stop_gradient(mean - share)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Returns the values."""
        return y_pred


class TermMeans(keras.metrics.Metric):
    """The means of all terms over an epoch, in one metric: a step updates it once.

    `last_step` holds what the last step added: the totals of the terms, then its number of images.
    `wrong_labels` counts the labels since `fit` began that no class or range allows.

    Under `tf.distribute` the variables of metrics are summed over the replicas. A mean would be
    wrong then, while the quotient of two sums is right.

    Attributes:
        names: The names of all terms, in the order of the variables.
        computed: The names of those that a step computes now; only these are results.
    """

    def __init__(self, names: list[str]) -> None:
        super().__init__(name="term_means")
        self.names = names
        self.computed = names
        self.total = self.add_weight(shape=(len(names),), initializer="zeros", name="total")
        self.images = self.add_weight(initializer="zeros", name="images")
        self.last_step = self.add_weight(
            shape=(len(names) + 1,), initializer="zeros", name="last_step"
        )
        self.wrong_labels = self.add_weight(initializer="zeros", name="wrong_labels")

    def update_state(
        self, terms: dict[str, Any], batch_size: Any, wrong_labels: Any = None
    ) -> None:
        """Adds a step's terms by name, scalars that are means over so many images."""
        batch_size = ops.cast(batch_size, self.dtype)
        values = ops.stack([terms[n] if n in self.computed else ops.zeros(()) for n in self.names])
        values = ops.cast(values, self.dtype) * batch_size
        self.total.assign_add(values)
        self.images.assign_add(batch_size)
        self.last_step.assign(ops.append(values, batch_size))
        if wrong_labels is not None:
            self.count_wrong_labels(wrong_labels)

    def count_wrong_labels(self, count: Any) -> None:
        """Adds to the labels that no class or range allows."""
        self.wrong_labels.assign_add(ops.cast(count, self.dtype))

    def result(self) -> dict[str, Any]:
        """Returns the means by name."""
        means = ops.divide_no_nan(self.total.value, self.images.value)
        return self._of_computed(ops.unstack(means))

    def of_last_step(self, totals: list[float]) -> dict[str, float]:
        """Returns the means of the last step by name, for what `last_step` holds."""
        *totals, images = totals
        return self._of_computed([total / images for total in totals]) if images else {}

    def _of_computed(self, values: list[Any]) -> dict[str, Any]:
        by_name = dict(zip(self.names, values, strict=True))
        return {name: by_name[name] for name in self.computed}

    def reset_state(self) -> None:
        """Begins a new epoch."""
        # Not what callbacks read: `evaluate` within `fit` resets all metrics.
        for variable in (self.total, self.images):
            variable.assign(ops.zeros(variable.shape, dtype=variable.dtype))

    # Files hold nothing that is over once they are read.

    def save_own_variables(self, store: Any) -> None:
        """Saves what an epoch's means go on from."""
        store["0"], store["1"] = self.total, self.images

    def load_own_variables(self, store: Any) -> None:
        """Restores it."""
        self.total.assign(store["0"])
        self.images.assign(store["1"])
