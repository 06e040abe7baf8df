"""The fused kernels give the numbers of Keras's batch normalisation, and are taken."""

import keras
import numpy as np
import pytest
import small

import dskd_keras
from dskd_keras.fused_normalization import fused

BACKEND = keras.backend.backend()
pytestmark = pytest.mark.skipif(BACKEND == "jax", reason="JAX has no such kernel")
EPSILON, MOMENTUM = 1e-2, 0.8
SHAPE = (6, 5, 4, 3)


def arrays(shape=SHAPE):
    rng = np.random.default_rng(0)
    return 3 * rng.standard_normal(shape) + 2, rng.standard_normal(shape)


def trained(layer, x, gradient, how="graph"):
    """The outputs, the gradients by the input and the weights, and the moving statistics."""
    parameters = [variable.value for variable in layer.trainable_variables]
    if BACKEND == "torch":
        import torch

        # On the device of the layer's weights.
        x = keras.ops.convert_to_tensor(x, layer.compute_dtype).requires_grad_()
        y = layer(x, training=True)
        total = (y.float() * keras.ops.convert_to_tensor(gradient, "float64")).sum()
        results = [y, *torch.autograd.grad(total, [x, *parameters])]
        results = [value.detach().float().cpu().numpy().astype("float64") for value in results]
    else:
        import tensorflow as tf

        def step(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
                total = tf.reduce_sum(tf.cast(y, "float32") * gradient)
            return y, *tape.gradient(total, [x, *parameters])

        if how != "eager":
            step = tf.function(step, jit_compile=how == "XLA")
        x = tf.constant(x, layer.compute_dtype)
        results = [value.numpy().astype("float64") for value in step(x)]
    return [*results, *map(keras.ops.convert_to_numpy, layer.non_trainable_variables)]


def made(shape=SHAPE, **options):
    """A layer whose weights and statistics are not at their start."""
    layer = keras.layers.BatchNormalization(epsilon=EPSILON, momentum=MOMENTUM, **options)
    layer.build(shape)
    rng = np.random.default_rng(1)
    layer.set_weights([rng.random(weight.shape) + 0.5 for weight in layer.get_weights()])
    return layer


def kernels(call, x):
    """How many fused kernels a call takes."""
    if BACKEND == "torch":
        from torch.utils._python_dispatch import TorchDispatchMode

        class Names(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                names.append(function.overloadpacket.__name__)
                return function(*args, **kwargs or {})

        names = []
        with Names():
            call(keras.ops.convert_to_tensor(x))
        return names.count("native_batch_norm")
    import tensorflow as tf

    graph = tf.function(lambda x: call(x)).get_concrete_function(tf.constant(x)).graph
    return sum(operation.type == "FusedBatchNormV3" for operation in graph.get_operations())


@pytest.mark.parametrize("how", ["graph"] if BACKEND == "torch" else ["eager", "graph", "XLA"])
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
        half = keras.ops.convert_to_tensor(x, layers[0].compute_dtype)
        assert kernels(lambda x: layers[0](x, training=True), half) == 1
    tolerance = {"float32": 1e-5, "mixed_float16": 2e-3, "mixed_bfloat16": 2e-2}[dtype]
    for value, right in zip(found, trained(layers[1], x, dy), strict=True):
        np.testing.assert_allclose(value, right, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(BACKEND != "torch", reason="the kernel takes [B, H, W, C] alone")
@pytest.mark.parametrize("shape", [(8, 3), (4, 5, 3), (2, 3, 2, 2, 3)])
@pytest.mark.parametrize("axis", [-1, 1])
def test_pytorch_takes_maps_of_any_kind(shape, axis):
    x, dy = arrays(shape)
    layers = made(shape, axis=axis), made(shape, axis=axis)
    with fused():
        found = trained(layers[0], x, dy)
        assert kernels(lambda x: layers[0](x, training=True), x.astype("float32")) == 1
    for value, right in zip(found, trained(layers[1], x, dy), strict=True):
        np.testing.assert_allclose(value, right, rtol=1e-4, atol=1e-5)


class Derived(keras.layers.BatchNormalization):
    """A user's own."""


CASES = ["frozen", "masked", "renorm", "float64", "derived"]
CASES += ["a value"] if BACKEND == "torch" else ["first axis", "synchronized", "a row"]


@pytest.mark.parametrize("case", CASES)
def test_what_the_kernel_does_not_do_is_left_to_keras(case):
    shape = {"a row": (8, 3), "a value": (1, 1, 1, 3)}.get(case, SHAPE)
    x, _ = arrays(shape)
    options = {
        "first axis": {"axis": 1}, "synchronized": {"synchronized": True},
        "renorm": {"renorm": True}, "float64": {"dtype": "float64"},
    }.get(case, {})  # fmt: skip
    kind = Derived if case == "derived" else keras.layers.BatchNormalization
    one, two, three = (kind(**options) for _ in range(3))  # renormalisation has a memory
    for layer in (one, two, three):
        layer.build(shape)
        layer.trainable = case != "frozen"
    mask = {"mask": np.ones(shape[:3], bool)} if case == "masked" else {}
    x = x.astype(layer.compute_dtype)
    with fused():
        found = one(x, training=True, **mask)
        assert kernels(lambda x: two(x, training=True, **mask), x) == 0
    expected = three(x, training=True, **mask)
    small.assert_same_bits(*([keras.ops.convert_to_numpy(y)] for y in (found, expected)))


def test_keras_has_its_layer_back_after_an_error():
    before = keras.layers.BatchNormalization.call
    with pytest.raises(KeyError), fused():
        assert keras.layers.BatchNormalization.call is not before
        raise KeyError
    assert keras.layers.BatchNormalization.call is before


def test_a_nan_in_the_images_is_one_in_the_outputs():
    student = small.convnet("student")
    distiller = dskd_keras.Distiller(None, student, (), prediction_weight=0, label_weight=1)
    distiller.compile("sgd", small.crossentropy())
    x, y = small.images(8)
    x[0, 0, 0, 0] = np.nan
    # Compiled, where TensorFlow joins operations.
    assert np.isnan(distiller.train_on_batch(x, y, return_dict=True)["loss"])


@pytest.mark.parametrize("nested", [False, True])
def test_a_distillation_takes_it_everywhere(nested):
    student = small.convnet("student")
    layers = ["stage1"]
    if nested:
        inputs = keras.Input(student.input_shape[1:])
        student, layers = keras.Model(inputs, student(inputs)), ["student/stage1"]
    distiller = dskd_keras.Distiller(small.convnet("teacher"), student, layers)
    found = kernels(lambda x: distiller(x, training=True), small.images()[0])
    normalizations = [
        layer
        for layer in distiller.student_with_heads._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    assert found == len(normalizations) > 2
