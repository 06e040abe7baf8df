"""Models small enough that a test takes milliseconds, and data for them."""

import contextlib

import keras
import numpy as np
from keras import layers

CLASSES = 3


def convnet(name, width=4, batch_norm=True, regularizer=None, size=8, classes=CLASSES, channels=2):
    """Two stages of convolution, `stage1` at full size and `stage2` at half, and `logits`."""
    inputs = x = keras.Input((size, size, channels))
    for stage, stride in ((1, 1), (2, 2)):
        x = layers.Conv2D(
            width * stage,
            3,
            strides=stride,
            padding="same",
            kernel_regularizer=regularizer,
            data_format="channels_last",
            name=f"stage{stage}_conv",
        )(x)
        if batch_norm:
            x = layers.BatchNormalization(name=f"stage{stage}_bn")(x)
        x = layers.ReLU(name=f"stage{stage}")(x)
    x = layers.GlobalAveragePooling2D(name="pool", data_format="channels_last")(x)
    return keras.Model(inputs, layers.Dense(classes, name="logits")(x), name=name)


def created(name, classes, shape, field):
    """In place of `models.create`: a convnet of any name, which compiles in no time."""
    return convnet(name, classes=classes, channels=shape[-1])


def images(count=12, size=8, seed=0):
    """`(x, y)`: float32 `[count, size, size, 2]` and int32 `[count]`."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, size, size, 2)).astype("float32")
    return x, rng.integers(0, CLASSES, count).astype("int32")


def crossentropy():
    """The label loss of all tests."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def jit_compile(data_format):
    """What `compile` needs: TensorFlow on many CPUs runs channels-first maps through XLA alone."""
    first = data_format == "channels_first"
    return True if first and keras.backend.backend() == "tensorflow" else "auto"


def values(variables):
    """The variables' values, copied."""
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def assert_same_bits(before, after):
    """Fails unless the two lists of arrays are equal, bit by bit."""
    assert len(before) == len(after)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


@contextlib.contextmanager
def eagerly(eager=True):
    """A context in which TensorFlow compiles nothing, or compiles after all; others stay."""
    if keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf

    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(eager)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)
