"""The zoo: shapes, initialisation, naming, saving, training and errors."""

import functools
import importlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import small

from dskd_keras import graph, models
from dskd_keras.errors import InputError
from dskd_keras.models import catalog, shufflenet

# Most tests take 100 classes and 3 channels: JAX compiles a program for each new shape.


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


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "size", "stages"),
    [
        ("resnet14", (33, 21), [(33, 21, 16), (17, 11, 32), (9, 6, 64)]),
        ("resnet18", (64, 64), [(64, 64, 64), (32, 32, 128), (16, 16, 256), (8, 8, 512)]),
        ("wrn_16_2", (33, 21), [(33, 21, 32), (17, 11, 64), (9, 6, 128)]),
        ("vgg8", (33, 21), [(33, 21, 64), (16, 10, 128), (8, 5, 256), (4, 2, 512), (4, 2, 512)]),
        (
            "vgg8",
            (64, 64),
            [(64, 64, 64), (32, 32, 128), (16, 16, 256), (8, 8, 512), (4, 4, 512)],
        ),
        ("MobileNetV2", (64, 64), [(32, 32, 12), (16, 16, 16), (8, 8, 48), (4, 4, 160)]),
        ("ShuffleV1", (33, 21), [(17, 11, 240), (9, 6, 480), (5, 3, 960)]),
        ("ShuffleV2", (33, 21), [(17, 11, 116), (9, 6, 232), (5, 3, 464)]),
    ],
)
def test_shapes_follow_the_image(name, size, stages):
    model = models.create(name, 7, (*size, 1))
    assert model.input.shape == (None, *size, 1)
    assert model.output.shape == (None, 7)
    for stage, shape in enumerate(stages, start=1):
        assert model.get_layer(f"stage{stage}").output.shape == (None, *shape)
    assert f"stage{len(stages) + 1}" not in [layer.name for layer in model.layers]
    assert len(model.get_layer("pool").output.shape) == 2


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "size"), [("resnet8", 8), ("wrn_16_1", 8), ("vgg8", 16), ("ShuffleV2", 16)]
)
def test_smallest_image(name, size):
    model = models.create(name, 100, (size, size, 3))
    last = model.get_layer(graph.default_teacher_layer(model)).output
    assert last.shape[1:3] == (2, 2)
    with pytest.raises(InputError, match=rf"at least {size} for {name},"):
        models.create(name, 100, (size - 1, size, 3))


LAST_MAPS = {
    "resnet8": "stage3",
    "ResNet50": "stage4",
    "wrn_16_1": "final_relu",
    "vgg8": "stage5",
    "MobileNetV2": "head_relu",
    "ShuffleV1": "stage3",
    "ShuffleV2": "head_relu",
}


@functools.cache
def channels_first_model(name, size=32):
    """A model as where a saved one is loaded by a process with the other setting."""
    keras.config.set_image_data_format("channels_first")
    try:
        return models.create(name, 100, (3, size, size))
    finally:
        keras.config.set_image_data_format("channels_last")


@pytest.mark.once
@pytest.mark.parametrize(("name", "size"), [*((name, 32) for name in LAST_MAPS), ("vgg8", 64)])
def test_maps_tell_their_layout(name, size):
    model = channels_first_model(name, size)
    assert graph.default_teacher_layer(model) == LAST_MAPS[name]
    for stage in ("stage1", "stage2", "stage3"):
        first = model.get_layer(stage).output.shape
        last = graph.channels_last(model.get_layer(stage).output)
        assert last.shape == (None, *first[2:], first[1])


@pytest.mark.once
@pytest.mark.parametrize("name", LAST_MAPS)
def test_channels_first_names_the_format_in_every_layer(name):
    model = channels_first_model(name)
    for layer in model.layers:
        if hasattr(layer, "data_format"):
            assert layer.get_config()["data_format"] == "channels_first", layer.name
        if isinstance(layer, (keras.layers.BatchNormalization, keras.layers.Concatenate)):
            assert layer.axis == 1


@pytest.mark.once
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


@pytest.mark.once
@pytest.mark.parametrize("name", LAST_MAPS)
def test_models_are_of_keras_own_layers(name):
    model = channels_first_model(name)
    assert model.name == name
    assert {type(layer).__module__.split(".")[0] for layer in model.layers} == {"keras"}
    assert all(isinstance(operation, keras.Layer) for operation in model.operations)
    # What a saved file says of the start, too, is Keras's own.
    configs = [layer.get_config() for layer in model.layers]
    kinds = [kind for config in configs for kind in config if kind.endswith("_initializer")]
    assert kinds
    for config in configs:
        for kind in set(kinds) & set(config):
            assert config[kind] is None or config[kind]["module"] == "keras.initializers"


