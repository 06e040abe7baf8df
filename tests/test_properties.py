"""What holds of any model and of any losses, looked at in many that Hypothesis draws."""

import tempfile

import hypothesis
import keras
import numpy as np
import pytest
import small
from hypothesis import strategies as st
from keras import layers, ops

from dskd_keras import fold_batch_norm, keras_internals, weighting
from dskd_keras.endings import as_logits

# The same examples in every run.
SETTINGS = hypothesis.settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=20,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)

INPUTS = {"image": (6, 6, 3), "sequence": (5, 4), "vector": (4,), "tokens": (5,)}
STEPS = (
    "linear and norm", "linear", "norm", "activated", "depthwise", "relu", "operation", "pool",
    "add", "concatenate", "again", "dropout", "scale",
)  # fmt: skip

# What a graph is built of: the kind of its input; steps with a number that says how far back the
# tensor is which each takes, and what the layer is like in detail; whether positions are kept.
plain = st.tuples(st.sampled_from(STEPS), st.integers(0, 59))
nested_steps = st.tuples(
    st.sampled_from(["nested", "nested twice"]),
    st.integers(0, 59),
    st.lists(plain, min_size=2, max_size=3),
)
kinds = st.sampled_from([*[plain] * 5, nested_steps])
steps = st.lists(kinds.flatmap(lambda kind: kind), min_size=5, max_size=8)
graphs = st.tuples(st.sampled_from(list(INPUTS)), steps, st.booleans())


def linear(rank, number, **arguments):
    """A dense layer or a convolution, whichever goes with a tensor of this rank."""
    arguments |= {"use_bias": bool(number % 3), "bias_initializer": "normal"}
    if rank == 2 or number % 5 == 0:
        return layers.Dense(3 + number % 2, **arguments)
    kind = {3: layers.Conv1D, 4: layers.Conv2D}[rank]
    format = {"padding": "same", "data_format": "channels_last"}
    return kind(3 + number % 2, 1 + number % 3, **format, **arguments)


def normalised(x, number):
    return layers.BatchNormalization(scale=number % 4 != 1, center=number % 4 != 2)(x)


def pooled(x, number):
    rank = len(x.shape)
    if rank == 2:
        return layers.Dropout(0.3)(x)
    kinds = {
        3: (layers.MaxPooling1D, layers.AveragePooling1D),
        4: (layers.MaxPooling2D, layers.AveragePooling2D),
    }
    return kinds[rank][number % 2](2, 1, padding="same", data_format="channels_last")(x)


def depthwise(x, number):
    kinds = {3: layers.DepthwiseConv1D, 4: layers.DepthwiseConv2D}
    if len(x.shape) not in kinds:
        return linear(2, number)(x)
    return kinds[len(x.shape)](3, padding="same", data_format="channels_last")(x)


class Builder:
    """Builds a graph step by step. Sizes stay the same; the channels, 3 to 8, do not."""

    def __init__(self, x):
        self.tensors = [x]
        self.layers = []  # that can be called again, with the channels that they take

    def step(self, name, number, inner=()):
        x = self.tensors[max(-1 - number % 3, -len(self.tensors))]
        rank, channels = len(x.shape), x.shape[-1]
        if name in ("linear", "activated"):
            layer = linear(rank, number, activation="tanh" if name == "activated" else None)
            self.layers.append((layer, rank, channels))
            x = layer(x)
        elif name == "linear and norm":
            x = normalised(linear(rank, number)(x), number)
        elif name == "again":
            fitting = [one for one, *takes in self.layers if takes == [rank, channels]]
            x = fitting[number % len(fitting)](x) if fitting else layers.ReLU()(x)
        elif name in ("add", "concatenate"):
            other = self.tensors[-1]
            if name == "add":
                x = linear(rank, number)(x)
                other = layers.Dense(x.shape[-1])(other)
                x = layers.Add()([x, other]) if number % 2 else x + other
            elif channels + other.shape[-1] <= 8:
                x = layers.Concatenate()([x, other])
        elif name.startswith("nested"):
            inputs = keras.Input(x.shape[1:])
            builder = Builder(inputs)
            for part in inner:
                builder.step(*part)
            last = layers.Dense(channels)(builder.tensors[-1])
            model = keras.Model(inputs, last)
            x = model(x)
            x = model(x) if name == "nested twice" else x
        else:
            x = {
                "depthwise": lambda: depthwise(x, number),
                "norm": lambda: normalised(x, number),
                "relu": lambda: layers.ReLU()(x),
                "operation": lambda: ops.tanh(x),
                "pool": lambda: pooled(x, number),
                "dropout": lambda: layers.Dropout(0.3)(x),
                "scale": lambda: layers.Rescaling(0.7)(x),
            }[name]()
        self.tensors.append(x)


