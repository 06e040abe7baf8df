"""Students and teachers with other outputs than the logits of one label an image."""

import hypothesis
import keras
import numpy as np
import pytest
import small
from hypothesis import strategies
from keras import layers

import dskd_keras

SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
BINARY = keras.losses.BinaryCrossentropy(from_logits=True)
RNG = np.random.default_rng(0)


def array(x):
    return np.asarray(keras.ops.convert_to_numpy(x), "float64")


def log_sigmoid(z):
    return -np.logaddexp(0, -z)


def binary_kl(p, q, tau):
    """τ² · KL between Bernoulli distributions, for every label."""
    p, q = p / tau, q / tau
    share = 1 / (1 + np.exp(-p))
    value = share * (log_sigmoid(p) - log_sigmoid(q))
    return tau**2 * (value + (1 - share) * (log_sigmoid(-p) - log_sigmoid(-q)))


def kl(p, q, tau):
    log_p, log_q = (z / tau - np.log(np.exp(z / tau).sum(-1, keepdims=True)) for z in (p, q))
    return tau**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1)


def mlp(name, outputs, width=6):
    inputs = keras.Input((5,))
    x = layers.Dense(width, activation="relu", name="block1")(inputs)
    x = layers.Dense(width, activation="relu", name="block2")(x)
    logits = layers.Dense(outputs, name="logits", kernel_initializer="glorot_normal")(x)
    return keras.Model(inputs, logits, name=name)


def step(distiller, loss, x, y, **options):
    """The logs of one step that changes no weight."""
    distiller.compile(keras.optimizers.SGD(0.0), loss=loss)
    logs = distiller.train_on_batch(x, y, return_dict=True, **options)
    return {name: float(value) for name, value in logs.items()}


@pytest.mark.parametrize(
    ("outputs", "shape"), [(1, (6,)), (1, (6, 1)), (3, (6, 3))], ids=["[B]", "[B, 1]", "[B, C]"]
)
@small.eagerly()
def test_under_a_binary_loss_labels_are_independent(outputs, shape):
    teacher, student = mlp("teacher", outputs, 9), mlp("student", outputs)
    x = RNG.standard_normal((6, 5)).astype("float32")
    y = RNG.integers(0, 2, shape).astype("float32")
    distiller = dskd_keras.Distiller(teacher, student, ["block1"], temperature=2.0)
    logs = step(distiller, BINARY, x, y)
    p, q = array(teacher(x)), array(student(x))
    assert logs["prediction_loss"] == pytest.approx(binary_kl(p, q, 2.0).mean(), rel=1e-4)
    label = y.reshape(q.shape)
    crossentropy = -(label * log_sigmoid(q) + (1 - label) * log_sigmoid(-q))
    assert logs["label_loss"] == pytest.approx(crossentropy.mean(), rel=1e-4)
    deep = array(distiller(x, training=True).deep_logits["block1"])
    assert logs["deep_prediction_loss/block1"] == pytest.approx(
        binary_kl(p, deep, 2.0).mean(), rel=1e-3
    )


@small.eagerly()
def test_without_a_compiled_loss_one_logit_is_binary():
    teacher, student = mlp("teacher", 1), mlp("student", 1)
    x = RNG.standard_normal((6, 5)).astype("float32")
    logs = step(dskd_keras.Distiller(teacher, student, label_weight=0), None, x, None)
    expected = binary_kl(array(teacher(x)), array(student(x)), 4.0).mean()
    assert logs["loss"] == pytest.approx(expected, rel=1e-4) and expected > 1e-4


@pytest.mark.parametrize("soft", [np.eye(3)[[0, 1, 2, 0, 1, 2]], np.full((6, 3), 1 / 3)])
@small.eagerly()
def test_rows_of_probabilities_are_labels(soft):
    teacher, student = mlp("teacher", 3), mlp("student", 3)
    x = RNG.standard_normal((6, 5)).astype("float32")
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    logs = step(dskd_keras.Distiller(teacher, student), loss, x, soft.astype("float32"))
    z = array(student(x))
    smooth = 0.9 * soft + 0.1 / 3
    expected = -(smooth * (z - np.log(np.exp(z).sum(-1, keepdims=True)))).sum(-1).mean()
    assert logs["label_loss"] == pytest.approx(expected, rel=1e-4)
    assert logs["prediction_loss"] == pytest.approx(kl(array(teacher(x)), z, 4.0).mean(), rel=1e-3)


