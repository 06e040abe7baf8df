"""TensorFlow's fused kernel gives the numbers of Keras's batch normalisation, and is taken."""

import keras
import numpy as np
import pytest
import small

import dskd_keras
from dskd_keras.fused_normalization import fused

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="other backends have no such kernel"
)
EPSILON, MOMENTUM = 1e-2, 0.8
SHAPE = (6, 5, 4, 3)


def arrays(shape=SHAPE):
    rng = np.random.default_rng(0)
    return 3 * rng.standard_normal(shape) + 2, rng.standard_normal(shape)


def trained(layer, x, gradient, how="graph", mask=None):
    """The outputs, the gradients by the input and the weights, and the moving statistics."""
    import tensorflow as tf

    x = tf.constant(x, layer.compute_dtype)

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, mask=mask)
            total = tf.reduce_sum(tf.cast(y, "float32") * gradient)
        trainable = [variable.value for variable in layer.trainable_variables]
        return y, *tape.gradient(total, [x, *trainable])

    if how != "eager":
        step = tf.function(step, jit_compile=how == "XLA")
    results = [value.numpy().astype("float64") for value in step(x)]
    return [*results, *(np.array(value) for value in layer.non_trainable_variables)]


def made(**options):
    """A layer whose weights and statistics are not at their start."""
    layer = keras.layers.BatchNormalization(epsilon=EPSILON, momentum=MOMENTUM, **options)
    layer.build(SHAPE)
    rng = np.random.default_rng(1)
    layer.set_weights([rng.random(weight.shape) + 0.5 for weight in layer.get_weights()])
    return layer


def kernels(layer, x, **options):
    """How many fused kernels a call in training takes."""
    import tensorflow as tf

    def call(x):
        return layer(x, training=True, **options)

    with fused():
        graph = tf.function(call).get_concrete_function(x).graph
    return sum(operation.type == "FusedBatchNormV3" for operation in graph.get_operations())


@pytest.mark.parametrize("how", ["eager", "graph", "XLA"])
@pytest.mark.parametrize("shape", [SHAPE, (1, 1, 1, 3), (2, 1, 1, 3)])
def test_it_is_the_formula(how, shape):
    x, dy = arrays(shape)
    layer = made()
    gamma, beta, moving_mean, moving_variance = layer.get_weights()
    with fused():
        found = trained(layer, x, dy, how)
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    scale = 1 / np.sqrt(variance + EPSILON)
    normalized = (x - mean) * scale
    dx = gamma * scale * (
        dy - dy.mean((0, 1, 2)) - normalized * (dy * normalized).mean((0, 1, 2))
    )  # fmt: skip
    expected = [
        gamma * normalized + beta, dx, (dy * normalized).sum((0, 1, 2)), dy.sum((0, 1, 2)),
        MOMENTUM * moving_mean + (1 - MOMENTUM) * mean,
        MOMENTUM * moving_variance + (1 - MOMENTUM) * variance,
    ]  # fmt: skip
    for value, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, right, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}])
def test_it_is_keras_of_all_kinds(dtype, options):
    x, dy = arrays()
    layers = made(dtype=dtype, **options), made(dtype=dtype, **options)
    with fused():
        found = trained(layers[0], x, dy)
    assert kernels(layers[0], x.astype(layers[0].compute_dtype)) == 1
    tolerance = {"float32": 1e-5, "mixed_float16": 2e-3, "mixed_bfloat16": 2e-2}[dtype]
    for value, right in zip(found, trained(layers[1], x, dy), strict=True):
        np.testing.assert_allclose(value, right, rtol=tolerance, atol=tolerance)


class Derived(keras.layers.BatchNormalization):
    """A user's own."""


@pytest.mark.parametrize(
    "case",
    ["frozen", "masked", "first axis", "synchronized", "renorm", "float64", "derived", "a row"],
)
def test_what_the_kernel_does_not_do_is_left_to_keras(case):
    shape = (8, 3) if case == "a row" else SHAPE
    x, _ = arrays(shape)
    options = {
        "first axis": {"axis": 1}, "synchronized": {"synchronized": True},
        "renorm": {"renorm": True}, "float64": {"dtype": "float64"},
    }.get(case, {})  # fmt: skip
    kind = Derived if case == "derived" else keras.layers.BatchNormalization
    layers = kind(**options), kind(**options)  # renormalisation has a memory
    for layer in layers:
        layer.build(shape)
        layer.trainable = case != "frozen"
    mask = {"mask": np.ones(shape[:3], bool)} if case == "masked" else {}
    x = x.astype(layer.compute_dtype)
    with fused():
        found = layers[0](x, training=True, **mask)
    small.assert_same_bits([found], [layers[1](x, training=True, **mask)])
    assert kernels(layer, x, **mask) == 0


def test_keras_has_its_layer_back_after_an_error():
    before = keras.layers.BatchNormalization.call
    with pytest.raises(KeyError), fused():
        assert keras.layers.BatchNormalization.call is not before
        raise KeyError
    assert keras.layers.BatchNormalization.call is before


@pytest.mark.parametrize("nested", [False, True])
def test_a_distillation_takes_it_everywhere(nested):
    import tensorflow as tf

    student = small.convnet("student")
    layers = ["stage1"]
    if nested:
        inputs = keras.Input(student.input_shape[1:])
        student, layers = keras.Model(inputs, student(inputs)), ["student/stage1"]
    distiller = dskd_keras.Distiller(small.convnet("teacher"), student, layers)

    def call(x):
        return distiller(x, training=True)

    x, _ = small.images()
    graph = tf.function(call).get_concrete_function(x).graph
    found = sum(operation.type == "FusedBatchNormV3" for operation in graph.get_operations())
    normalizations = [
        layer
        for layer in distiller.student_with_heads._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    assert found == len(normalizations) > 2
