import keras
import numpy as np
import pytest
import small
from keras import layers

import dskd_keras
from dskd_keras import keras_internals, models
from dskd_keras.folding import fold_batch_norm
from dskd_keras.teacher import FrozenTeacher

BACKEND = keras.backend.backend()


def used(model, seed=0):
    """Gives every batch normalisation the statistics of a trained one."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            used(layer, seed)
        if isinstance(layer, layers.BatchNormalization):
            shape = layer.moving_mean.shape
            layer.moving_mean.assign(rng.normal(0, 0.3, shape))
            layer.moving_variance.assign(rng.uniform(0.5, 2, shape))
            if layer.scale:
                layer.gamma.assign(rng.uniform(0.2, 0.6, shape))
            if layer.center:
                layer.beta.assign(rng.normal(0, 0.2, shape))
    return model


def norms(model):
    """Names of the batch normalisations, those of nested models too."""
    return [
        layer.name
        for layer in keras_internals.flat_layers(model)
        if isinstance(layer, layers.BatchNormalization)
    ]


def run(model, x):
    outputs = model(x, training=False)
    return keras.tree.map_structure(keras.ops.convert_to_numpy, outputs)


def assert_same(model, folded, x, tolerance=1e-4):
    for a, b in zip(
        keras.tree.flatten(run(model, x)), keras.tree.flatten(run(folded, x)), strict=True
    ):
        assert a.std() > 1e-3
        np.testing.assert_allclose(b, a, atol=tolerance, rtol=tolerance)


def after(layer, shape, axis=-1, **arguments):
    """A model of one layer and a batch normalisation, and inputs for it."""
    inputs = keras.Input(shape)
    x = layer(inputs)
    x = layers.BatchNormalization(axis=axis, name="norm", **arguments)(x)
    outputs = layers.ReLU(name="relu")(x)
    x = np.random.default_rng(1).standard_normal((3, *shape)).astype("float32")
    return used(keras.Model(inputs, outputs)), x


FOLDABLE = {
    "dense": (lambda: layers.Dense(5), (7,)),
    "dense on positions": (lambda: layers.Dense(5, bias_initializer="uniform"), (4, 7)),
    "conv1d causal": (lambda: layers.Conv1D(5, 3, padding="causal"), (9, 4)),
    "conv2d": (lambda: layers.Conv2D(6, 3, strides=2, use_bias=False), (8, 8, 4)),
    "conv2d bias": (
        lambda: layers.Conv2D(6, 3, padding="same", bias_initializer="uniform"),
        (8, 8, 4),
    ),
    "conv2d groups": (lambda: layers.Conv2D(6, 3, groups=2), (8, 8, 4)),
    "conv2d dilated": (lambda: layers.Conv2D(6, 3, dilation_rate=2), (8, 8, 4)),
    "conv3d": (lambda: layers.Conv3D(3, 2), (4, 4, 4, 2)),
    "conv1d transposed": (lambda: layers.Conv1DTranspose(5, 3, strides=2), (5, 4)),
    "conv2d transposed": (lambda: layers.Conv2DTranspose(5, 3, strides=2), (4, 4, 3)),
    "depthwise1d": (lambda: layers.DepthwiseConv1D(3, depth_multiplier=2), (9, 4)),
    "depthwise2d": (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2), (8, 8, 4)),
    "separable1d": (lambda: layers.SeparableConv1D(5, 3), (9, 4)),
    "separable2d": (
        lambda: layers.SeparableConv2D(5, 3, depth_multiplier=2, padding="same"),
        (8, 8, 4),
    ),
}


@pytest.mark.parametrize("kind", FOLDABLE)
def test_a_linear_layer_takes_the_batch_norm_in(kind):
    make, shape = FOLDABLE[kind]
    model, x = after(make(), shape)
    folded = fold_batch_norm(model)
    assert norms(folded) == []
    assert [layer.name for layer in folded.layers][1:] == ["norm", "relu"]
    assert_same(model, folded, x)


@pytest.mark.parametrize("arguments", [{"scale": False}, {"center": False}, {"epsilon": 0.1}])
def test_batch_norms_without_scale_or_center(arguments):
    model, x = after(layers.Conv2D(6, 3), (8, 8, 4), **arguments)
    folded = fold_batch_norm(model)
    assert norms(folded) == []
    assert_same(model, folded, x)


def test_the_weights_are_those_that_pytorch_computes():
    torch = pytest.importorskip("torch")
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    model, _ = after(layers.Conv2D(6, 3, bias_initializer="uniform", name="conv"), (8, 8, 4))
    conv, norm = torch.nn.Conv2d(4, 6, 3), torch.nn.BatchNorm2d(6, eps=1e-3)

    def tensor(variable, order=None):
        value = np.array(keras.ops.convert_to_numpy(variable))
        return torch.from_numpy(value if order is None else value.transpose(order).copy())

    layer, own = model.get_layer("conv"), model.get_layer("norm")
    conv.weight.data, conv.bias.data = tensor(layer.kernel, (3, 2, 0, 1)), tensor(layer.bias)
    norm.weight.data, norm.bias.data = tensor(own.gamma), tensor(own.beta)
    norm.running_mean, norm.running_var = tensor(own.moving_mean), tensor(own.moving_variance)
    expected = fuse_conv_bn_eval(conv.eval(), norm.eval())
    fused = fold_batch_norm(model).get_layer("norm")
    for variable, value, order in (
        (fused.kernel, expected.weight, (3, 2, 0, 1)),
        (fused.bias, expected.bias, None),
    ):
        np.testing.assert_allclose(
            tensor(variable, order).numpy(), value.detach().numpy(), rtol=1e-5, atol=1e-6
        )


class Doubled(layers.Conv2D):
    """A convolution that is more than one."""

    def call(self, inputs):
        return 2 * super().call(inputs)


def _elsewhere(x, conv, norm):
    y = conv(x)
    return layers.Add()([norm(y), y])


def _shared(x, conv, norm):
    return norm(conv(layers.ReLU()(conv(x))))


def _norm_twice(x, conv, norm):
    return norm(norm(conv(x)))


STAYS = {
    "activated": lambda x: layers.BatchNormalization()(layers.Conv2D(4, 1, activation="relu")(x)),
    "used elsewhere": lambda x: _elsewhere(x, layers.Conv2D(4, 1), layers.BatchNormalization()),
    "shared": lambda x: _shared(x, layers.Conv2D(4, 1), layers.BatchNormalization()),
    "norm shared": lambda x: _norm_twice(x, layers.Conv2D(4, 1), layers.BatchNormalization()),
    "over positions": lambda x: layers.BatchNormalization(axis=1)(layers.Conv2D(4, 1)(x)),
    "of the batch": lambda x: layers.BatchNormalization()(layers.Conv2D(4, 1)(x), training=True),
    "first": lambda x: layers.Conv2D(4, 1)(layers.BatchNormalization()(x)),
    "between": lambda x: layers.BatchNormalization()(layers.ReLU()(layers.Conv2D(4, 1)(x))),
    "another class": lambda x: layers.BatchNormalization()(Doubled(4, 1)(x)),
    "an output": lambda x: (lambda y: [layers.BatchNormalization()(y), y])(layers.Conv2D(4, 1)(x)),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_cannot_be_folded_stays(case):
    inputs = keras.Input((6, 6, 4))
    model = used(keras.Model(inputs, STAYS[case](inputs)))
    folded = fold_batch_norm(model)
    assert norms(folded) == norms(model) != []
    assert_same(model, folded, np.random.default_rng(1).standard_normal((3, 6, 6, 4), "float32"))


def preactivated():
    """Of two batch normalisations one can be folded: the other comes after an addition."""
    inputs = keras.Input((8, 8, 4))
    x = layers.Conv2D(6, 3, padding="same", use_bias=False, name="conv")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.Add()([layers.Conv2D(6, 1)(x), layers.Conv2D(6, 1)(inputs)])
    x = layers.ReLU(name="map")(layers.BatchNormalization(name="stays")(x))
    x = layers.GlobalAveragePooling2D()(x)
    return used(keras.Model(inputs, layers.Dense(3, name="logits")(x)))


# The kinds of layers in them are tested one by one on every backend. A family that builds nothing
# new of them is run on the one that compiles nothing.
ZOO = [
    "resnet8",
    "wrn_16_1",
    *(pytest.param(name, marks=pytest.mark.once)
      for name in ("vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2")),
]  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_models_of_the_zoo_and_their_feature_maps(name):
    model = used(models.create(name, 10, (32, 32, 3)))
    folded = fold_batch_norm(model)
    assert folded.name == model.name and not folded.trainable
    # Where activation comes before convolution, the batch norms after the additions stay.
    assert bool(norms(folded)) == name.startswith("wrn")
    stages = [layer.name for layer in model.layers if layer.name.startswith("stage")]
    stages = [stage for stage in stages if "_" not in stage]
    assert stages
    x = np.random.default_rng(1).standard_normal((2, 32, 32, 3)).astype("float32")
    a, b = (
        keras.Model(m.input, [m.output, *(m.get_layer(stage).output for stage in stages)])
        for m in (model, folded)
    )
    for one, other in zip(run(a, x), run(b, x), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-4 * np.abs(one).max())


@pytest.mark.parametrize("width", [8, 6])
def test_channels_first(width):
    # Where the map is as wide as it has channels, Keras adds a bias along the width on TensorFlow.
    model, x = after(
        layers.Conv2D(8, 3, padding="same", data_format="channels_first", use_bias=False),
        (4, width, width),
        axis=1,
    )
    folded = fold_batch_norm(model)
    assert bool(norms(folded)) == (BACKEND == "tensorflow" and width == 8)
    for compiled in (model, folded):
        compiled.compile(jit_compile=small.jit_compile("channels_first"))
    a, b = (compiled.predict(x, verbose=0) for compiled in (model, folded))
    np.testing.assert_allclose(b, a, atol=1e-4)


def test_nested_models_sequential_ones_and_structures():
    inner = keras.Sequential(
        [keras.Input((8, 8, 4)), layers.Conv2D(4, 3, padding="same", name="conv"),
         layers.BatchNormalization(name="norm"), layers.ReLU(name="map")],
        name="inner",
    )  # fmt: skip
    inputs = {"image": keras.Input((8, 8, 4), name="image")}
    x = inner(inner(inputs["image"]))
    pooled = layers.GlobalAveragePooling2D()(x)
    model = used(keras.Model(inputs, {"logits": layers.Dense(3, name="logits")(pooled), "map": x}))
    folded = fold_batch_norm(model)
    assert norms(model) == ["norm"] and norms(folded) == []
    images = np.random.default_rng(1).standard_normal((3, 8, 8, 4)).astype("float32")
    assert sorted(run(folded, {"image": images})) == ["logits", "map"]
    assert_same(model, folded, {"image": images})
    kept = fold_batch_norm(model, keep=["inner/conv"])
    assert norms(kept) == ["norm"]
    assert_same(model, kept, {"image": images})


def test_the_copy_is_independent_of_the_model():
    model, x = after(layers.Conv2D(6, 3, name="conv"), (8, 8, 4))
    before = run(model, x)
    folded = fold_batch_norm(model)
    weights = small.values(folded.variables)
    assert model.trainable and model.get_layer("conv").trainable
    np.testing.assert_array_equal(run(model, x), before)
    for variable in model.variables:
        variable.assign(variable + 1.0)
    small.assert_same_bits(weights, small.values(folded.variables))


def test_regularisation_is_left_behind():
    model, x = after(layers.Conv2D(6, 3, kernel_regularizer="l2"), (8, 8, 4))
    folded = fold_batch_norm(model)
    run(folded, x)
    assert len(model.losses) == 1 and folded.losses == []


def test_a_layer_that_is_kept():
    model, x = after(layers.Conv2D(6, 3, name="conv"), (8, 8, 4))
    folded = fold_batch_norm(model, keep="conv")
    assert [layer.name for layer in folded.layers][1:] == ["conv", "norm", "relu"]
    assert_same(model, folded, x)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.02), ("float16", 0.003)])
def test_lower_precision(dtype, tolerance):
    model = preactivated()
    folded = fold_batch_norm(model, dtype)
    conv, logits = folded.get_layer("norm"), folded.get_layer("logits")
    assert keras.backend.standardize_dtype(conv.kernel.dtype) == dtype
    assert conv.compute_dtype == dtype and logits.compute_dtype == "float32"
    assert norms(folded) == ["stays"]
    assert folded.get_layer("stays").moving_variance.dtype == "float32"
    x = np.random.default_rng(1).standard_normal((4, 8, 8, 4)).astype("float32")
    teacher = FrozenTeacher(folded)
    expected = FrozenTeacher(model)(x)
    for name, value in teacher(x).items():
        assert keras.backend.standardize_dtype(value.dtype) == "float32"
        other = keras.ops.convert_to_numpy(expected[name])
        difference = np.abs(keras.ops.convert_to_numpy(value) - other).max()
        assert 0 < difference < tolerance * np.abs(other).max()
    assert keras.tree.flatten(teacher.predict(x))[0].dtype == np.float32


def test_a_model_in_mixed_precision_becomes_one_in_full():
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    model = preactivated()
    keras.config.set_dtype_policy(previous)
    folded = fold_batch_norm(model, "float32")
    assert model.get_layer("conv").compute_dtype == "float16"
    assert {layer.compute_dtype for layer in folded.layers[1:]} == {"float32"}
    x = np.random.default_rng(1).standard_normal((2, 8, 8, 4)).astype("float32")
    assert_same(model, folded, x, 0.01)


@pytest.mark.parametrize("last", ["operation", "pooling"])
def test_the_outputs_are_in_full_precision_whatever_gives_them(last):
    inputs = keras.Input((8, 8, 4))
    x = layers.ReLU()(layers.Conv2D(4, 3, name="map")(inputs))
    x = layers.Conv2D(5, 1, name="logits")(x)
    x = layers.GlobalAveragePooling2D()(x) if last == "pooling" else keras.ops.mean(10 * x, (1, 2))
    folded = fold_batch_norm(keras.Model(inputs, x), "bfloat16")
    assert folded.output.dtype == "float32"
    assert folded.get_layer("logits").compute_dtype == "float32"
    assert folded.get_layer("map").compute_dtype == "bfloat16"


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_what_a_layer_takes_from_its_weights_is_copied_too(dtype):
    normalization = layers.Normalization()
    rng = np.random.default_rng(0)
    normalization.adapt(rng.normal(3, 5, (50, 8, 8, 4)))
    inputs = keras.Input((8, 8, 4))
    x = layers.BatchNormalization()(layers.Conv2D(6, 3)(normalization(inputs)))
    model = used(keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x))))
    folded = fold_batch_norm(model, dtype)
    assert norms(folded) == []
    x = rng.normal(3, 5, (4, 8, 8, 4)).astype("float32")
    assert_same(model, folded, x, 0.03 if dtype else 1e-4)


def test_lambda_layers_and_quantised_ones():
    factor = 3.0
    inputs = keras.Input((7,))
    x = layers.BatchNormalization()(layers.Dense(5)(inputs))
    x = layers.Lambda(lambda x: x * factor)(x)
    quantised = layers.Dense(4, name="quantised")
    x = layers.BatchNormalization()(quantised(x))
    model = used(keras.Model(inputs, layers.Dense(2)(x)))
    quantised.quantize("int8")
    x = np.random.default_rng(1).standard_normal((3, 7)).astype("float32")
    folded = fold_batch_norm(model)
    assert len(norms(folded)) == 1
    assert_same(model, folded, x)
    half = fold_batch_norm(model, "bfloat16", keep=None)
    assert half.get_layer("quantised").quantization_mode == "int8"
    assert_same(model, half, x, 0.03)


class Forgetful(layers.Layer):
    def __init__(self, size):
        super().__init__(name="forgetful")
        self.size = size

    def call(self, inputs):
        return inputs * self.size


def test_what_cannot_be_done_is_said_in_one_line():
    model, _ = after(layers.Conv2D(6, 3, name="conv"), (8, 8, 4))
    cases = [
        ({"dtype": "int8"}, r"^dtype: 'int8' should be a known name.*bfloat16"),
        ({"keep": ["convv"]}, r"^keep: 'convv' should be a known name.*conv"),
    ]
    for arguments, message in cases:
        with pytest.raises(dskd_keras.InputError, match=message):
            fold_batch_norm(model, **arguments)
    model.get_layer("norm").gamma.assign(np.full(6, 1e7, "float32"))
    model = keras.Model(model.input, layers.Dense(2)(layers.Flatten()(model.output)))
    with pytest.raises(dskd_keras.InputError, match=r"^dtype: weight 'norm/.*float16\.$"):
        fold_batch_norm(model, "float16")

    class Subclassed(keras.Model):
        pass

    with pytest.raises(
        dskd_keras.InputError, match=r"^model: Subclassed '.*' has no graph of layers"
    ):
        fold_batch_norm(Subclassed())

    inputs = keras.Input((4,))
    with pytest.raises(
        dskd_keras.InputError,
        match=r"^model: layer 'forgetful' \(Forgetful\) can't be made anew.*$",
    ):
        fold_batch_norm(keras.Model(inputs, Forgetful(3)(inputs)))