def tagger(name, width, loses=True):
    """Logits [B, T, C] of token ids [B, T]; 0 is padding."""
    inputs = keras.Input((None,), dtype="int32")
    x = layers.Embedding(11, width, mask_zero=True, name="embed")(inputs)
    block = layers.Dense(width, activation="relu", name="block1")(x)
    # Python's + loses Keras's mask.
    x = x + block if loses else layers.Add()([x, block])
    x = layers.LayerNormalization(name="block2")(x)
    return keras.Model(inputs, layers.Dense(3, name="logits")(x), name=name)


def tokens(lengths=(4, 2, 3), padding=0):
    rng = np.random.default_rng(1)
    ids = np.zeros((len(lengths), max(lengths) + padding), "int32")
    labels = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = rng.integers(1, 11, length)
        labels[row, :length] = rng.integers(0, 3, length)
    return ids, labels


@pytest.mark.parametrize("loses", [False, True])
@small.eagerly()
def test_every_valid_position_counts_once(loses):
    teacher, student = tagger("teacher", 7, loses), tagger("student", 4, loses)
    distiller = dskd_keras.Distiller(teacher, student, ["block2"], teacher_layer="block2")
    x, y = tokens()
    logs = step(distiller, SPARSE, x, y)
    valid = x > 0
    p, q = array(teacher(x)), array(student(x))
    expected = kl(p, q, 4.0)[valid].mean()
    assert logs["prediction_loss"] == pytest.approx(expected, rel=1e-3)
    log_q = q - np.log(np.exp(q).sum(-1, keepdims=True))
    crossentropy = -np.take_along_axis(log_q, y[..., None], -1)[..., 0]
    assert logs["label_loss"] == pytest.approx(crossentropy[valid].mean(), rel=1e-4)
    # As Keras has it when it trains or evaluates the student alone.
    if not loses:
        alone = distiller.evaluate(x, y, verbose=0)
        assert alone == pytest.approx(logs["label_loss"], rel=1e-4)
    outputs = distiller(x, training=True)
    difference = (
        array(distiller.teacher(keras.ops.convert_to_tensor(x))["features"])
        - array(outputs.deep_features["block2"])
    ) ** 2
    expected = difference.mean(-1)[valid].mean()
    assert logs["deep_feature_loss/block2"] == pytest.approx(expected, rel=1e-3)


LABEL_OF_PADDING = 2


@pytest.mark.parametrize("what", ["length", "labels", "sample_weight"])
@small.eagerly()
def test_padding_moves_no_number(what):
    teacher, student = tagger("teacher", 7), tagger("student", 4)
    layers_of = ["embed", "block2"]
    distiller = dskd_keras.Distiller(
        teacher, student, layers_of, teacher_layer="block2", weighting="proportional"
    )
    x, y = tokens()
    weight = np.linspace(0.5, 2.0, x.size).reshape(x.shape).astype("float32")
    changed_x, changed_y, changed_weight = x, y.copy(), weight.copy()
    if what == "length":
        changed_x, changed_y = tokens(padding=5)
        changed_weight = np.pad(weight, ((0, 0), (0, 5)))
    elif what == "labels":
        changed_y[x == 0] = LABEL_OF_PADDING
    else:
        changed_weight[x == 0] = 1e3
    before = step(distiller, SPARSE, x, y, sample_weight=weight)
    after = step(distiller, SPARSE, changed_x, changed_y, sample_weight=changed_weight)
    assert set(before) == set(after) and len(before) > 8
    for name, value in before.items():
        assert after[name] == pytest.approx(value, rel=1e-4), name


@pytest.fixture(scope="module")
def tagging():
    teacher, student = tagger("teacher", 7), tagger("student", 4)
    return dskd_keras.Distiller(teacher, student, ["embed", "block2"], teacher_layer="block2")