@pytest.mark.once
def test_names_are_found_without_regard_to_case():
    assert models.names()[:2] == ["resnet8", "resnet14"]
    assert len(models.names()) == len({name.casefold() for name in models.names()}) >= 24
    assert models.create("RESNET8", 100, (8, 8, 3)).name == "resnet8"
    assert models.create("shufflev2", 100, (16, 16, 3)).name == "ShuffleV2"


def test_the_catalog_has_the_families_models():
    assert list(catalog.FAMILIES) == models.names()
    built = {
        family: list(importlib.import_module(f"dskd_keras.models.{family}").ARCHITECTURES)
        for family in dict.fromkeys(catalog.FAMILIES.values())
    }
    assert [(name, family) for family, of_it in built.items() for name in of_it] == [
        *catalog.FAMILIES.items()
    ]


@pytest.mark.once
def test_the_catalog_needs_no_keras():
    script = """
import os, sys
os.environ["DSKD_KERAS_DEFER"] = "1"
from dskd_keras.models import catalog, names
print(catalog.check_name("model", "RESNET8X4"), *names())
assert not {"keras", "numpy"} & set(sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert result.stdout.split() == ["resnet8x4", *models.names()]


def fans(layer, kernel):
    """`(fan_in, fan_out)` as the references count them, from a kernel's shape."""
    height, width, inputs, filters = kernel.shape
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        return height * width, height * width * inputs
    return height * width * inputs, height * width * filters


# The references' convolutions: normal by fan_out with a bias of zero, or PyTorch's default. Their
# linear layers: the standard deviation where it is not PyTorch's default, and whether a bias is.
@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "normal", "linear_std", "zero_bias"),
    [
        ("resnet8x4", True, None, False),
        ("wrn_16_2", True, None, True),
        ("vgg8", True, 0.01, True),
        ("MobileNetV2", True, 0.01, True),
        ("MobileNetV2_tinyimagenet", False, None, False),
        ("ShuffleV1", False, None, False),
        ("ShuffleV2", False, None, False),
    ],
)
def test_initialisation_is_the_references(name, normal, linear_std, zero_bias):
    keras.utils.set_random_seed(1)
    model = models.create(name, 100, (32, 32, 3))
    for layer in model.layers:
        weights = [keras.ops.convert_to_numpy(weight) for weight in layer.weights]
        if isinstance(layer, keras.layers.BatchNormalization):
            for weight, value in zip(weights, [1, 0, 0, 1], strict=True):
                np.testing.assert_array_equal(weight, value)
            assert (layer.epsilon, layer.momentum) == (1e-5, 0.9)
        elif weights and layer.name != "logits":
            kernel, *bias = weights
            fan_in, fan_out = fans(layer, kernel)
            bound = fan_in**-0.5
            std = np.sqrt(2 / fan_out) if normal else bound / np.sqrt(3)
            # Five standard errors of an estimate from this many draws.
            assert abs(kernel.std() / std - 1) < 5 / np.sqrt(2 * kernel.size), layer.name
            if normal and kernel.size > 10_000:  # a normal cut at two deviations has no tail
                assert np.abs(kernel).max() > 3 * std, layer.name
            if not normal:
                assert np.abs(kernel).max() <= bound
            for values in bias:
                assert np.abs(values).max() <= (0 if normal else bound)
                assert normal or np.abs(values).max() > 0.5 * bound
    kernel, bias = model.get_layer("logits").get_weights()
    bound = kernel.shape[0] ** -0.5
    assert abs(kernel.std() / (linear_std or bound / np.sqrt(3)) - 1) < 0.02
    assert linear_std or 0.99 * bound < np.abs(kernel).max() <= bound
    assert not bias.any() if zero_bias else 0.8 * bound < np.abs(bias).max() <= bound


def test_a_seed_gives_the_same_weights_on_every_backend():
    keras.utils.set_random_seed(1)
    model = models.create("resnet8", 100, (32, 32, 3))
    kernel, again = (model.get_layer(f"stage1_block1_conv{i}").get_weights()[0] for i in (1, 2))
    np.testing.assert_allclose(kernel[0, 0, 0, :3], SEEDED, rtol=1e-6)
    assert not np.allclose(kernel, again)
    other = models.create("resnet8", 100, (32, 32, 3))
    assert not np.allclose(kernel, other.get_layer("stage1_block1_conv1").get_weights()[0])


