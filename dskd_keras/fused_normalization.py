"""On TensorFlow and PyTorch: batch normalisation by the kernel that does all of it at once.

Keras's layer is a dozen operations over the whole map, and as many for its gradient.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops

_Layer = keras.layers.BatchNormalization
# Takes a moving statistic and its new value.
Update = Callable[[keras.Variable, Any], object]


@contextlib.contextmanager
def fused(update: Update = keras.Variable.assign) -> Iterator[None]:
    """A context in which batch normalisations in training take the backend's fused kernel.

    The numbers are Keras's but for rounding, and so are the moving statistics. No layer is changed,
    and no model. What the kernel doesn't do goes through Keras's operations: masks, synchronised
    and renormalised layers, layers derived from Keras's, double precision, on TensorFlow maps
    other than `[B, H, W, C]`, on PyTorch a single value a channel. JAX has no such kernel.

    Args:
        update: Is called with each moving statistic of a fused layer and its new value.
    """
    kernel = _KERNELS.get(keras.backend.backend())
    if kernel is None:
        yield
        return
    fits, normalized = kernel
    by_keras = _Layer.call

    def call(self: Any, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        if not (training and mask is None and _is_plain(self) and fits(self, inputs)):
            return by_keras(self, inputs, training=training, mask=mask)
        # As Keras does: half precision overflows in the statistics.
        y, mean, variance = normalized(self, ops.cast(inputs, "float32"))
        for moving, value in ((self.moving_mean, mean), (self.moving_variance, variance)):
            update(moving, moving * self.momentum + value * (1.0 - self.momentum))
        return ops.cast(y, self.compute_dtype)

    # The class, since layers within layers are not found by a model's graph. A thread that calls
    # one meanwhile gets the same numbers.
    _Layer.call = call
    try:
        yield
    finally:
        _Layer.call = by_keras


def _is_plain(layer: Any) -> bool:
    return (
        type(layer) is _Layer  # what is derived from it may take other moments
        and layer.trainable  # else it takes its moving statistics
        and not layer.synchronized
        and not layer.renorm
        and layer.compute_dtype != "float64"
    )


def _fits_tensorflow(layer: Any, x: Any) -> bool:
    return len(x.shape) == 4 and layer.axis in (-1, 3)


def _by_tensorflow(layer: Any, x: Any) -> tuple[Any, Any, Any]:
    import tensorflow as tf

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
    # TensorFlow joins the kernel with a ReLU after it, which makes zeros of NaN. With this in
    # between it doesn't, at no cost that can be measured, and the loss says what is in the images.
    y = result.y + tf.stop_gradient(0.0 * result.batch_mean)
    return y, result.batch_mean, result.batch_variance * ((count - 1) / count)


def _fits_pytorch(layer: Any, x: Any) -> bool:
    return not x.is_meta and x.numel() > x.shape[layer.axis]


def _by_pytorch(layer: Any, x: Any) -> tuple[Any, Any, Any]:
    import torch

    # Channels second, as a view: the kernel reads maps in either order of memory.
    y, mean, inverse = torch.native_batch_norm(
        x.movedim(layer.axis, 1),
        layer.gamma.value if layer.scale else None,
        layer.beta.value if layer.center else None,
        None,
        None,
        True,
        0.0,
        layer.epsilon,
    )
    with torch.no_grad():
        variance = inverse.square().reciprocal() - layer.epsilon
    return y.movedim(1, layer.axis), mean, variance


_KERNELS: dict[str, tuple[Callable[..., bool], Callable[..., tuple[Any, Any, Any]]]] = {
    "tensorflow": (_fits_tensorflow, _by_tensorflow),
    "torch": (_fits_pytorch, _by_pytorch),
}