@pytest.mark.once
@hypothesis.given(
    lengths=strategies.lists(strategies.integers(0, 6), min_size=1, max_size=4),
    padding=strategies.integers(1, 4),
)
@hypothesis.settings(deadline=None, derandomize=True, max_examples=12)
def test_any_padding_gives_the_same_loss(tagging, lengths, padding):
    hypothesis.assume(max(lengths) > 0)
    before = step(tagging, SPARSE, *tokens(lengths))
    after = step(tagging, SPARSE, *tokens(lengths, padding))
    for name, value in before.items():
        assert np.isfinite(value)
        assert after[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@small.eagerly()
def test_padding_that_is_an_input_is_named():
    def model(name, width):
        inputs = {
            "tokens": keras.Input((None, 3), name="tokens"),
            "padding_mask": keras.Input((None,), dtype="int32", name="padding_mask"),
        }
        x = layers.Dense(width, activation="relu", name="block1")(inputs["tokens"])
        weights = keras.ops.expand_dims(keras.ops.cast(inputs["padding_mask"], "float32"), -1)
        pooled = keras.ops.sum(x * weights, 1) / keras.ops.sum(weights, 1)
        return keras.Model(inputs, layers.Dense(3, name="logits")(pooled), name=name)

    distiller = dskd_keras.Distiller(
        model("teacher", 5), model("student", 4), ["block1"], teacher_layer="block1",
        mask="padding_mask",
    )  # fmt: skip
    x = {
        "tokens": RNG.standard_normal((3, 4, 3)).astype("float32"),
        "padding_mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], "int32"),
    }
    y = np.array([0, 1, 2])
    before = step(distiller, SPARSE, x, y)
    x["tokens"] = np.where(x["padding_mask"][..., None] > 0, x["tokens"], 100.0)
    after = step(distiller, SPARSE, x, y)
    for name, value in before.items():
        assert after[name] == pytest.approx(value, rel=1e-4), name
    with pytest.raises(dskd_keras.InputError, match="mask: 'padding' should be a known name"):
        dskd_keras.Distiller(model("t", 5), model("s", 4), ["block1"], mask="padding")


def segmenter(name, width):
    inputs = keras.Input((8, 8, 2))
    x = down = layers.Conv2D(
        width, 3, strides=2, padding="same", activation="relu", name="down",
        data_format="channels_last",
    )(inputs)  # fmt: skip
    x = layers.UpSampling2D(2, name="up", data_format="channels_last")(x)
    x = layers.Conv2D(
        width, 3, padding="same", activation="relu", name="decoder", data_format="channels_last"
    )(x)
    del down
    logits = layers.Conv2D(3, 1, name="logits", data_format="channels_last")(x)
    return keras.Model(inputs, logits, name=name)


@small.eagerly()
def test_segmentation_leaves_ignored_pixels_out():
    teacher, student = segmenter("teacher", 5), segmenter("student", 4)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=255)
    distiller = dskd_keras.Distiller(teacher, student, ["down"])
    assert distiller.teacher_layer == ["down"]
    x = RNG.standard_normal((3, 8, 8, 2)).astype("float32")
    y = RNG.integers(0, 3, (3, 8, 8)).astype("int32")
    ignored = RNG.random((3, 8, 8)) < 0.4
    y[ignored] = 255
    logs = step(distiller, loss, x, y)
    p, q = array(teacher(x)), array(student(x))
    expected = kl(p, q, 4.0)[~ignored].mean()
    assert logs["prediction_loss"] == pytest.approx(expected, rel=1e-3)
    assert logs["label_loss"] == pytest.approx(distiller.evaluate(x, y, verbose=0), rel=1e-4)
    # A head's logits are compared at the outputs' positions.
    deep = array(distiller(x, training=True).deep_logits["down"])
    assert deep.shape == (3, 4, 4, 3)
    expected = kl(p, deep.repeat(2, axis=1).repeat(2, axis=2), 4.0)[~ignored].mean()
    assert logs["deep_prediction_loss/down"] == pytest.approx(expected, rel=1e-3)


