"""The zoo against the reference models: parameters, logits, initialisation, naming and saving."""

import json
import re
import subprocess
import sys
import zlib
from pathlib import Path

import keras
import numpy as np
import pytest

from dskd_keras import models
from dskd_keras.errors import InputError

# Most tests take 100 classes and 3 channels: JAX compiles an initialiser for each new shape.
REFERENCE = Path(__file__).parent / "reference"

# Trainable parameters at 100 classes of the public PyTorch models.
PARAMETERS = {
    "resnet8": 83892,
    "resnet14": 181108,
    "resnet20": 278324,
    "resnet32": 472756,
    "resnet56": 861620,
    "resnet110": 1736564,
    "resnet8x4": 1233540,
    "resnet32x4": 7433860,
}


@pytest.fixture
def channels_first():
    keras.config.set_image_data_format("channels_first")
    yield
    keras.config.set_image_data_format("channels_last")


@pytest.fixture(params=["mixed_float16", "mixed_bfloat16"])
def mixed_policy(request):
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy("float32")


def count_parameters(model):
    return sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)


def reference_tensor(key, shape):
    """The tensor of the reference models for a `state_dict` key: a function of the key alone."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    if key.endswith("running_var"):
        value = rng.uniform(0.5, 1.5, shape)
    elif key.endswith("running_mean"):
        value = 0.1 * rng.standard_normal(shape)
    elif len(shape) >= 2:
        value = rng.standard_normal(shape) * np.sqrt(2.0 / np.prod(shape[1:]))
    elif key.endswith("weight"):
        value = rng.uniform(0.5, 1.5, shape)
    else:
        value = 0.1 * rng.standard_normal(shape)
    return value.astype("float32")


def torch_keys(layer):
    """The `state_dict` keys of a layer's weights, in Keras's order."""
    named = {"stem_conv": "conv1", "stem_bn": "bn1", "logits": "fc"}
    in_block = {"shortcut_conv": "downsample.0", "shortcut_bn": "downsample.1"}
    match = re.fullmatch(r"stage(\d)_block(\d+)_(\w+)", layer.name)
    if match:
        stage, block, role = match.groups()
        prefix = f"layer{stage}.{int(block) - 1}.{in_block.get(role, role)}"
    else:
        prefix = named[layer.name]
    kinds = ["weight", "bias", "running_mean", "running_var"]
    return [f"{prefix}.{kind}" for kind in kinds[: len(layer.weights)]]


def load_reference_weights(model, reference):
    shapes = {
        key: tuple(shape)
        for key, shape in reference["state_dict"]
        if not key.endswith("num_batches_tracked")
    }
    for layer in model.layers:
        if layer.weights:
            values = [reference_tensor(key, shapes.pop(key)) for key in torch_keys(layer)]
            values = [v.transpose(2, 3, 1, 0) if v.ndim == 4 else v.T for v in values]
            layer.set_weights(values)
    assert not shapes, f"not used: {list(shapes)}"


@pytest.mark.parametrize("name", PARAMETERS)
def test_trainable_parameters_are_the_references(name):
    assert count_parameters(models.create(name, 100, (32, 32, 3))) == PARAMETERS[name]


def test_trainable_parameters_of_resnet44():
    def conv_bn(size, inputs, outputs):
        return size * size * inputs * outputs + 2 * outputs

    expected = conv_bn(3, 3, 16) + 14 * conv_bn(3, 16, 16)
    for inputs, outputs in [(16, 32), (32, 64)]:
        expected += conv_bn(3, inputs, outputs) + 13 * conv_bn(3, outputs, outputs)
        expected += conv_bn(1, inputs, outputs)
    expected += (64 + 1) * 100
    assert count_parameters(models.create("resnet44", 100, (32, 32, 3))) == expected


@pytest.mark.parametrize(
    ("name", "data_format"),
    [
        ("resnet20", "channels_last"),
        ("resnet20", "channels_first"),
        ("resnet8x4", "channels_last"),
    ],
)
def test_logits_and_features_are_the_references(name, data_format, request):
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype("float32")
    if data_format == "channels_first":
        request.getfixturevalue("channels_first")
    else:
        images = images.transpose(0, 2, 3, 1)
    reference = json.loads((REFERENCE / f"{name}.json").read_text())
    model = models.create(name, 100, images.shape[1:])
    load_reference_weights(model, reference)

    taps = ["stem_relu", "stage1", "stage2", "stage3", "pool", "logits"]
    tapped = keras.Model(model.input, [model.get_layer(tap).output for tap in taps])
    *features, logits = tapped.predict_on_batch(images)
    expected = np.array(reference["logits"])
    assert np.abs(logits - expected).max() / expected.std() < 1e-5
    for feature, statistics in zip(features, reference["features"], strict=True):
        if feature.ndim == 4 and data_format == "channels_last":
            feature = feature.transpose(0, 3, 1, 2)
        assert list(feature.shape) == statistics["shape"]
        np.testing.assert_allclose(feature.mean(), statistics["mean"], rtol=1e-5)
        np.testing.assert_allclose(feature.std(ddof=1), statistics["std"], rtol=1e-5)


def test_shapes_follow_the_image():
    model = models.create("resnet14", 7, (33, 21, 1))
    assert model.output.shape == (None, 7)
    shapes = [model.get_layer(f"stage{stage}").output.shape[1:] for stage in (1, 2, 3)]
    assert shapes == [(33, 21, 16), (17, 11, 32), (9, 6, 64)]
    assert model.get_layer("pool").output.shape == (None, 64)
    assert model.predict_on_batch(np.zeros((2, 33, 21, 1))).shape == (2, 7)


def test_smallest_image():
    model = models.create("resnet8", 100, (8, 8, 3))
    assert model.get_layer("stage3").output.shape == (None, 2, 2, 64)


def test_channels_first_names_the_format_in_every_layer(channels_first):
    model = models.create("resnet8", 100, (3, 32, 32))
    assert model.get_layer("stage2").output.shape == (None, 32, 16, 16)
    for layer in model.layers:
        if hasattr(layer, "data_format"):
            assert layer.get_config()["data_format"] == "channels_first", layer.name
        if isinstance(layer, keras.layers.BatchNormalization):
            assert layer.axis == 1


def test_layers_say_where_they_are():
    model = models.create("resnet14", 100, (32, 32, 3))
    found = [layer.name for layer in model.layers]
    first_block = [
        f"stage1_block1_{role}"
        for role in ("conv1", "bn1", "relu1", "conv2", "bn2", "add", "relu2")
    ]
    assert found[:11] == ["images", "stem_conv", "stem_bn", "stem_relu", *first_block]
    assert found[11:17] == [name.replace("block1", "block2") for name in first_block[:6]]
    assert found[17] == "stage1"
    assert {f"stage2_block1_{role}" for role in ("conv1_pad", "shortcut_conv", "shortcut_bn")} <= {
        *found
    }
    assert found[-3:] == ["stage3", "pool", "logits"]
    assert {type(layer).__module__.split(".")[0] for layer in model.layers} == {"keras"}


def test_names_are_found_without_regard_to_case():
    assert models.names()[:2] == ["resnet8", "resnet14"]
    assert len(models.names()) == len({name.casefold() for name in models.names()}) >= 9
    assert models.create("ResNet8X4", 100, (32, 32, 3)).name == "resnet8x4"


def test_initialisation_is_the_references():
    keras.utils.set_random_seed(1)
    model = models.create("resnet8x4", 100, (32, 32, 3))
    for layer in model.layers:
        weights = [keras.ops.convert_to_numpy(weight) for weight in layer.weights]
        if isinstance(layer, keras.layers.Conv2D):
            height, width, _, filters = weights[0].shape
            std = np.sqrt(2 / (height * width * filters))
            # Five standard errors of an estimate from this many draws.
            spread = 5 / np.sqrt(2 * weights[0].size)
            assert abs(weights[0].std() / std - 1) < spread, layer.name
            if weights[0].size > 10_000:  # a normal cut at two standard deviations has no tail
                assert np.abs(weights[0]).max() > 3 * std, layer.name
        elif isinstance(layer, keras.layers.BatchNormalization):
            for weight, value in zip(weights, [1, 0, 0, 1], strict=True):
                np.testing.assert_array_equal(weight, value)
            assert (layer.epsilon, layer.momentum) == (1e-5, 0.9)
        elif weights:
            kernel, bias = weights
            bound = 1 / np.sqrt(256)
            assert 0.99 * bound < np.abs(kernel).max() <= bound
            assert abs(kernel.std() / (bound / np.sqrt(3)) - 1) < 0.02
            assert 0.8 * bound < np.abs(bias).max() <= bound
    first = model.get_layer("stage1_block1_conv2").get_weights()[0]
    again = models.create("resnet8x4", 100, (32, 32, 3))
    assert not np.allclose(first, again.get_layer("stage1_block1_conv2").get_weights()[0])
    keras.utils.set_random_seed(1)
    again = models.create("resnet8x4", 100, (32, 32, 3))
    np.testing.assert_array_equal(first, again.get_layer("stage1_block1_conv2").get_weights()[0])


def test_logits_are_float32_in_mixed_precision(mixed_policy):
    model = models.create("resnet8", 100, (8, 8, 3))
    compute = mixed_policy.removeprefix("mixed_")
    assert model.get_layer("stage3").compute_dtype == compute
    assert {weight.dtype for weight in model.weights} == {"float32"}
    logits = model.predict_on_batch(np.ones((2, 8, 8, 3), "float32"))
    assert logits.dtype == "float32"
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_training_lowers_the_loss(data_format, request):
    if data_format == "channels_first":
        request.getfixturevalue("channels_first")
    keras.utils.set_random_seed(0)
    images = np.random.default_rng(0).standard_normal((16, 8, 8, 3)).astype("float32")
    if data_format == "channels_first":
        images = images.transpose(0, 3, 1, 2)
    model = models.create("resnet8", 100, images.shape[1:])
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    labels = np.arange(16) % 2
    losses = model.fit(images, labels, batch_size=16, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < 0.3 * losses[0]


def test_a_saved_model_loads_without_this_package(tmp_path):
    model = models.create("resnet8", 100, (16, 16, 3))
    for weight in model.non_trainable_weights:  # statistics other than a fresh model's
        weight.assign(np.random.default_rng(1).uniform(0.5, 1.5, weight.shape))
    model.save(tmp_path / "model.keras")
    images = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype("float32")
    np.save(tmp_path / "images.npy", images)
    script = """
