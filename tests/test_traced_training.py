"""A student that trains as a trace gets the numbers of one that trains layer by layer."""

import math
import warnings

import keras
import numpy as np
import pytest
import small
from keras import layers

import dskd_keras
from dskd_keras import models
from dskd_keras.experiment import training
from dskd_keras.experiment.config import ExperimentConfig

pytestmark = pytest.mark.skipif(keras.backend.backend() != "torch", reason="PyTorch's alone")


def made(distiller):
    """Which of the shapes seen have a trace."""
    return [trace is not None for trace in distiller.traced_training._traces.values()]


def distiller_of(student, after, names=("stage1",), size=8, classes=small.CLASSES, **options):
    keras.utils.set_random_seed(0)
    teacher = small.convnet("teacher", size=size, classes=classes, channels=options.pop("c", 2))
    distiller = dskd_keras.Distiller(teacher, student, list(names), **options)
    distiller.compile(keras.optimizers.SGD(0.05, momentum=0.9), small.crossentropy())
    distiller.traced_training.after = after
    return distiller


def outcome(student, after, data, epochs=3, **options):
    """The distiller after some epochs of batches of 5, its logs and its weights."""
    keras.utils.set_random_seed(2)
    distiller = distiller_of(student(), after, **options)
    keras.utils.set_random_seed(1)
    logs = distiller.fit(*data, batch_size=5, epochs=epochs, shuffle=False, verbose=0).history
    return distiller, logs, small.values(distiller.weights)


def assert_trace_is_layers(student, data, shapes, **options):
    distiller, logs, weights = outcome(student, 0, data, **options)
    _, expected_logs, expected = outcome(student, math.inf, data, **options)
    assert made(distiller) == [True] * shapes
    for name, values in expected_logs.items():
        np.testing.assert_allclose(logs[name], values, rtol=1e-4, err_msg=name)
    for value, right in zip(weights, expected, strict=True):
        np.testing.assert_allclose(value, right, rtol=1e-3, atol=1e-4)
    return distiller


def nested():
    inner = small.convnet("inner")
    inputs = keras.Input(inner.input_shape[1:])
    return keras.Model(inputs, inner(inputs), name="student")


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", ["plain", "nested", "regularised"])
def test_a_student_trains_to_the_same_numbers(kind, precision):
    def student():
        if kind == "nested":
            return nested()
        decay = keras.regularizers.L2(0.01) if kind == "regularised" else None
        return small.convnet("student", regularizer=decay)

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        # The last batch is smaller.
        names = ["inner/stage1"] if kind == "nested" else ["stage1", "stage2"]
        if precision == "float32":
            assert_trace_is_layers(student, small.images(12), 2, names=names)
        else:
            # Half precision rounds to three digits, in another order.
            distiller, logs, _ = outcome(student, 0, small.images(12), names=names)
            _, expected, _ = outcome(student, math.inf, small.images(12), names=names)
            assert made(distiller) == [True, True]
            np.testing.assert_allclose(logs["loss"], expected["loss"], rtol=0.02)
    finally:
        keras.config.set_dtype_policy(before)


# The first stages hold all that a family is made of.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, stage",
    [("resnet8", "stage2"), ("wrn_16_1", "stage2"), ("MobileNetV2", "stage2"),
     ("ShuffleV1", "stage1"), ("ShuffleV2", "stage1")],
)  # fmt: skip
def test_families_of_the_zoo(name, stage):
    def student():
        model = models.create(name, 10, (32, 32, 3))
        x = layers.GlobalAveragePooling2D()(model.get_layer(stage).output)
        return keras.Model(model.input, layers.Dense(10, name="logits")(x))

    rng = np.random.default_rng(0)
    data = rng.standard_normal((10, 32, 32, 3)).astype("float32"), np.arange(10)
    options = {"size": 32, "classes": 10, "c": 3, "names": [stage]}
    assert_trace_is_layers(student, data, 1, epochs=1, **options)


def with_layer(*extra, **options):
    """A student with more layers before its logits."""

    def student():
        model = small.convnet("student")
        x = model.get_layer("pool").output
        for layer in extra:
            x = layer()(x)
        return keras.Model(model.input, layers.Dense(small.CLASSES, name="logits", **options)(x))

    return student


class AddsLoss(layers.Layer):
    """Adds a loss."""

    def call(self, x):
        self.add_loss(keras.ops.mean(x))
        return x


class Counts(layers.Layer):
    """Counts its calls."""

    def build(self, shape):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        self.calls.assign_add(1.0)
        return x + 0.0 * self.calls


class Branches(layers.Layer):
    """Looks at its values."""

    def call(self, x):
        return x * 2.0 if float(keras.ops.mean(x)) > 0 else x


