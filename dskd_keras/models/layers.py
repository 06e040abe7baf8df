"""The pieces that the model families share, with PyTorch's padding, normalisation and initialisers.

Each function adds Keras's own layers to a functional graph and names them, so that a saved model
loads where this package is not installed. The data format is `keras.config.image_data_format()`,
handed to every layer that has one: a layer built without it would read the setting of the process
that loads the model.
"""

import keras


def convolution(
    x: keras.KerasTensor, filters: int, kernel_size: int, name: str, strides: int = 1
) -> keras.KerasTensor:
    """Adds a convolution without a bias, padded by `(kernel_size - 1) / 2` on every side.

    That is PyTorch's `Conv2d(padding=(kernel_size - 1) // 2)`. TensorFlow's `same` agrees with it
    at stride 1, but at stride 2 it pads an even image on the right and at the bottom alone; there
    the padding is a layer of its own, `NAME_pad`.

    Args:
        x: Feature map, `[B, H, W, C]` or `[B, C, H, W]`, by `keras.config.image_data_format()`.
        filters: Number of output channels.
        kernel_size: Height and width of the kernel; odd.
        name: Name of the layer.
        strides: Step in both directions.

    Returns:
        Feature map with `filters` channels, height and width `ceil(size / strides)`. The kernel
        starts from a normal distribution with variance 2 / fan_out (He et al., arXiv 1502.01852),
        as the reference models do.
    """
    data_format = keras.config.image_data_format()
    padding = "same"
    if strides > 1:
        padding = "valid"
        if kernel_size > 1:
            x = keras.layers.ZeroPadding2D(
                (kernel_size - 1) // 2, data_format=data_format, name=f"{name}_pad"
            )(x)
    return keras.layers.Conv2D(
        filters,
        kernel_size,
        strides=strides,
        padding=padding,
        data_format=data_format,
        use_bias=False,
        kernel_initializer=keras.initializers.VarianceScaling(
            2.0, mode="fan_out", distribution="untruncated_normal"
        ),
        name=name,
    )(x)


def batch_norm(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    """Adds a batch normalisation over the channels, with PyTorch's constants.

    Args:
        x: Feature map, in the layout of `keras.config.image_data_format()`.
        name: Name of the layer.

    Returns:
        Feature map of the same shape. The momentum of 0.9 is what PyTorch calls 0.1.
    """
    axis = 1 if keras.config.image_data_format() == "channels_first" else -1
    return keras.layers.BatchNormalization(axis=axis, momentum=0.9, epsilon=1e-5, name=name)(x)


def relu(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    """Adds a ReLU named `name` to `x`, which may have any shape."""
    return keras.layers.ReLU(name=name)(x)


def global_average_pool(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    """Adds the mean over height and width: a feature map with C channels to `[B, C]`."""
    return keras.layers.GlobalAveragePooling2D(
        data_format=keras.config.image_data_format(), name=name
    )(x)


def classifier(x: keras.KerasTensor, num_classes: int, name: str) -> keras.KerasTensor:
    """Adds the linear layer that gives the logits, initialised as PyTorch's `Linear`.

    Args:
        x: Pooled features, `[B, C]`.
        num_classes: Number of classes.
        name: Name of the layer.

    Returns:
        Logits, `[B, num_classes]`, in float32 where the dtype policy computes in half precision:
        the losses exponentiate them. Weights and bias start uniform in ±1/√C.
    """
    half = keras.config.dtype_policy().compute_dtype in ("float16", "bfloat16")
    bound = x.shape[-1] ** -0.5
    return keras.layers.Dense(
        num_classes,
        kernel_initializer=keras.initializers.RandomUniform(-bound, bound),
        bias_initializer=keras.initializers.RandomUniform(-bound, bound),
        dtype="float32" if half else None,
        name=name,
    )(x)
