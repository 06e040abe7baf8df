"""What a user gets wrong is said in one line, with the argument and the way out."""

import keras
import numpy as np
import pytest
import small

import dskd_keras

X, Y = small.images(8)
ROWS = np.eye(small.CLASSES, dtype="float32")[Y]


@pytest.fixture(scope="module")
def distiller():
    made = dskd_keras.Distiller(small.convnet("teacher"), small.convnet("student"), ["stage1"])
    made.compile("sgd", loss=small.crossentropy(), metrics=["accuracy"])
    return made


def said(action):
    """The error's message, which has to be one line."""
    with pytest.raises(dskd_keras.InputError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def stream(*batch, copies=3):
    return (batch if len(batch) > 1 else batch[0] for _ in range(copies))


def tf_stream(batch):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(batch).batch(4)


CASES = {
    "another size": (
        lambda d: d.fit(X[:, :5], Y, verbose=0),
        "x: a batch of [B, 5, 8, 2], but 'student' takes [B, 8, 8, 2].",
    ),
    "another size in a stream": (lambda d: d.fit(stream(X[:, :5], Y), verbose=0), "x: a batch of"),
    "another size in tf.data": (
        lambda d: d.fit(tf_stream((X[:, :5], Y)), verbose=0), "x: a batch of [B, 5, 8, 2]"
    ),
    "another size to evaluate": (
        lambda d: d.evaluate(X[:, :5], Y, verbose=0), "x: a batch of [B, 5, 8, 2]"
    ),
    "another size to predict": (
        lambda d: d.predict(X[:, :5], verbose=0), "x: a batch of [B, 5, 8, 2]"
    ),
    "another rank": (lambda d: d.fit(X.reshape(8, -1), Y, verbose=0), "x: a batch of [B, 128]"),
    "two inputs": (lambda d: d.fit([X, X], Y, verbose=0), "x: a batch holds 2 tensor(s), but"),
    "dicts of image and label": (
        lambda d: d.fit(tf_stream({"image": X, "label": Y}), verbose=0),
        "x: batches are dicts of image, label, where Keras takes pairs (x, y): dataset.map(lambda "
        "batch: (batch['image'], batch['label'])).",
    ),
    "a dict of arrays": (
        lambda d: d.fit({"image": X, "label": Y}, verbose=0), "x: batches are dicts of image, label"
    ),
    "dicts of a generator": (
        lambda d: d.fit(stream({"image": X, "label": Y}), verbose=0),
        "x: the generator should give tuples (x, y)",
    ),
    "a dict of other keys": (
        lambda d: d.fit({"pixels": X}, Y, verbose=0), "x: a batch is a dict of pixels, but"
    ),
    "no labels": (lambda d: d.fit(X, verbose=0), "y: no labels, but label_weight=1.0 needs them."),
    "class weights of no classes": (
        lambda d: d.fit(X, class_weight={0: 1.0}, verbose=0),
        "class_weight: given, but y is None",
    ),
    "rows": (
        lambda d: d.fit(X, ROWS, verbose=0),
        "y: labels of shape [B, 3], but the compiled loss 'sparse_categorical_crossentropy' "
        "expects [B] for logits [B, 3]; keras.losses.CategoricalCrossentropy(from_logits=True) "
        "takes rows.",
    ),
    "rows in a stream": (lambda d: d.fit(stream(X, ROWS), verbose=0), "y: labels of shape [B, 3]"),
    "rows in tf.data": (
        lambda d: d.fit(tf_stream((X, ROWS)), verbose=0), "y: labels of shape [B, 3]"
    ),
    "rows for validation": (
        lambda d: d.fit(X, Y, validation_data=(X, ROWS), verbose=0), "y: labels of shape [B, 3]"
    ),
    "labels outside in tf.data": (
        lambda d: d.fit(tf_stream((X, Y + 9)), verbose=0), "y: 4 label(s) of the batches so far"
    ),
    "labels outside for validation": (
        lambda d: d.fit(X, Y, validation_data=(X, Y + 9), verbose=0),
        "y: 8 label(s) of the batches so far are outside the 3 classes, 0 to 2.",
    ),
    "labels outside to evaluate": (
        lambda d: d.evaluate(X, Y - 9, verbose=0), "y: 8 label(s) of the batches so far"
    ),
    "weights of more than images": (
        lambda d: d.fit(X, Y, sample_weight=np.ones((8, 3)), verbose=0),
        "sample_weight: shape (8, 3) should be [B], one weight an image.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@small.eagerly()
def test_data_that_can_not_be_used(case, distiller):
    action, message = CASES[case]
    before = distiller.student.get_weights()
    assert said(lambda: action(distiller)).startswith(message)
    # The distiller is none the worse for it. Some mistakes show in a step, or after it.
    if "size" in case or "evaluate" in case:
        small.assert_same_bits(before, distiller.student.get_weights())
    logs = distiller.train_on_batch(X, Y, return_dict=True)
    assert all(np.isfinite(float(value)) for value in logs.values())


@pytest.mark.parametrize("train", ["fit", "train_on_batch"])
def test_compile_was_not_called(train):
    made = dskd_keras.Distiller(small.convnet("teacher"), small.convnet("student"))
    assert said(lambda: getattr(made, train)(X, Y)).startswith("compile: not called. Call")


class WithoutKeywords(dskd_keras.weighting.Weighting):
    def __init__(self):
        super().__init__()

    def call(self, losses):
        return losses / keras.ops.sum(losses)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            lambda s: {"student_layers": [s.get_layer("stage1")]},
            "student_layers: a ReLU layer, where its name, 'stage1', is expected",
        ),
        (lambda s: {"student_layers": s.get_layer("stage1")}, "student_layers: a ReLU layer"),
        (lambda s: {"student_layers": 3}, "student_layers: 3 should be a list of names"),
        (lambda s: {"student_layers": [3]}, "student_layers: 3 should be the name of a layer"),
        (lambda s: {"teacher_layer": s.get_layer("stage1")}, "teacher_layer: a ReLU layer"),
        (lambda s: {"weighting": WithoutKeywords()}, "weighting: WithoutKeywords can't be made"),
    ],
)
def test_arguments_that_can_not_be_used(options, message):
    student = small.convnet("student")
    settings = {"student_layers": ["stage1"], **options(student)}
    made = lambda: dskd_keras.Distiller(small.convnet("teacher"), student, **settings)  # noqa: E731
    assert said(made).startswith(message)


@small.eagerly()
def test_a_subclassed_model_within_a_functional_one_is_a_layer():
    class Sub(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.dense = keras.layers.Dense(small.CLASSES)

        def call(self, x):
            return self.dense(keras.ops.mean(x, axis=(1, 2)))

    inputs = keras.Input((8, 8, 2))
    teacher = keras.Model(inputs, Sub(name="sub")(inputs), name="teacher")
    made = dskd_keras.Distiller(teacher, small.convnet("student"))
    made.compile("sgd", loss=small.crossentropy())
    assert np.isfinite(made.train_on_batch(X, Y)[0])
    message = said(
        lambda: dskd_keras.Distiller(
            teacher, small.convnet("student"), ["stage1"], teacher_layer="sub/dense"
        )
    )
    assert "has no graph of layers" in message