SEEDED = [0.02661044, -0.00200368, -0.18889585]


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
        small.crossentropy(),
        jit_compile=small.jit_compile(data_format),
    )
    labels = np.arange(16) % 2
    losses = model.fit(images, labels, batch_size=16, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < 0.3 * losses[0]


def test_every_weight_is_trained_through_grouped_convolutions(monkeypatch):
    # A stage of two blocks has what one of four has; the others have one, to compile less.
    monkeypatch.setattr(shufflenet, "_BLOCKS", (2, 1, 1))
    images = np.random.default_rng(0).standard_normal((4, 16, 16, 3)).astype("float32")
    model = models.create("ShuffleV1", 100, (16, 16, 3))
    before = small.values(model.trainable_variables)
    # At such a rate a tiny gradient shows: a normalisation undoes the scale of the one before it.
    model.compile(keras.optimizers.SGD(100.0), small.crossentropy())
    loss = model.train_on_batch(images, np.arange(4))
    assert np.isfinite(loss)
    for variable, old in zip(model.trainable_variables, before, strict=True):
        assert np.abs(keras.ops.convert_to_numpy(variable) - old).max() > 0, variable.path


@pytest.mark.once
@pytest.mark.slow
def test_a_saved_model_loads_without_this_package(tmp_path):
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype("float32")
    np.save(tmp_path / "images.npy", images)
    expected = {}
    for name in ("MobileNetV2", "ShuffleV2"):
        model = models.create(name, 100, (32, 32, 3))
        for weight in model.non_trainable_weights:  # statistics other than a fresh model's
            weight.assign(np.random.default_rng(1).uniform(0.5, 1.5, weight.shape))
        model.save(tmp_path / f"{name}.keras")
        expected[name] = keras.ops.convert_to_numpy(model(images))
    script = """
import pathlib, sys
sys.modules["dskd_keras"] = None  # the import of it fails
import keras, numpy as np
for path in pathlib.Path().glob("*.keras"):
    model = keras.models.load_model(path)
    logits = model(np.load("images.npy"))
    np.save(path.with_suffix(".npy"), keras.ops.convert_to_numpy(logits))
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True)
    for name, logits in expected.items():
        loaded = np.load(tmp_path / f"{name}.npy")
        np.testing.assert_allclose(loaded, logits, rtol=1e-4, atol=1e-4 * logits.std())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("resnet23", 10, (32, 32, 3)),
            r"^model: 'resnet23' should be a known name\. Did you mean 'resnet",
        ),
        ((None, 10, (32, 32, 3)), r"^model: None should be a known name"),
        (("resnet8", 1, (32, 32, 3)), r"^num_classes: 1 should be a whole number of at least 2"),
        (("resnet8", 10.0, (32, 32, 3)), r"^num_classes: 10\.0"),
        (("resnet8", True, (32, 32, 3)), r"^num_classes: True"),
        (("resnet8", 10, (32, 32)), r"^input_shape: \(32, 32\) should be three positive integers"),
        (("resnet8", 10, (32, None, 3)), r"^input_shape: .*\(height, width, channels\)"),
        (("resnet8", 10, (32, 32, 0)), r"^input_shape: .*positive"),
        (("resnet8", 10, (32, 32.5, 3)), r"^input_shape: .*positive"),
        (("resnet8", 10, 32), r"^input_shape: 32 should be three"),
        (("resnet8", 10, "333"), r"^input_shape: '333' should be three"),
        (
            ("resnet8", 10, (3, 32, 32)),
            r"^input_shape: .*\(height, width, .*at least 8 for",
        ),
        (
            ("resnet8", 10, (32, 7, 3)),
            r"^input_shape: \(32, 7, 3\) should be .*at least 8",
        ),
    ],
)
def test_unusable_settings_are_named(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        models.create(*arguments)
    assert "\n" not in str(error.value)


def test_the_caller_names_the_field():
    with pytest.raises(InputError, match=r"^teacher: 'vit' should be a known name"):
        models.create("vit", 10, (32, 32, 3), field="teacher")


def test_the_order_of_channels_first_is_named(channels_first):
    with pytest.raises(InputError, match=r"\(channels, height, width\).*'channels_first'"):
        models.create("resnet8", 10, (32, 32, 3))