def build(recipe, end):
    """A model whose outputs `end` computes from features, and a batch for it."""
    kind, recipe_steps, positions = recipe
    shape, rng = INPUTS[kind], np.random.default_rng(0)
    if kind == "tokens":
        inputs = keras.Input(shape, dtype="int32")
        x, batch = layers.Embedding(7, 4)(inputs), rng.integers(0, 7, (3, *shape))
    else:
        inputs = x = keras.Input(shape)
        batch = rng.standard_normal((3, *shape)).astype("float32")
    builder = Builder(x)
    for step in recipe_steps:
        builder.step(*step)
    x = builder.tensors[-1]
    if not positions and len(x.shape) > 2:
        x = ops.mean(x, axis=tuple(range(1, len(x.shape) - 1)))
    model = keras.Model(inputs, end(x, builder.tensors))
    for layer in keras_internals.flat_layers(model):
        if isinstance(layer, layers.BatchNormalization):
            size = layer.moving_mean.shape
            layer.moving_mean.assign(rng.normal(0, 0.3, size))
            layer.moving_variance.assign(rng.uniform(0.5, 2, size))
            for variable in (layer.gamma, layer.beta):
                if variable is not None:
                    variable.assign(rng.uniform(-1, 1, size))
    return model, batch


def run(model, x):
    outputs = keras.tree.flatten(model(x, training=False))
    return [ops.convert_to_numpy(output) for output in outputs]


def reloaded(model):
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.keras")
        return keras.models.load_model(f"{folder}/model.keras")


def assert_close(given, expected):
    for a, b in zip(given, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max()), rtol=1e-4)


def nested(z, activation):
    inputs = keras.Input(z.shape[1:])
    x = layers.Dense(3, activation=activation, name="inner_end")(inputs)
    return keras.Model(inputs, layers.Dropout(0.2)(x))(z)


# A softmax or sigmoid of the features, in every way that there is.
ENDS = {
    "argument": lambda x, kind: layers.Dense(3, activation=kind)(x),
    "layer": lambda x, kind: layers.Activation(kind)(layers.Dense(3)(x)),
    "operation": lambda x, kind: getattr(ops, kind)(layers.Dense(3)(x)),
    "before others": lambda x, kind: layers.Identity()(layers.Dense(3, activation=kind)(x)),
    "nested": nested,
}


@pytest.mark.once
@SETTINGS
@hypothesis.given(graphs, st.sampled_from(list(ENDS)), st.sampled_from(["softmax", "sigmoid"]))
def test_the_twin_of_a_classifier_gives_its_logits(recipe, end, kind):
    model, x = build(recipe, lambda x, tensors: [ENDS[end](x, kind), tensors[len(tensors) // 2]])
    before = small.values(model.variables)
    twin = as_logits(model, 0)
    small.assert_same_bits(before, small.values(model.variables))
    (p, tensor), (logits, same) = run(model, x), run(twin, x)
    given = ops.convert_to_numpy(getattr(ops, kind)(logits))
    assert_close([given, same], [p, tensor])
    assert_close(run(reloaded(twin), x), [logits, same])
    assert as_logits(twin, 0) is twin


@pytest.mark.once
@SETTINGS
@hypothesis.given(graphs)
def test_a_folded_model_gives_the_same_outputs(recipe):
    model, x = build(recipe, lambda x, tensors: [x, tensors[len(tensors) // 2]])
    before = small.values(model.variables)
    folded = fold_batch_norm(model)
    small.assert_same_bits(before, small.values(model.variables))
    expected = run(model, x)
    assert_close(run(folded, x), expected)
    assert_close(run(reloaded(folded), x), expected)


# Of the normal numbers. JAX takes those that are smaller for zero.
LARGEST = float(np.finfo("float32").max)
losses = st.lists(
    st.one_of(
        # Rounding leaves divergences that are slightly negative.
        st.floats(-(2.0**-20), LARGEST, width=32),
        st.sampled_from([0.0, -1e-9, 1e-45, 1e-38, 1e38, LARGEST]),
    ),
    min_size=1,
    max_size=6,
)


@SETTINGS
@hypothesis.given(losses, st.sampled_from(weighting.names()))
def test_allocations_share_out_the_whole(losses, name):
    check_shares(weighting.get(name), losses)


@SETTINGS
@hypothesis.given(losses, st.floats(1.2e-38, 1e30))
def test_allocations_of_any_sharpness_share_out_the_whole(losses, temperature):
    check_shares(weighting.Softmax(temperature), losses)


def check_shares(strategy, losses):
    weights = ops.convert_to_numpy(strategy(np.array(losses, "float32")))
    assert weights.shape == (len(losses),)
    assert (weights >= 0).all()  # and none is NaN
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-5)
