import re
import warnings

import keras
import numpy as np
import pytest
import small
from keras import layers

from dskd_keras import models, tracing
from dskd_keras.folding import fold_batch_norm

pytestmark = pytest.mark.skipif(keras.backend.backend() != "torch", reason="PyTorch's alone")


def tensor(*shape, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape).astype("float32")
    return keras.ops.convert_to_tensor(x)


def assert_same(traced, model, x):
    for a, b in zip(
        keras.tree.flatten(traced(x)), keras.tree.flatten(model(x, training=False)), strict=True
    ):
        np.testing.assert_allclose(small.values([a])[0], small.values([b])[0], rtol=1e-4, atol=1e-5)


def made(traced):
    """Which of the shapes seen have a trace."""
    return [trace is not None for trace in traced._traces.values()]


def in_use(model):
    """The model with batch normalisations that do something."""
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.moving_mean.assign(np.linspace(-0.1, 0.1, layer.moving_mean.shape[0]))
    return model


@pytest.mark.parametrize("fold", [False, True])
def test_every_shape_of_a_batch_has_its_trace(fold):
    model = in_use(models.create("resnet8", 10, (32, 32, 3)))
    model = fold_batch_norm(model) if fold else model
    traced = tracing.Traced(model)
    # A data set's last batch is smaller.
    for batch in (4, 3, 4):
        assert_same(traced, model, tensor(batch, 32, 32, 3, seed=batch))
    assert made(traced) == [True, True]
    assert not keras.tree.flatten(traced(tensor(4, 32, 32, 3)))[0].requires_grad


# The first stages hold all that a family is made of; a trace of the rest takes seconds more.
@pytest.mark.parametrize(
    "name, stage",
    [("wrn_16_1", "stage2"), ("MobileNetV2", "stage2"), ("ShuffleV1", "stage1"),
     ("ShuffleV2", "stage1")],
)  # fmt: skip
def test_families_of_the_zoo(name, stage):
    model = in_use(models.create(name, 10, (32, 32, 3)))
    model = keras.Model(model.input, model.get_layer(stage).output)
    traced = tracing.Traced(model)
    assert_same(traced, model, tensor(2, 32, 32, 3))
    assert made(traced) == [True]


def test_a_change_of_the_weights_is_seen():
    model = small.convnet("model")
    traced, x = tracing.Traced(model), tensor(2, 8, 8, 2)
    before = small.values([traced(x)])[0]
    model.set_weights([weight + 0.1 for weight in model.get_weights()])
    assert_same(traced, model, x)
    assert np.abs(small.values([traced(x)])[0] - before).max() > 0.01


class Branching(layers.Layer):
    """Looks at its values."""

    def call(self, x):
        return x + 1.0 if float(keras.ops.mean(x)) > 0 else x

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)


class Noisy(layers.Layer):
    """Draws anew with every call."""

    def __init__(self):
        super().__init__()
        self.generator = keras.random.SeedGenerator(0)

    def call(self, x):
        return x + keras.random.normal(x.shape, seed=self.generator)


class NoisyInPyTorch(layers.Layer):
    """Draws anew with every call, past Keras."""

    def call(self, x):
        return x + x.new_empty(x.shape).normal_()


class InPlace(layers.Layer):
    """Changes a copy that it made."""

    def call(self, x):
        if x.device.type == "meta":
            return x
        y = x.clone()
        y.add_(1.0)
        return y + x


def warned(record):
    """What was said of models that are not traced."""
    return [str(w.message) for w in record if "layer by layer" in str(w.message)]


@pytest.mark.parametrize(
    "layer, reason",
    [
        (Branching, r"PyTorch can't trace it \(Exception encountered when calling Branching.call"),
        (Noisy, r"PyTorch can't trace it \(Exception encountered when calling Noisy.call"),
        (NoisyInPyTorch, "its trace gives other outputs, as random layers do"),
        (InPlace, None),
    ],
)
def test_layers_that_do_other_things_give_what_they_give(layer, reason):
    inputs = keras.Input((3,))
    model = keras.Model(inputs, layer()(layers.Dense(2)(inputs)), name="odd")
    traced = tracing.Traced(model)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        if layer in (Noisy, NoisyInPyTorch):
            outputs = [small.values([traced(tensor(2, 3))])[0] for _ in range(3)]
            assert (outputs[0] != outputs[1]).all() and (outputs[1] != outputs[2]).all()
        else:
            for seed in range(4):
                assert_same(traced, model, tensor(2, 3, seed=seed))
        traced(tensor(3, 3))  # another shape: it has been said
    assert made(traced) == [reason is None] * 2
    if reason is None:
        assert not warned(record)
    else:
        (message,) = warned(record)
        assert re.match(
            f"The model 'odd' runs layer by layer, not as a trace: {reason}.*\\. This is slower "
            "and changes nothing else\\.$",
            message,
        )
        assert "\n" not in message and "\x1b" not in message
        assert "trying to get value out of a tracing tensor" in message or "random" in message


def test_ever_new_shapes_are_not_traced_for_ever():
    model = small.convnet("model")
    traced = tracing.Traced(model)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for batch in range(1, 12):
            assert_same(traced, model, tensor(batch, 8, 8, 2))
    assert len(made(traced)) == tracing.SHAPES
    (message,) = warned(record)
    assert "its batches have more than 8 shapes" in message