import sys
sys.modules["dskd_keras"] = None  # the import of it fails
import keras, numpy as np
model = keras.models.load_model("model.keras")
np.save("logits.npy", model.predict_on_batch(np.load("images.npy")))
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True)
    expected = model.predict_on_batch(images)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet23", 10, (32, 32, 3)), r"^model: unknown name 'resnet23'\. Did you mean 'resnet"),
        ((None, 10, (32, 32, 3)), r"^model: unknown name None"),
        (("resnet8", 1, (32, 32, 3)), r"^num_classes: 1 is not an integer of at least 2"),
        (("resnet8", 10.0, (32, 32, 3)), r"^num_classes: 10\.0"),
        (("resnet8", True, (32, 32, 3)), r"^num_classes: True"),
        (("resnet8", 10, (32, 32)), r"^input_shape: \(32, 32\) is not three positive integers"),
        (("resnet8", 10, (32, None, 3)), r"^input_shape: .*\(height, width, channels\)"),
        (("resnet8", 10, (32, 32, 0)), r"^input_shape: .*positive"),
        (("resnet8", 10, (32, 32.5, 3)), r"^input_shape: .*positive"),
        (("resnet8", 10, 32), r"^input_shape: 32 is not"),
        (("resnet8", 10, "333"), r"^input_shape: '333' is not"),
        (("resnet8", 10, (3, 32, 32)), r"^input_shape: .*too small or in another order.*least 8"),
        (("resnet8", 10, (32, 7, 3)), r"^input_shape: .*too small"),
    ],
)
def test_unusable_settings_are_named(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        models.create(*arguments)
    assert "\n" not in str(error.value)


def test_the_caller_names_the_field():
    with pytest.raises(InputError, match=r"^teacher: unknown name 'vit'"):
        models.create("vit", 10, (32, 32, 3), field="teacher")


def test_the_order_of_channels_first_is_named(channels_first):
    with pytest.raises(InputError, match=r"\(channels, height, width\).*'channels_first'"):
        models.create("resnet8", 10, (32, 32, 3))
