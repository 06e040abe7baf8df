"""The pieces that the model families share, with PyTorch's padding, normalisation and initialisers.

Each function adds Keras's own layers to a functional graph and names them, so that a saved model
loads where this package is not installed. Feature maps are `[B, H, W, C]` or `[B, C, H, W]`, by
`keras.config.image_data_format()`, which a layer reads when it is made and saves.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import keras
import numpy as np

# How the reference models' convolutions start. "he": normal with variance 2 / fan_out, where
# fan_out is the kernel's area times the filters, and a bias of 0 (He et al., arXiv 1502.01852).
# "torch": PyTorch's own default, uniform in ±1/√fan_in, the bias likewise.
Initialization = Literal["he", "torch"]


def normalized_convolution(
    x: keras.KerasTensor,
    filters: int | None,
    kernel_size: int,
    prefix: str,
    index: int | str = "",
    *,
    activate: bool = True,
    maximum: float | None = None,
    **options: Any,
) -> keras.KerasTensor:
    """Adds `PREFIX_convINDEX`, a batch normalisation `PREFIX_bnINDEX` and a ReLU.

    The ReLU, `PREFIX_reluINDEX`, is cut at `maximum`; `options` are those of `convolution`.
    """
    x = convolution(x, filters, kernel_size, name=f"{prefix}_conv{index}", **options)
    x = batch_norm(x, name=f"{prefix}_bn{index}")
    return keras.layers.ReLU(maximum, name=f"{prefix}_relu{index}")(x) if activate else x


def convolution(
    x: keras.KerasTensor,
    filters: int | None,
    kernel_size: int,
    name: str,
    *,
    strides: int = 1,
    groups: int = 1,
    use_bias: bool = False,
    initialization: Initialization = "he",
) -> keras.KerasTensor:
    """Adds a convolution padded by `(kernel_size - 1) / 2` on every side; `kernel_size` is odd.

    Without `filters`, each channel is convolved by itself. TensorFlow's `same` agrees with that
    padding, PyTorch's, at stride 1; at stride 2 it pads an even image on the right and at the
    bottom alone, so there the padding is a layer of its own, `NAME_pad`.
    """
    channels = x.shape[channel_axis()]
    kind, kernel, inputs = keras.layers.Conv2D, "kernel", channels // groups
    arguments: dict[str, Any] = {"filters": filters, "groups": groups}
    if filters is None:
        kind, kernel, inputs = keras.layers.DepthwiseConv2D, "depthwise", 1
        filters, arguments = channels, {}
    # The scales are written out: `VarianceScaling` takes the fans of a depthwise kernel from its
    # Keras shape, which is not how PyTorch counts them.
    if initialization == "he":
        std = (2 / (kernel_size**2 * filters)) ** 0.5
        arguments[f"{kernel}_initializer"] = keras.initializers.RandomNormal(stddev=std)
    else:
        bound = (kernel_size**2 * inputs) ** -0.5
        for part in (kernel, "bias"):
            arguments[f"{part}_initializer"] = keras.initializers.RandomUniform(-bound, bound)
    # On TensorFlow, Keras 3.15 adds a bias along the width where that equals the channels. (Its
    # `ops.add` takes the last axis for the channels'.) There the convolution is transposed.
    width = math.ceil(size(x)[1] / strides)
    transposed = use_bias and _channels_first() and width == filters
    if strides > 1 and kernel_size > 1:
        x = keras.layers.ZeroPadding2D((kernel_size - 1) // 2, name=f"{name}_pad")(x)
    if transposed:
        arguments["data_format"] = "channels_last"
        x = keras.layers.Permute((2, 3, 1), name=f"{name}_channels_last")(x)
    layer = kind(
        kernel_size=kernel_size,
        strides=strides,
        padding="valid" if strides > 1 else "same",
        use_bias=use_bias,
        name=name,
        **arguments,
    )
    x = _call(layer, x)
    if transposed:
        x = keras.layers.Permute((3, 1, 2), name=f"{name}_channels_first")(x)
    return x


def _call(layer: keras.Layer, x: keras.KerasTensor) -> keras.KerasTensor:
    """Calls a new layer, which creates its weights, with the random ones drawn by NumPy.

    JAX compiles a program for every shape that it draws, which makes most of the time in which a
    model is created there. The draws follow from `keras.utils.set_random_seed`, and are the same on
    every backend. The layer keeps Keras's initialisers, so it saves and loads as any other.
    """
    random = (keras.initializers.RandomNormal, keras.initializers.RandomUniform)
    initializers = {name: value for name, value in vars(layer).items() if isinstance(value, random)}
    for name, initializer in initializers.items():
        setattr(layer, name, functools.partial(_draw, initializer))
    outputs = layer(x)
    for name, initializer in initializers.items():
        setattr(layer, name, initializer)
    return outputs


def _draw(
    initializer: keras.initializers.Initializer, shape: Sequence[int], dtype: Any = None
) -> np.ndarray:
    rng = np.random.default_rng(initializer.seed)
    if isinstance(initializer, keras.initializers.RandomNormal):
        values = rng.normal(initializer.mean, initializer.stddev, shape)
    else:
        values = rng.uniform(initializer.minval, initializer.maxval, shape)
    # The variable converts to its own dtype, which may be one that NumPy lacks.
    return values.astype("float32")


def batch_norm(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    """Adds a batch normalisation with PyTorch's constants; PyTorch calls a momentum of 0.9 0.1."""
    return keras.layers.BatchNormalization(
        axis=channel_axis(), momentum=0.9, epsilon=1e-5, name=name
    )(x)