@small.eagerly()
def test_images_with_an_ignored_label_count_nowhere():
    teacher, student = mlp("teacher", 3), mlp("student", 3)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    x = RNG.standard_normal((6, 5)).astype("float32")
    y = np.array([0, -1, 2, 1, -1, -1])
    logs = step(dskd_keras.Distiller(teacher, student), loss, x, y)
    kept = y >= 0
    expected = kl(array(teacher(x)), array(student(x)), 4.0)[kept].mean()
    assert logs["prediction_loss"] == pytest.approx(expected, rel=1e-3)
    alone = step(dskd_keras.Distiller(teacher, student), SPARSE, x[kept], y[kept])
    for name, value in alone.items():
        assert logs[name] == pytest.approx(value, rel=1e-3), name


def two_headed(name, width, structure):
    inputs = keras.Input((5,))
    x = layers.Dense(width, activation="relu", name="trunk")(inputs)
    shared = layers.Dense(width, activation="relu", name="block2")(x)
    kind = layers.Dense(3, name="kind")(shared)
    size = layers.Dense(1, name="size")(shared)
    outputs = {"kind": kind, "size": size} if structure == "dict" else [size, kind]
    return keras.Model(inputs, outputs, name=name)


@pytest.mark.parametrize("structure", ["dict", "list"])
@small.eagerly()
def test_one_of_several_outputs_is_distilled_and_the_others_are_trained(structure):
    teacher, student = two_headed("teacher", 7, structure), two_headed("student", 5, structure)
    x = RNG.standard_normal((6, 5)).astype("float32")
    kind, size = RNG.integers(0, 3, 6), RNG.standard_normal((6, 1)).astype("float32")
    is_dict = structure == "dict"
    y = {"kind": kind, "size": size} if is_dict else [size, kind]
    losses = {"kind": SPARSE, "size": "mse"} if is_dict else ["mse", SPARSE]
    distiller = dskd_keras.Distiller(
        teacher, student, ["trunk"], student_output="kind", teacher_output="kind"
    )
    distiller.compile(
        keras.optimizers.SGD(0.0), loss=losses, loss_weights=[1.0, 2.0][:: 1 if is_dict else -1]
        if not is_dict else {"kind": 1.0, "size": 2.0},
        metrics={"kind": ["accuracy"]} if is_dict else [[], ["accuracy"]],
    )  # fmt: skip
    history = distiller.fit(x, y, batch_size=6, validation_data=(x, y), verbose=0).history
    pick = (lambda z: z["kind"]) if is_dict else (lambda z: z[1])
    p, q = array(pick(teacher(x))), array(pick(student(x)))
    assert history["prediction_loss"][0] == pytest.approx(kl(p, q, 4.0).mean(), rel=1e-3)
    # The labels' term is Keras's own loss of all outputs.
    assert history["label_loss"][0] == pytest.approx(history["val_loss"][0], rel=1e-4)
    assert any("accuracy" in name for name in history)
    predicted = distiller.predict(x, verbose=0)
    np.testing.assert_allclose(pick(predicted), q, rtol=1e-4, atol=1e-5)
    with pytest.raises(dskd_keras.InputError, match="student_output: None, but 'student' has 2"):
        dskd_keras.Distiller(teacher, student, teacher_output="kind")
    with pytest.raises(dskd_keras.InputError, match=r"teacher_output: 'kinds' .*Did you mean 'k"):
        dskd_keras.Distiller(teacher, student, student_output="kind", teacher_output="kinds")


@small.eagerly()
def test_the_teachers_classes_are_picked_and_ordered():
    teacher, student = mlp("teacher", 5), mlp("student", 3)
    x = RNG.standard_normal((6, 5)).astype("float32")
    distiller = dskd_keras.Distiller(teacher, student, teacher_classes=[4, 0, 2])
    logs = step(distiller, SPARSE, x, np.zeros(6, int))
    expected = kl(array(teacher(x))[:, [4, 0, 2]], array(student(x)), 4.0).mean()
    assert logs["prediction_loss"] == pytest.approx(expected, rel=1e-3)
    for wrong, message in {
        (4, 0): "'teacher' gives 2 logits, student 'student' 3",
        (4, 0, 5): "teacher_classes: .* should be different whole numbers from 0 to 4",
        (0, 0, 1): "teacher_classes: ",
    }.items():
        with pytest.raises(dskd_keras.InputError, match=message):
            dskd_keras.Distiller(teacher, student, teacher_classes=wrong)


