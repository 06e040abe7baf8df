"""On JAX, on a processor: depthwise convolutions as sums of shifted products.

XLA's own take 10 to 20 times as long there (docs/speed.md).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

_LAYERS = (keras.layers.DepthwiseConv2D, keras.layers.SeparableConv2D)
# A product for each weight of a channel: of larger kernels there would be too many.
_MOST_WEIGHTS = 25


@contextlib.contextmanager
def as_products() -> Iterator[None]:
    """A context in which layers with depthwise convolutions are computed that way, where it pays.

    The numbers are Keras's but for rounding. No layer is changed, and no model. Dilated kernels,
    those of more than 25 weights, maps that are no `[B, H, W, C]` of known size, several outputs of
    a channel, half precision and layers derived from Keras's are left to Keras.
    """
    if keras.backend.backend() != "jax" or not _on_a_processor():
        yield
        return
    own = [vars(kind).get("call") for kind in _LAYERS]
    for kind in _LAYERS:
        kind.call = _called_by(kind.call)
    try:
        yield
    finally:
        for kind, call in zip(_LAYERS, own, strict=True):
            if call is None:
                del kind.call
            else:
                kind.call = call


def _on_a_processor() -> bool:
    import jax

    return jax.default_backend() == "cpu"


def _called_by(by_keras: Any) -> Any:
    def call(self: Any, inputs: Any) -> Any:
        separable = type(self) is keras.layers.SeparableConv2D
        kernel = self.depthwise_kernel if separable else self.kernel
        if not _fits(self, kernel, inputs):
            return by_keras(self, inputs)
        y = _convolved(inputs, ops.convert_to_tensor(kernel), self.strides, self.padding)
        if separable:
            y = ops.conv(y, self.pointwise_kernel, data_format="channels_last")
        if self.use_bias:
            y = y + ops.convert_to_tensor(self.bias)
        return y if self.activation is None else self.activation(y)

    return call


def _fits(layer: Any, kernel: Any, x: Any) -> bool:
    height, width, _, multiplier = kernel.shape
    return (
        type(layer) in _LAYERS
        and layer.data_format == "channels_last"
        and multiplier == 1
        and height * width <= _MOST_WEIGHTS
        and set(layer.dilation_rate) == {1}
        and layer.compute_dtype == "float32"  # sums in half precision would round at each weight
        and None not in x.shape[1:]
    )


def _convolved(x: Any, kernel: Any, strides: tuple[int, int], padding: str) -> Any:
    """Returns the depthwise convolution of `[B, H, W, C]` with a kernel `[h, w, C, 1]`."""
    sizes, pads = [], []
    for length, taps, stride in zip(x.shape[1:3], kernel.shape[:2], strides, strict=True):
        if padding == "same":
            size = -(-length // stride)
            missing = max((size - 1) * stride + taps - length, 0)
        else:
            size, missing = (length - taps) // stride + 1, 0
        sizes.append(size)
        pads.append((missing // 2, missing - missing // 2))
    x = ops.pad(x, [(0, 0), *pads, (0, 0)])
    total = None
    for row in range(kernel.shape[0]):
        for column in range(kernel.shape[1]):
            shifted = x[
                :,
                row : row + (sizes[0] - 1) * strides[0] + 1 : strides[0],
                column : column + (sizes[1] - 1) * strides[1] + 1 : strides[1],
            ]
            product = shifted * kernel[row, column, :, 0]
            total = product if total is None else total + product
    return total
