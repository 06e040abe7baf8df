"""Sums and means over the replicas of `tf.distribute`, whose parts of a batch may differ in size.

On JAX and PyTorch a step sees the whole batch, and so it does on TensorFlow without a strategy:
there each function is the plain one.
"""

from typing import Any

import keras
from keras import ops


def count() -> int:
    """Returns how many replicas of `tf.distribute` train together, 1 where there is none."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync


def total(values: Any) -> Any:
    """Returns a tensor's sum over the replicas, within a step of each."""
    if keras.backend.backend() != "tensorflow":
        return values
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return values
    return context.all_reduce(tf.distribute.ReduceOp.SUM, values)


def size(values: Any) -> Any:
    """Returns how many images the whole batch has, as a number of the values' dtype.

    Args:
        values: `[B, …]`, one replica's part of the batch.
    """
    return total(ops.cast(ops.shape(values)[0], values.dtype))


def mean(values: Any) -> Any:
    """Returns the mean over the whole batch.

    Args:
        values: `[B]`, one replica's part of the batch, which may be empty; or `[L, B]`.

    Returns:
        A scalar, or `[L]`.
    """
    if count() == 1:
        return ops.mean(values, axis=-1)
    of_images = ops.moveaxis(values, -1, 0)
    return total(ops.sum(values, axis=-1)) / size(of_images)
