import dataclasses

import keras
import numpy as np
import pytest
import small
from keras import layers, ops

from dskd_keras import InputError
from dskd_keras.endings import Ending, as_logits, check_logits, ending

BACKEND = keras.backend.backend()


@keras.saving.register_keras_serializable("test_endings")
class Watched(layers.Layer):
    """Counts its calls, and has a state and a loss that every call changes."""

    calls = 0

    def build(self, shape):
        self.state = self.add_weight(shape=(), initializer="zeros", trainable=False, name="state")

    def call(self, x):
        self.calls += 1
        self.state.assign_add(1.0)
        self.add_loss(ops.mean(x))
        return x


@keras.saving.register_keras_serializable("test_endings")
class OwnSoftmax(layers.Layer):
    """A softmax that is no layer of Keras's."""

    def call(self, x):
        return ops.exp(x) / ops.sum(ops.exp(x), axis=-1, keepdims=True)


@keras.saving.register_keras_serializable("test_endings")
class Own(layers.Dense):
    """A dense layer that does more, or less, than Keras's."""

    def __init__(self, units, activation=None, after=None, **kwargs):
        super().__init__(units, activation=activation, **kwargs)
        self.after = after

    def call(self, x):
        x = super().call(x)
        return {None: lambda x: x, "softmax": ops.softmax, "square": ops.square}[self.after](x)

    def get_config(self):
        return {**super().get_config(), "after": self.after}


def classifier(end, shape=(4,)):
    """A model whose outputs `end` computes from what a layer gives, and inputs for it."""
    inputs = keras.Input(shape)
    hidden = layers.Dense(6, activation="tanh", name="hidden")(Watched(name="watched")(inputs))
    model = keras.Model(inputs, end(hidden), name="classifier")
    rng = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(0, 0.7, variable.shape))
    model.get_layer("watched").calls = 0
    return model, rng.standard_normal((3, *(size or 5 for size in shape))).astype("float32")


def run(model, x):
    with keras.StatelessScope():
        outputs = model(x, training=False)
    return keras.tree.map_structure(ops.convert_to_numpy, outputs)


def of_logits(kind, z, axis=-1):
    """What softmax and so on give of logits, computed by NumPy."""
    if "sigmoid" in kind:
        p = 1 / (1 + np.exp(-z))
    else:
        p = np.exp(z) / np.exp(z).sum(axis=axis, keepdims=True)
    return np.log(p) if kind.startswith("log") else p


def dense(x, activation=None, name="end", units=3):
    return layers.Dense(units, activation=activation, name=name)(x)


def logits(x):
    return dense(x, name="logits")


def nested(end, x, name="inner"):
    """What a nested model gives, whose own layers are `end`."""
    inputs = keras.Input(x.shape[1:])
    return keras.Model(inputs, end(inputs), name=name)(x)


def sequential(x, *parts):
    return keras.Sequential([keras.Input(x.shape[1:]), *parts], name="inner")(x)


def after_all(x):
    x = layers.Dropout(0.5)(layers.Identity()(dense(x, "softmax")))
    return ops.cast(layers.Activation("linear")(x), "float32")


def wrapped(x):
    return layers.TimeDistributed(layers.Dense(3, activation="softmax"), name="end")(x)


def convolution(x):
    return layers.Conv2D(3, 1, activation="softmax", data_format="channels_last", name="end")(x)


def einsum(x):
    return layers.EinsumDense("abc,cd->abd", (None, 3), activation="sigmoid", name="end")(x)


SOFTMAX = Ending("softmax", "end", -1)
SIGMOID = Ending("sigmoid", "end")
UNNAMED = {"layer": ""}  # operations have the names that Keras gives them