def channel_shuffle(x: keras.KerasTensor, groups: int, name: str) -> keras.KerasTensor:
    """Interleaves the channels of `groups` groups (Zhang et al., arXiv 1707.01083, figure 1).

    The first channel of every group comes first, then the second of every group, and so on. All
    tensors on the way have four axes, which are cheaper to transpose than five, and let the layout
    of the map be told from the layers before it.
    """
    shape = tuple(x.shape[1:])
    if _channels_first():
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
    (height, width), channels = size(x), x.shape[channel_axis()]
    cropping = (start, channels - stop)
    if _channels_first():
        flat, shape = (1, channels, height * width), (stop - start, height, width)
        crop = keras.layers.Cropping2D((cropping, (0, 0)), name=f"{name}_crop")
    else:
        flat, shape = (height * width, channels, 1), (height, width, stop - start)
        crop = keras.layers.Cropping2D(((0, 0), cropping), name=f"{name}_crop")
    x = keras.layers.Reshape(flat, name=f"{name}_flat")(x)
    return keras.layers.Reshape(shape, name=name)(crop(x))


def classifier(
    images: keras.KerasTensor,
    x: keras.KerasTensor,
    num_classes: int,
    name: str,
    *,
    std: float | None = None,
    zero_bias: bool = False,
) -> keras.Model:
    """Ends a model with `pool`, the mean over height and width, and `logits`, a linear layer.

    Its weights start normal with the standard deviation `std`, its bias at zero with `zero_bias`;
    the default of both is PyTorch's start, uniform in ±1/√C. The logits are float32 where the dtype
    policy computes in half precision: the losses exponentiate them.
    """
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    half = keras.config.dtype_policy().compute_dtype in ("float16", "bfloat16")
    bound = x.shape[-1] ** -0.5
    uniform = functools.partial(keras.initializers.RandomUniform, -bound, bound)
    layer = keras.layers.Dense(
        num_classes,
        kernel_initializer=uniform() if std is None else keras.initializers.RandomNormal(0.0, std),
        bias_initializer="zeros" if zero_bias else uniform(),
        dtype="float32" if half else None,
        name="logits",
    )
    return keras.Model(images, _call(layer, x), name=name)


def size(x: keras.KerasTensor) -> tuple[int, int]:
    """Returns the height and width of a feature map."""
    return x.shape[2:] if _channels_first() else x.shape[1:3]


def channel_axis() -> int:
    """Returns the axis of a feature map's channels."""
    return 1 if _channels_first() else -1


def _channels_first() -> bool:
    return keras.config.image_data_format() == "channels_first"
