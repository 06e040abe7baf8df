"""On JAX, depthwise convolutions as products give Keras's numbers and gradients."""

import re

import keras
import numpy as np
import pytest
import small
from keras import layers

import dskd_keras
from dskd_keras import depthwise, models

pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX's alone")


def made(layer, shape):
    """The layer with weights that are none of its own zeros."""
    layer.build((None, *shape))
    rng = np.random.default_rng(0)
    layer.set_weights([rng.standard_normal(w.shape) for w in layer.get_weights()])
    return layer


def gradients(layer, x):
    """The outputs, and the gradients of their sum of squares by the input and the weights."""
    import jax

    def total(x, weights):
        y, _ = layer.stateless_call(weights, [], x)
        return (y**2).sum(), y

    weights = [variable.value for variable in layer.trainable_variables]
    grad = jax.grad(total, argnums=(0, 1), has_aux=True)
    (by_x, by_weights), y = grad(x, weights)
    return [np.asarray(value) for value in (y, by_x, *by_weights)]


def convolutions(call, x):
    """How many grouped convolutions a call takes."""
    import jax

    # A new function each time: JAX remembers what it has traced.
    text = str(jax.make_jaxpr(lambda x: call(x))(x))
    return sum(groups != "1" for groups in re.findall(r"feature_group_count=(\d+)", text))


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("strides", [1, 2, 3])
@pytest.mark.parametrize("kernel_size", [3, (2, 5)])
@pytest.mark.parametrize("kind", ["depthwise", "separable"])
def test_it_is_the_convolution(kind, kernel_size, strides, padding):
    options = {"strides": strides, "padding": padding, "activation": "tanh"}
    if kind == "depthwise":
        layer = layers.DepthwiseConv2D(kernel_size, **options)
    else:
        layer = layers.SeparableConv2D(5, kernel_size, **options)
    layer = made(layer, (9, 8, 4))
    x = np.random.default_rng(1).standard_normal((2, 9, 8, 4)).astype("float32")
    with depthwise.as_products():
        found = gradients(layer, x)
        assert convolutions(layer, x) == 0
    assert convolutions(layer, x) == 1
    for value, right in zip(found, gradients(layer, x), strict=True):
        np.testing.assert_allclose(value, right, rtol=1e-4, atol=1e-4)


class Derived(layers.DepthwiseConv2D):
    """A user's own."""


@pytest.mark.parametrize(
    "layer",
    [
        layers.DepthwiseConv2D(3, depth_multiplier=2), layers.DepthwiseConv2D(3, dilation_rate=2),
        layers.DepthwiseConv2D(7, padding="same"), layers.DepthwiseConv2D(3, dtype="bfloat16"),
        layers.DepthwiseConv2D(3, data_format="channels_first"), Derived(3),
        layers.DepthwiseConv2D(3, use_bias=False, dtype="mixed_float16"),
    ],
)  # fmt: skip
def test_other_layers_are_left_to_keras(layer):
    layer = made(layer, (8, 8, 8))
    x = np.random.default_rng(1).standard_normal((2, 8, 8, 8)).astype("float32")
    with depthwise.as_products():
        assert convolutions(layer, x) == 1
        found = np.asarray(layer(x))
    small.assert_same_bits([found], [np.asarray(layer(x))])


def test_keras_has_its_layers_back_after_an_error():
    kinds = (layers.DepthwiseConv2D, layers.SeparableConv2D)
    before = [(kind.call, "call" in vars(kind)) for kind in kinds]
    with pytest.raises(KeyError), depthwise.as_products():
        assert layers.DepthwiseConv2D.call is not before[0][0]
        raise KeyError
    assert [(kind.call, "call" in vars(kind)) for kind in kinds] == before


def test_a_distillation_takes_them_everywhere():
    teacher = models.create("MobileNetV2", 3, (32, 32, 3))
    distiller = dskd_keras.Distiller(teacher, small.convnet("s", size=32, channels=3), ["stage1"])
    x = np.zeros((2, 32, 32, 3), "float32")
    assert convolutions(lambda x: distiller.teacher(x)["logits"], x) == 0
    assert convolutions(lambda x: distiller(x, training=True).logits, x) == 0
    alone = dskd_keras.Distiller(
        None, teacher, (), prediction_weight=0, label_weight=1, deep_prediction_weight=0,
    )  # fmt: skip
    assert convolutions(lambda x: alone(x), x) == 0
    assert convolutions(lambda x: teacher(x), x) > 5