@pytest.mark.parametrize(
    ("outputs", "loss", "settings", "message"),
    [
        (1, SPARSE, {}, "compares classes, but the student gives one logit, so it is always zero"),
        (1, BINARY, {"prediction_loss": "kl_divergence"}, "so it is always zero"),
        (2, "mse", {}, "prediction_loss: None, but the compiled loss 'mse' does not say"),
        (1, lambda y, z: keras.ops.mean((y - z) ** 2, -1), {}, "prediction_loss: None, but the"),
    ],
)
def test_a_divergence_that_means_nothing_is_refused(outputs, loss, settings, message):
    x, y = np.zeros((4, 5), "float32"), np.zeros((4, outputs), "float32")
    with pytest.raises(dskd_keras.InputError, match=message):
        distiller = dskd_keras.Distiller(
            mlp("teacher", outputs), mlp("student", outputs), **settings
        )
        distiller.compile("sgd", loss=loss)
        distiller.fit(x, y, verbose=0)


@small.eagerly()
def test_regression_is_distilled_with_a_loss_that_is_named():
    teacher, student = mlp("teacher", 2), mlp("student", 2)
    x = RNG.standard_normal((6, 5)).astype("float32")
    distiller = dskd_keras.Distiller(
        teacher, student, ["block1"], prediction_loss=keras.losses.MeanSquaredError()
    )
    logs = step(distiller, "mse", x, np.zeros((6, 2), "float32"))
    expected = ((array(teacher(x)) - array(student(x))) ** 2).mean()
    assert logs["prediction_loss"] == pytest.approx(expected, rel=1e-4)


LABELS = [
    (SPARSE, np.eye(3, dtype="float32")[[0, 1, 2, 0]], "takes rows"),
    (keras.losses.CategoricalCrossentropy(from_logits=True), np.array([0, 1, 2, 0]), "takes indic"),
    (BINARY, np.array([0, 1, 1, 0]), r"expects \[B, 3\]"),
]


@pytest.mark.parametrize(("loss", "y", "message"), LABELS)
def test_labels_in_the_shape_of_another_loss(loss, y, message):
    distiller = dskd_keras.Distiller(mlp("teacher", 3), mlp("student", 3))
    distiller.compile("sgd", loss=loss)
    with pytest.raises(dskd_keras.InputError, match=message) as error:
        distiller.fit(np.zeros((4, 5), "float32"), y, verbose=0)
    assert str(error.value).startswith("y: labels of shape") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("loss", "outputs", "bad", "message"),
    [
        (SPARSE, 3, 3, r"y: 2 label\(s\) of the batches so far are outside the 3 classes, 0 to 2"),
        (SPARSE, 3, -1, "outside the 3 classes"),
        (BINARY, 1, 2, "outside 0 to 1"),
    ],
)
def test_labels_of_a_stream_that_no_class_allows(loss, outputs, bad, message):
    def stream():
        while True:
            yield np.ones((4, 5), "float32"), np.array([0, bad, 1, bad])

    distiller = dskd_keras.Distiller(mlp("teacher", outputs), mlp("student", outputs))
    distiller.compile("sgd", loss=loss)
    with pytest.raises(dskd_keras.InputError, match=message) as error:
        distiller.fit(stream(), steps_per_epoch=3, verbose=0)
    assert "\n" not in str(error.value)
    with pytest.raises(dskd_keras.InputError, match=message):
        distiller.train_on_batch(*next(stream()))
    # What was trained is there, and good labels train on.
    assert all(np.isfinite(value).all() for value in distiller.student.get_weights())
    distiller.train_on_batch(np.ones((4, 5), "float32"), np.array([0, 1, 1, 0]))