# What is found; what computes it; the shape of the inputs.
CASES = {
    "softmax": (SOFTMAX, lambda x: dense(x, "softmax")),
    "sigmoid": (SIGMOID, lambda x: dense(x, "sigmoid")),
    "log_softmax": (Ending("log_softmax", "end", -1), lambda x: dense(x, "log_softmax")),
    "log_sigmoid": (Ending("log_sigmoid", "end"), lambda x: dense(x, "log_sigmoid")),
    "one logit": (SIGMOID, lambda x: dense(x, "sigmoid", units=1)),
    "function": (SOFTMAX, lambda x: dense(x, ops.softmax)),
    "layer": (SOFTMAX, lambda x: layers.Softmax(name="end")(logits(x))),
    "activation": (SIGMOID, lambda x: layers.Activation("sigmoid", name="end")(logits(x))),
    "lambda": (SOFTMAX, lambda x: layers.Lambda(lambda x: ops.softmax(x), name="end")(logits(x))),
    "own layer": (SOFTMAX, lambda x: OwnSoftmax(name="end")(logits(x))),
    "own layer with weights": (SOFTMAX, lambda x: Own(3, "softmax", name="end")(x)),
    "ops.softmax": (Ending("softmax", "", -1), lambda x: ops.softmax(logits(x))),
    "ops.sigmoid": (Ending("sigmoid", ""), lambda x: ops.sigmoid(logits(x))),
    "activations.softmax": (
        Ending("softmax", "", -1),
        lambda x: keras.activations.softmax(logits(x)),
    ),
    "of a logarithm": (
        Ending("softmax", "", -1),
        lambda x: ops.exp(ops.log_softmax(logits(x))),
    ),
    "clipped": (SOFTMAX, lambda x: ops.clip(dense(x, "softmax"), 1e-7, 1 - 1e-7)),
    "before others": (SOFTMAX, after_all),
    "after others": (SOFTMAX, lambda x: layers.Softmax(name="end")(layers.Dropout(0.5)(logits(x)))),
    "reshaped": (
        SOFTMAX,
        lambda x: layers.Flatten()(dense(layers.Reshape((1, 1, 6))(x), "softmax")),
    ),
    "wrapped": (SOFTMAX, wrapped, (None, 4)),
    "positions": (SOFTMAX, lambda x: dense(x, "softmax"), (5, 4)),
    "map": (SOFTMAX, convolution, (5, 5, 4)),
    "labels of positions": (SIGMOID, einsum, (5, 4)),
    "another axis": (
        Ending("softmax", "end", -2),
        lambda x: layers.Softmax(1, name="end")(logits(x)),
        (5, 4),
    ),
    "nested": (
        Ending("softmax", "inner/end", -1),
        lambda x: nested(lambda x: dense(x, "softmax"), x),
    ),
    "nested operation": (
        Ending("sigmoid", "", None),
        lambda x: nested(lambda x: ops.sigmoid(logits(x)), x),
    ),
    "nested sequential": (
        Ending("softmax", "inner/end", -1),
        lambda x: sequential(x, layers.Dense(3), layers.Softmax(name="end"), layers.Dropout(0.5)),
    ),
    "nested twice": (
        Ending("softmax", "outer/inner/end", -1),
        lambda x: layers.Identity()(
            nested(lambda x: nested(lambda x: dense(x, "softmax"), x), x, "outer")
        ),
    ),
    "nested without weights": (
        Ending("softmax", "inner", -1),
        lambda x: nested(layers.Softmax(), logits(x)),
    ),
    "nested of several operations": (
        Ending("softmax", "inner/end", -1),
        lambda x: nested(lambda x: layers.Softmax(name="end")(ops.tanh(x)), logits(x)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_ending_is_found_and_taken_off(case):
    found, end, *shape = CASES[case]
    model, x = classifier(end, *shape)
    seen = ending(model)
    assert seen == (found if found.layer else dataclasses.replace(found, layer=seen.layer))
    with pytest.raises(InputError) as error:
        check_logits("teacher", model)
    assert str(error.value) == (
        f"teacher: 'classifier' ends in a {found.kind} (layer '{seen.layer}'), where logits are "
        "expected. Take dskd_keras.as_logits(teacher), a copy with equal weights that ends in "
        "logits."
    )
    # No part of this has run the model.
    assert model.get_layer("watched").calls == 0
    twin = as_logits(model)
    assert twin.name == "classifier" and twin.outputs[0].shape == model.outputs[0].shape
    assert twin.outputs[0].dtype == model.outputs[0].dtype
    given, expected = run(twin, x), run(model, x)
    assert given.std() > 0.1
    np.testing.assert_allclose(of_logits(found.kind, given, found.axis), expected, 1e-5, 1e-6)
    assert ending(twin) is None
    check_logits("teacher", twin)
    assert as_logits(twin) is twin


def test_the_model_is_left_as_it_is_and_shares_nothing():
    model, x = classifier(lambda x: nested(lambda x: layers.Dropout(0.1)(dense(x, "softmax")), x))
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
    with small.eagerly(False):
        before = model.predict(x, verbose=0)  # keeps what it compiled
    config, optimizer = model.get_config(), model.optimizer
    weights = small.values(model.variables)
    twin = as_logits(model)
    small.assert_same_bits(weights, small.values(model.variables))
    assert model.get_config() == config and model.optimizer is optimizer and model.compiled
    assert not twin.compiled
    assert model.get_layer("inner").get_layer("end").activation is keras.activations.softmax
    with small.eagerly(False):
        np.testing.assert_array_equal(model.predict(x, verbose=0), before)
    given = run(twin, x)
    for variable in model.variables:
        variable.assign(variable + 1.0)
    np.testing.assert_array_equal(run(twin, x), given)
    for variable in twin.variables:
        variable.assign(variable * 2.0)
    np.testing.assert_array_equal(
        model.get_layer("hidden").kernel, np.asarray(weights[1], "float32") + 1.0
    )


def test_the_softmax_can_be_put_back_and_files_hold_the_twin(tmp_path):
    model, x = classifier(lambda x: nested(lambda x: after_all(x), x))
    twin = as_logits(model)
    again = keras.Model(twin.input, layers.Softmax()(twin.output))
    np.testing.assert_allclose(run(again, x), run(model, x), 1e-5)
    twin.save(tmp_path / "twin.keras")
    loaded = keras.models.load_model(tmp_path / "twin.keras")
    np.testing.assert_array_equal(run(loaded, x), run(twin, x))


@pytest.mark.once
@pytest.mark.parametrize("unbuilt", [False, True])
def test_sequential_models(unbuilt):
    parts = [layers.Dense(6, name="hidden"), layers.Dense(3), layers.Activation("softmax")]
    model = keras.Sequential(parts if unbuilt else [keras.Input((4,)), *parts], name="sequence")
    x = np.random.default_rng(1).standard_normal((3, 4)).astype("float32")
    if unbuilt:
        assert ending(model) is None
        with pytest.raises(InputError, match=r"^model: Sequential 'sequence' has no graph"):
            as_logits(model)
        model.build((None, 4))
    twin = as_logits(model)
    np.testing.assert_allclose(of_logits("softmax", run(twin, x)), run(model, x), 1e-5)
    assert [layer.name for layer in twin.layers[1:]] == ["hidden", parts[1].name]


def several(x):
    p = dense(x, "softmax", name="p")
    return {
        "p": layers.Identity(name="layer of p")(p),
        "q": layers.Activation("sigmoid", name="of q")(dense(x, name="other")),
        "logits": logits(p),
        "list": [dense(x, "relu", name="map"), p],
    }


@pytest.mark.once
@pytest.mark.parametrize(
    ("output", "changed"),
    [
        (None, {"p": "softmax", "q": "sigmoid", "p in list": "softmax"}),
        ("q", {"q": "sigmoid"}),
        ("of q", {"q": "sigmoid"}),
        (4, {"q": "sigmoid"}),
        ("list", {"p in list": "softmax"}),
        ("layer of p", {"p": "softmax"}),
        ("logits", {}),
    ],
)
def test_one_of_several_outputs(output, changed):
    model, x = classifier(several)
    twin = as_logits(model, output)
    assert (twin is model) == (not changed)

    def flat(outputs):
        return {**outputs, "map": outputs["list"][0], "p in list": outputs["list"][1]}

    before, after = flat(run(model, x)), flat(run(twin, x))
    for name in before.keys() - {"list"}:
        # What depends on the probabilities gets them still.
        given = of_logits(changed[name], after[name]) if name in changed else after[name]
        np.testing.assert_allclose(given, before[name], 1e-5, 1e-6)


@pytest.mark.once
def test_outputs_that_are_not_there():
    model, _ = classifier(several)
    for output in ("r", 5, -1, 1.5):
        with pytest.raises(InputError, match=f"^output: '?{output}'? should be a known name.*'?q"):
            as_logits(model, output)


@pytest.mark.once
def test_an_activation_that_is_used_elsewhere_stays_there():
    shared = layers.Dense(6, activation="softmax", name="shared")

    def end(x):
        # Called in the model, in a nested one, and by the output.
        x = nested(lambda x: [shared(x), layers.Softmax(name="last")(shared(x))], shared(x))
        return {"end": shared(layers.Add()(x)), "nested": x[1], "between": dense(x[0])}

    model, x = classifier(end)
    twin = as_logits(model)
    before, after = run(model, x), run(twin, x)
    np.testing.assert_allclose(after["between"], before["between"], 1e-5, 1e-6)
    for name in ("end", "nested"):
        np.testing.assert_allclose(of_logits("softmax", after[name]), before[name], 1e-5)
    # One layer with one set of weights, as in the model.
    assert len(twin.weights) == len(model.weights)


@pytest.mark.once
def test_parts_of_an_activation_that_are_used_elsewhere_stay_there():
    def end(x):
        log = dense(x, "log_softmax")
        return {"end": ops.exp(log), "log": log}

    model, x = classifier(end)
    before, after = run(model, x), run(as_logits(model, "end"), x)
    np.testing.assert_allclose(after["log"], before["log"], 1e-5, 1e-6)
    np.testing.assert_allclose(of_logits("softmax", after["end"]), before["end"], 1e-5)


@pytest.mark.once
def test_outputs_of_nested_models_are_told_apart():
    def inner(x):
        return [logits(x), dense(x, "softmax"), dense(x, "sigmoid", name="wide", units=5)]

    for index, kind in enumerate([None, "softmax", "sigmoid"]):
        model, x = classifier(lambda x, index=index: nested(inner, x)[index])
        twin = as_logits(model)
        given, expected = run(twin, x), run(model, x)
        np.testing.assert_allclose(of_logits(kind, given) if kind else given, expected, 1e-5)
        assert getattr(ending(model), "kind", None) == kind


@pytest.mark.once
def test_flags_are_kept():
    model, _ = classifier(lambda x: nested(lambda x: dense(dense(x, name="a"), "softmax"), x))
    inner = model.get_layer("inner")
    model.get_layer("hidden").trainable = False
    inner.trainable = False
    inner.get_layer("a").trainable = True

    def flags(model):
        return [layer.trainable for layer in model.layers]

    twin = as_logits(model)
    assert flags(twin) == flags(model) and flags(twin.get_layer("inner")) == flags(inner)
    model.trainable = False
    assert not as_logits(model).trainable


def test_the_precision_of_the_outputs_is_kept():
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    model, x = classifier(lambda x: layers.Activation("softmax", dtype="float32")(logits(x)))
    keras.config.set_dtype_policy(previous)
    twin = as_logits(model)
    assert run(twin, x).dtype == np.float32
    assert twin.get_layer("logits").compute_dtype == "float16"
    np.testing.assert_allclose(of_logits("softmax", run(twin, x)), run(model, x), 1e-3)


def gate(x):
    return layers.Multiply()([logits(x), dense(x, "sigmoid", name="gate")])


# Logits, and the graph says so.
LOGITS = {
    "dense": logits,
    "dropout": lambda x: layers.Dropout(0.5)(layers.Identity()(logits(x))),
    "batch norm": lambda x: layers.BatchNormalization()(logits(x)),
    "pooled": (lambda x: layers.GlobalAveragePooling1D()(logits(x)), (5, 4)),
    "mean": (lambda x: ops.mean(logits(x), axis=1), (5, 4)),
    "flat": (lambda x: layers.Flatten()(logits(x)), (5, 4)),
    "upsampled": (lambda x: layers.UpSampling1D()(logits(x)), (5, 4)),
    "first position": (lambda x: logits(x)[:, 0], (5, 4)),
    "sum": lambda x: layers.Add()([logits(x), dense(x, name="other")]),
    "operator": lambda x: logits(x) - 2 * dense(x, name="other") / 3,
    "average": lambda x: layers.Average()([logits(x), dense(x, name="other")]),
    "scaled": lambda x: layers.Rescaling(3.0)(logits(x)),
    "gated": gate,
    "nested": lambda x: nested(logits, x),
    "wrapped": (lambda x: layers.TimeDistributed(layers.Dense(3))(x), (5, 4)),
    "logits of probabilities": lambda x: logits(dense(x, "softmax")),
}


@pytest.mark.once
@pytest.mark.parametrize("case", LOGITS)
def test_logits_are_let_through_without_running_the_model(case):
    end, *shape = LOGITS[case] if isinstance(LOGITS[case], tuple) else (LOGITS[case],)
    model, _ = classifier(end, *shape)
    assert ending(model) is None
    check_logits("student", model)
    assert as_logits(model) is model
    assert model.get_layer("watched").calls == 0


def quotient(x):
    e = ops.exp(logits(x))
    return e / ops.sum(e, axis=-1, keepdims=True)


# Probabilities, and the graph can't say.
PROBABILITIES = {
    "quotient": quotient,
    "own layer": lambda x: Own(3, after="softmax")(x),
    "temperature": lambda x: layers.Lambda(lambda x: ops.softmax(x / 2))(logits(x)),
    "sparsemax": lambda x: dense(x, "sparsemax"),
    "by hand": lambda x: 0.5 * (dense(x, "softmax", "a") + dense(x, "softmax", "b")),
    "in a wrapper": (
        lambda x: layers.TimeDistributed(keras.Sequential([layers.Dense(3), layers.Softmax()]))(x),
        (5, 4),
    ),
}


@pytest.mark.parametrize("case", PROBABILITIES)
def test_probabilities_are_seen_in_a_batch(case):
    end, *shape = (
        PROBABILITIES[case] if isinstance(PROBABILITIES[case], tuple) else (PROBABILITIES[case],)
    )
    model, _ = classifier(end, *shape)
    weights, losses = small.values(model.variables), len(model.losses)
    assert ending(model) is None
    with pytest.raises(
        InputError, match=r"^student: 'classifier' gives probabilities: rows .* sum to one,[^\n]*$"
    ):
        check_logits("student", model)
    with pytest.raises(InputError, match=r"^model: 'classifier' gives probabilities: [^\n]*$"):
        as_logits(model)
    # The batch leaves no trace.
    assert model.get_layer("watched").calls == 2
    assert len(model.losses) == losses
    small.assert_same_bits(weights, small.values(model.variables))


UNDECIDED = {
    "own layer": lambda x: Own(3, after="square")(x),
    "activated": lambda x: dense(x, "relu"),
    "operation": lambda x: ops.tanh(logits(x)),
    "half the probabilities": lambda x: dense(x, "softmax") * 0.5,
    "one value": lambda x: Own(1, after="softmax")(x),  # 1.0 each
}


@pytest.mark.parametrize("case", UNDECIDED)
def test_what_is_neither_is_taken_for_logits(case):
    model, _ = classifier(UNDECIDED[case])
    check_logits("student", model)
    assert as_logits(model) is model


def test_batches_for_all_kinds_of_inputs():
    tokens = keras.Input((7,), dtype="int32", name="tokens")
    image = keras.Input((None, None, 2), name="image")
    x = layers.Embedding(5, 3)(tokens)
    # Needs more than 8 positions.
    y = layers.Conv2D(3, 9, data_format="channels_last")(image)
    y = layers.GlobalAveragePooling2D(data_format="channels_last")(y)
    x = layers.Concatenate()([layers.GlobalAveragePooling1D()(x), y])
    model = keras.Model({"tokens": tokens, "image": image}, [dense(x), quotient(x)])
    check_logits("student", model, 0)
    with pytest.raises(InputError, match=r"^student: .* gives probabilities"):
        check_logits("student", model, 1)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="no other backend has strings")
def test_strings_are_no_batch_and_a_vocabulary_is_copied():
    import tensorflow as tf

    words = layers.StringLookup(output_mode="multi_hot")
    words.adapt(["a", "b", "c"])
    inputs = keras.Input((2,), dtype="string")
    check_logits("student", keras.Model(inputs, quotient(words(inputs))))
    model = keras.Model(inputs, dense(words(inputs), "softmax"))
    x = tf.constant([["a", "c"], ["b", "b"]])
    given, expected = run(as_logits(model), x), run(model, x)
    np.testing.assert_allclose(of_logits("softmax", given), expected, 1e-5)


def two(x, kind):
    return [dense(x, kind, name="a"), dense(x, kind, name="b")]


COMBINED = {
    "average": ("softmax", lambda x: layers.Average(name="end")(two(x, "softmax"))),
    "sum": ("softmax", lambda x: layers.Add(name="end")(two(x, "softmax"))),
    "heads": ("sigmoid", lambda x: layers.Concatenate(name="end")(two(x, "sigmoid"))),
    "pooled": (
        "softmax",
        lambda x: layers.GlobalAveragePooling1D(name="end")(dense(x, "softmax", "p")),
        (5, 4),
    ),
    "flat": ("softmax", lambda x: layers.Flatten(name="end")(dense(x, "softmax", "p")), (5, 4)),
    "upsampled": (
        "softmax",
        lambda x: layers.UpSampling1D(name="end")(dense(x, "softmax", "p")),
        (5, 4),
    ),
    "transposed, nested": (
        "softmax",
        lambda x: layers.Reshape((25, 3))(nested(lambda x: layers.Softmax(1)(logits(x)), x)),
        (5, 5, 4),
    ),
    "transposed": (
        "softmax",
        lambda x: layers.Reshape((25, 3), name="end")(layers.Softmax(1)(logits(x))),
        (5, 5, 4),
    ),
}


@pytest.mark.once
@pytest.mark.parametrize("case", COMBINED)
def test_combined_probabilities_stay_such(case):
    kind, end, *shape = COMBINED[case]
    model, _ = classifier(end, *shape)
    found = ending(model)
    assert found.kind == kind and not found.removable
    for field, check in (
        ("teacher", lambda: check_logits("teacher", model)),
        ("model", lambda: as_logits(model)),
    ):
        with pytest.raises(
            InputError,
            match=f"^{field}: 'classifier' gives what layer '{found.layer}' makes of the outputs "
            rf"of a {kind}, which can't be turned into logits\.[^\n]*as_logits\)\.$",
        ):
            check()
    assert model.get_layer("watched").calls == 0


@keras.saving.register_keras_serializable("test_endings")
class Silent(layers.Layer):
    """Ends in an activation that its configuration does not hold."""

    activation = staticmethod(ops.softmax)

    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, x):
        return self.activation(self.scale * x)


def test_what_cannot_be_taken_off_is_said_in_one_line():
    model, _ = classifier(lambda x: Own(3, activation="softmax", after="square", name="own")(x))
    with pytest.raises(
        InputError,
        match=r"^model: layer 'own' \(Own\) has a softmax as its act[^\n]*in it\.[^\n]*$",
    ):
        as_logits(model)
    model, _ = classifier(lambda x: Silent(name="own")(x))
    with pytest.raises(
        InputError,
        match=r"^model: layer 'own' \(Silent\) can't be made anew.*not hold `activation`$",
    ):
        as_logits(model)
    with pytest.raises(InputError, match=r"^model: Dense should be a keras\.Model\.$"):
        as_logits(layers.Dense(3))
