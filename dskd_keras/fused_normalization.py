"""On TensorFlow: batch normalisation by the kernel that does all of it at once.

Keras's layer is a dozen operations over the whole map, and as many for its gradient.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

_Layer = keras.layers.BatchNormalization


@contextlib.contextmanager
def fused() -> Iterator[None]:
    """A context in which batch normalisations in training take TensorFlow's fused kernel.

    The numbers are Keras's but for rounding, and so are the moving statistics. No layer is changed,
    and no model. Maps that the kernel doesn't take go through Keras's operations: others than
    `[B, H, W, C]`, with a mask, synchronised, renormalised, in double precision, or of a layer that
    is derived from Keras's.
    """
    if keras.backend.backend() != "tensorflow":
        yield
        return
    by_keras = _Layer.call

    def call(self: Any, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        if training and mask is None and _fits(self, inputs):
            return _normalized(self, inputs)
        return by_keras(self, inputs, training=training, mask=mask)

    # The class, since layers within layers are not found by a model's graph. A thread that calls
    # one meanwhile gets the same numbers.
    _Layer.call = call
    try:
        yield
    finally:
        _Layer.call = by_keras


def _fits(layer: Any, x: Any) -> bool:
    return (
        type(layer) is _Layer  # what is derived from it may take other moments
        and layer.trainable  # else it takes its moving statistics
        and len(x.shape) == 4
        and layer.axis in (-1, 3)
        and not layer.synchronized
        and not layer.renorm
        and keras.backend.standardize_dtype(x.dtype) != "float64"
    )


def _normalized(layer: Any, x: Any) -> Any:
    import tensorflow as tf

    # As Keras does: half precision overflows in the statistics.
    x = ops.cast(x, "float32")
    channels = x.shape[-1]
    result = tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=tf.convert_to_tensor(layer.gamma) if layer.scale else tf.ones(channels),
        offset=tf.convert_to_tensor(layer.beta) if layer.center else tf.zeros(channels),
        mean=tf.zeros(0),
        variance=tf.zeros(0),
        epsilon=layer.epsilon,
        is_training=True,
    )
    # The kernel's variance is that of a sample; Keras keeps the mean of the squares.
    count = tf.cast(tf.size(x) // channels, "float32")
    variance = result.batch_variance * ((count - 1) / count)
    for moving, value in (
        (layer.moving_mean, result.batch_mean),
        (layer.moving_variance, variance),
    ):
        moving.assign(moving * layer.momentum + value * (1.0 - layer.momentum))
    return ops.cast(result.y, layer.compute_dtype)
