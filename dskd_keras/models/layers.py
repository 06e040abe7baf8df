"""The pieces that the model families share, with PyTorch's padding, normalisation and initialisers.

Each function adds Keras's own layers to a functional graph and names them, so that a saved model
loads where this package is not installed. The data format is `keras.config.image_data_format()`,
handed to every layer that has one: a layer built without it would read the setting of the process
that loads the model.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import keras
import numpy as np

# How the reference models' convolutions start. "he": normal with variance 2 / fan_out, where
# fan_out is the kernel's area times the filters, and a bias of 0 (He et al., arXiv 1502.01852).
# "torch": PyTorch's own default, uniform in ±1/√fan_in, the bias likewise.
Initialization = Literal["he", "torch"]


def convolution(
    x: keras.KerasTensor,
    filters: int,
    kernel_size: int,
    name: str,
    *,
    strides: int = 1,
    groups: int = 1,
    use_bias: bool = False,
    initialization: Initialization = "he",
) -> keras.KerasTensor:
    """Adds a convolution padded by `(kernel_size - 1) / 2` on every side.

    That is PyTorch's `Conv2d(padding=(kernel_size - 1) // 2)`. TensorFlow's `same` agrees with it
    at stride 1, but at stride 2 it pads an even image on the right and at the bottom alone; there
    the padding is a layer of its own, `NAME_pad`.

    Args:
        x: Feature map, `[B, H, W, C]` or `[B, C, H, W]`, by `keras.config.image_data_format()`.
        filters: Number of output channels.
        kernel_size: Height and width of the kernel; odd.
        name: Name of the layer.
        strides: Step in both directions.
        groups: Number of groups of channels that are convolved apart from each other.
        use_bias: Whether a bias is added; a batch normalisation after it makes it superfluous, but
            some reference models have it.
        initialization: How kernel and bias start, see `Initialization`.

    Returns:
        Feature map with `filters` channels, height and width `ceil(size / strides)`.
    """
    return _convolve(
        keras.layers.Conv2D,
        x,
        filters,
        kernel_size,
        filters=filters,
        groups=groups,
        strides=strides,
        use_bias=use_bias,
        name=name,
        **_initializers(
            "kernel", initialization, kernel_size, x.shape[_channel_axis()] // groups, filters
        ),
    )


def depthwise_convolution(
    x: keras.KerasTensor,
    kernel_size: int,
    name: str,
    *,
    strides: int = 1,
    use_bias: bool = False,
    initialization: Initialization = "he",
) -> keras.KerasTensor:
    """Adds a convolution of each channel by itself; otherwise as `convolution`."""
    channels = x.shape[_channel_axis()]
    return _convolve(
        keras.layers.DepthwiseConv2D,
        x,
        channels,
        kernel_size,
        strides=strides,
        use_bias=use_bias,
        name=name,
        **_initializers("depthwise", initialization, kernel_size, 1, channels),
    )


def _convolve(kind, x, channels, kernel_size, *, strides, use_bias, name, **arguments):
    """Pads `x` and calls a new convolution that gives `channels`."""
    data_format, padding = keras.config.image_data_format(), "same"
    width = math.ceil(size(x)[1] / strides)
    # On TensorFlow, Keras 3.15 adds a bias along the width where that equals the channels. (Its
    # `ops.add` takes the last axis for the channels'.) There the convolution is transposed.
    transposed = use_bias and data_format == "channels_first" and width == channels
    if strides > 1:
        padding = "valid"
        if kernel_size > 1:
            x = zero_padding(x, (kernel_size - 1) // 2, name=f"{name}_pad")
    if transposed:
        data_format = "channels_last"
        x = keras.layers.Permute((2, 3, 1), name=f"{name}_channels_last")(x)
    layer = kind(
        kernel_size=kernel_size,
        strides=strides,
        padding=padding,
        data_format=data_format,
        use_bias=use_bias,
        name=name,
        **arguments,
    )
    x = _call(layer, x)
    if transposed:
        x = keras.layers.Permute((3, 1, 2), name=f"{name}_channels_first")(x)
    return x


def _initializers(kernel, initialization, kernel_size, inputs, filters):
    """Returns the arguments that set the start of a kernel and a bias.

    The scales are written out: `VarianceScaling` takes the fans of a depthwise kernel from its
    Keras shape, which is not how PyTorch counts them.
    """
    if initialization == "he":
        std = (2 / (kernel_size**2 * filters)) ** 0.5
        return {f"{kernel}_initializer": keras.initializers.RandomNormal(stddev=std)}
    bound = (kernel_size**2 * inputs) ** -0.5
    return {
        f"{kernel}_initializer": keras.initializers.RandomUniform(-bound, bound),
        "bias_initializer": keras.initializers.RandomUniform(-bound, bound),
    }


def _call(layer, x):
    """Calls a new layer, which creates its weights, with the random ones drawn by NumPy.

    JAX compiles a program for every shape that it draws, which makes most of the time in which a
    model is created there. The draws follow from `keras.utils.set_random_seed`, and are the same on
    every backend. The layer keeps Keras's initialisers, so it saves and loads as any other.
    """
    initializers = {
        name: getattr(layer, name)
        for name in ("kernel_initializer", "depthwise_initializer", "bias_initializer")
        if type(getattr(layer, name, None)) in _DRAWS
    }
    for name, initializer in initializers.items():
        setattr(layer, name, functools.partial(_draw, initializer))
    outputs = layer(x)
    for name, initializer in initializers.items():
        setattr(layer, name, initializer)
    return outputs


_DRAWS = {
    keras.initializers.RandomNormal: lambda of, rng, shape: rng.normal(of.mean, of.stddev, shape),
    keras.initializers.RandomUniform: lambda of, rng, shape: rng.uniform(
        of.minval, of.maxval, shape
    ),
}


def _draw(initializer, shape, dtype=None):
    rng = np.random.default_rng(initializer.seed)
    # The variable converts to its own dtype, which may be one that NumPy lacks.
    return _DRAWS[type(initializer)](initializer, rng, shape).astype("float32")


def zero_padding(x: keras.KerasTensor, padding: int, name: str) -> keras.KerasTensor:
    """Adds `padding` rows and columns of zeros on every side of a feature map."""
    return keras.layers.ZeroPadding2D(
        padding, data_format=keras.config.image_data_format(), name=name
    )(x)


def batch_norm(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    """Adds a batch normalisation over the channels, with PyTorch's constants.

    Args:
        x: Feature map, in the layout of `keras.config.image_data_format()`.
        name: Name of the layer.

    Returns:
        Feature map of the same shape. The momentum of 0.9 is what PyTorch calls 0.1.
    """
    return keras.layers.BatchNormalization(
        axis=_channel_axis(), momentum=0.9, epsilon=1e-5, name=name
    )(x)


def relu(x: keras.KerasTensor, name: str, maximum: float | None = None) -> keras.KerasTensor:
    """Adds a ReLU named `name`, cut at `maximum` if given, to `x`, which may have any shape."""
    return keras.layers.ReLU(max_value=maximum, name=name)(x)


def concatenate(tensors: Sequence[keras.KerasTensor], name: str) -> keras.KerasTensor:
    """Joins feature maps of one size along their channels."""
    return keras.layers.Concatenate(axis=_channel_axis(), name=name)(tensors)


def max_pool(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    """Halves a feature map, rounding down: the maximum of every 2×2 positions."""
    return keras.layers.MaxPooling2D(2, data_format=keras.config.image_data_format(), name=name)(x)


def average_pool(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    """Halves a feature map, rounding up: means over 3×3 positions.

    As in PyTorch's `AvgPool2d(3, stride=2, padding=1)`, the padded zeros count in the mean.
    """
    return keras.layers.AveragePooling2D(
        3, strides=2, data_format=keras.config.image_data_format(), name=name
    )(zero_padding(x, 1, name=f"{name}_pad"))


def channel_shuffle(x: keras.KerasTensor, groups: int, name: str) -> keras.KerasTensor:
    """Interleaves the channels of `groups` groups (Zhang et al., arXiv 1707.01083, figure 1).

    Args:
        x: Feature map whose channels divide by `groups`.
        groups: Number of groups of channels.
        name: Name of the last of the three layers.

    Returns:
        Feature map of the same shape: the first channel of every group, the second of every group,
        and so on. All tensors on the way have four axes, which are cheaper to transpose than five,
        and let the layout of the map be told from the layers before it.
    """
    shape = tuple(x.shape[1:])
    if keras.config.image_data_format() == "channels_first":
        channels, height, width = shape
        split, order = (groups, channels // groups, height * width), (2, 1, 3)
    else:
        height, width, channels = shape
        split, order = (height * width, groups, channels // groups), (1, 3, 2)
    x = keras.layers.Reshape(split, name=f"{name}_split")(x)
    x = keras.layers.Permute(order, name=f"{name}_permute")(x)
    return keras.layers.Reshape(shape, name=name)(x)


def channel_slice(x: keras.KerasTensor, start: int, stop: int, name: str) -> keras.KerasTensor:
    """Takes the channels from `start` up to and without `stop` of a feature map.

    Keras has no layer for that; it is a cropping of the map with its positions on one axis and its
    channels on another. The reshapes move nothing.
    """
    data_format = keras.config.image_data_format()
    if data_format == "channels_first":
        channels, height, width = x.shape[1:]
        flat, shape = (1, channels, height * width), (stop - start, height, width)
        cropping = ((start, channels - stop), (0, 0))
    else:
        height, width, channels = x.shape[1:]
        flat, shape = (height * width, channels, 1), (height, width, stop - start)
        cropping = ((0, 0), (start, channels - stop))
    x = keras.layers.Reshape(flat, name=f"{name}_flat")(x)
    x = keras.layers.Cropping2D(cropping, data_format=data_format, name=f"{name}_crop")(x)
    return keras.layers.Reshape(shape, name=name)(x)


def global_average_pool(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    """Adds the mean over height and width: a feature map with C channels to `[B, C]`."""
    return keras.layers.GlobalAveragePooling2D(
        data_format=keras.config.image_data_format(), name=name
    )(x)


def classifier(
    x: keras.KerasTensor,
    num_classes: int,
    name: str,
    *,
    kernel_initializer: keras.initializers.Initializer | None = None,
    bias_initializer: keras.initializers.Initializer | str | None = None,
) -> keras.KerasTensor:
    """Adds the linear layer that gives the logits.

    Args:
        x: Pooled features, `[B, C]`.
        num_classes: Number of classes.
        name: Name of the layer.
        kernel_initializer: Start of the weights. Defaults to PyTorch's: uniform in ±1/√C.
        bias_initializer: Start of the bias. Defaults to the same.

    Returns:
        Logits, `[B, num_classes]`, in float32 where the dtype policy computes in half precision:
        the losses exponentiate them.
    """
    half = keras.config.dtype_policy().compute_dtype in ("float16", "bfloat16")
    bound = x.shape[-1] ** -0.5
    layer = keras.layers.Dense(
        num_classes,
        kernel_initializer=kernel_initializer or keras.initializers.RandomUniform(-bound, bound),
        bias_initializer=bias_initializer or keras.initializers.RandomUniform(-bound, bound),
        dtype="float32" if half else None,
        name=name,
    )
    return _call(layer, x)


def size(x: keras.KerasTensor) -> tuple[int, int]:
    """Returns the height and width of a feature map."""
    shape = x.shape[1:]
    return shape[1:] if keras.config.image_data_format() == "channels_first" else shape[:2]


def _channel_axis():
    return 1 if keras.config.image_data_format() == "channels_first" else -1