@pytest.mark.parametrize(
    "student, reason",
    [
        (with_layer(lambda: layers.Dropout(0.5)), ""),
        (with_layer(lambda: layers.Dropout(0.5, seed=3)), ""),
        (with_layer(lambda: layers.GaussianNoise(0.1)), ""),
        (with_layer(Counts), ""),
        (with_layer(AddsLoss), "its layers add losses"),
        (with_layer(activity_regularizer="l2"), "its layers add losses"),
        (with_layer(Branches), "PyTorch can't trace it"),
    ],
)
def test_what_no_trace_can_do_is_said_once_and_changes_nothing(student, reason):
    data = small.images(12)
    with pytest.warns(UserWarning, match=f"layer by layer, not as a trace: .*{reason}") as said:
        distiller, logs, weights = outcome(student, 0, data)
    assert len([warning for warning in said if "The student" in str(warning.message)]) == 1
    assert made(distiller) == [False, False]
    _, expected_logs, expected = outcome(student, math.inf, data)
    # To the bit: what was drawn and counted to find out is taken back.
    small.assert_same_bits(weights, expected)
    assert logs == expected_logs


def test_masks_of_outputs_are_kept():
    def student():
        tokens = keras.Input((None,), dtype="int32")
        x = layers.Embedding(9, 4, mask_zero=True, name="embedding")(tokens)
        return keras.Model(tokens, layers.Dense(3, name="logits")(x))

    keras.utils.set_random_seed(0)
    distiller = dskd_keras.Distiller(student(), student(), [], deep_feature_weight=0)
    distiller.compile("sgd", small.crossentropy())
    distiller.traced_training.after = 0
    x = np.arange(12).reshape(2, 6) % 9
    with pytest.warns(UserWarning, match="its outputs have masks"):
        distiller.fit(x, x % 3, verbose=0)
    assert made(distiller) == [False]


def test_a_layer_that_is_frozen_later_is_frozen():
    distiller = distiller_of(small.convnet("student"), 0)
    x, y = small.images(5)
    distiller.fit(x, y, verbose=0)
    layer = distiller.student.get_layer("stage1_bn")
    layer.trainable = False
    distiller.compile("sgd", small.crossentropy())
    before = small.values(layer.weights)
    distiller.fit(x, y, verbose=0)
    small.assert_same_bits(small.values(layer.weights), before)
    assert made(distiller) == [True, True]


def test_weights_that_are_set_and_moving_statistics_are_seen():
    distiller = distiller_of(small.convnet("student"), 0)
    x, y = small.images(5)
    distiller.fit(x, y, epochs=2, verbose=0)
    assert made(distiller) == [True]
    bn = distiller.student.get_layer("stage1_bn")
    outputs = keras.Model(distiller.student.input, bn.input)
    keras.utils.set_random_seed(3)
    new = [np.random.rand(*w.shape) for w in distiller.student.get_weights()]
    distiller.student.set_weights(new)
    expected = outputs.predict(x, verbose=0).mean((0, 1, 2))
    moving = small.values([bn.moving_mean])[0]
    distiller.fit(x, y, verbose=0)
    np.testing.assert_allclose(
        small.values([bn.moving_mean])[0], 0.99 * moving + 0.01 * expected, rtol=1e-5
    )


@pytest.mark.parametrize("eagerly", [False, True])
def test_a_trace_is_made_where_it_pays_and_not_in_an_eager_model(eagerly):
    distiller = distiller_of(small.convnet("student"), 2)
    distiller.compile("sgd", small.crossentropy(), run_eagerly=eagerly)
    x, y = small.images(5)
    counts = []
    after = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: counts.append(made(distiller)))
    distiller.fit(x, y, epochs=4, verbose=0, callbacks=[after])
    assert counts == ([[]] * 4 if eagerly else [[], [], [True], [True]])


def test_more_shapes_than_traces():
    distiller = distiller_of(small.convnet("student"), 0)
    x, y = small.images(20)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for size in range(2, 13):
            distiller.train_on_batch(x[:size], y[:size])
    assert made(distiller) == [True] * 8
    of_student = [str(w.message) for w in said if "The student" in str(w.message)]
    assert len(of_student) == 1 and "more than 8 shapes" in of_student[0]


@pytest.mark.parametrize("epochs, after", [(1, math.inf), (30, 0)])
def test_a_run_decides_by_all_of_its_steps(epochs, after):
    # So that it is resumed to the same bits.
    config = ExperimentConfig("resnet8", "resnet8", epochs=epochs, batch_size=4, method="ce")
    dataset = dskd_keras.data.ImageDataset(
        "noise", *(np.zeros((16, 8, 8, 3), "uint8"), np.arange(16) % 3) * 2, ("a", "b", "c"),
        (0.5,) * 3, (0.2,) * 3,
    )  # fmt: skip
    from rich.console import Console

    from dskd_keras.experiment.run import Run

    distiller = distiller_of(small.convnet("student", channels=3), 7, c=3)
    run = Run(config, dataset, Console(quiet=True))
    training._plan(run, distiller, lambda first=0: training.training_batches(run, 0, first))
    assert distiller.traced_training.after == after
