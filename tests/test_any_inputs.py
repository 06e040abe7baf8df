"""Teachers and students with inputs of their own, and teachers that are no functional models."""

import keras
import numpy as np
import pytest
import small
from keras import layers

import dskd_keras

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(0)


def array(x):
    return np.asarray(keras.ops.convert_to_numpy(x), "float64")


def kl(p, q, tau=4.0):
    log_p, log_q = (z / tau - np.log(np.exp(z / tau).sum(-1, keepdims=True)) for z in (p, q))
    return tau**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1)


def train_one(distiller, x, y, **options):
    distiller.compile(keras.optimizers.SGD(0.0), loss=small.crossentropy())
    logs = distiller.train_on_batch(x, y, return_dict=True, **options)
    return {name: float(value) for name, value in logs.items()}


def halved(x):
    return x[:, ::2, ::2] * 2.0


def preprocessing():
    inputs = keras.Input((8, 8, 2))
    x = layers.Normalization(mean=[0.1, 0.2], variance=[0.5, 0.7], name="norm")(inputs)
    return keras.Model(inputs, layers.Resizing(16, 16)(x), name="preprocessing")


@pytest.mark.parametrize("how", ["function", "model"])
def test_a_teacher_has_inputs_of_its_own(how, tmp_path):
    size = 4 if how == "function" else 16
    inputs = halved if how == "function" else preprocessing()
    teacher, student = (
        small.convnet("teacher", size=size),
        small.convnet("student", batch_norm=False),
    )
    x, y = small.images(6)
    distiller = dskd_keras.Distiller(teacher, student, ["stage1"], teacher_inputs=inputs)
    logs = train_one(distiller, x, y)
    of_teacher = array(teacher(inputs(keras.ops.convert_to_tensor(x))))
    assert logs["prediction_loss"] == pytest.approx(
        kl(of_teacher, array(student(x))).mean(), rel=1e-3
    )
    # In fit too, where JAX takes all values out of the variables; and computed beforehand.
    targets = distiller.targets(x, y)
    np.testing.assert_allclose(targets.teacher["logits"], of_teacher, rtol=1e-3, atol=1e-5)
    history = distiller.fit(x, y, batch_size=6, verbose=0).history
    assert history["prediction_loss"][0] == pytest.approx(logs["prediction_loss"], rel=1e-3)
    if how == "model":
        distiller.save(tmp_path / "distiller.keras")
        loaded = keras.models.load_model(tmp_path / "distiller.keras")
        again = loaded.targets(x, y)
        np.testing.assert_allclose(again.teacher["logits"], targets.teacher["logits"], rtol=1e-4)


def test_inputs_that_differ_name_the_way_out():
    student = small.convnet("student", batch_norm=False)
    with pytest.raises(dskd_keras.InputError, match=r"takes \(16, 16, 2\).*give teacher_inputs"):
        dskd_keras.Distiller(small.convnet("teacher", size=16), student)
    with pytest.raises(dskd_keras.InputError, match="teacher_inputs: 3 should be a function of a"):
        dskd_keras.Distiller(small.convnet("teacher", size=16), student, teacher_inputs=3)
    distiller = dskd_keras.Distiller(
        small.convnet("teacher", size=16), student, teacher_inputs=halved
    )
    distiller.compile("sgd", loss=small.crossentropy())
    with pytest.raises(dskd_keras.InputError) as error:
        distiller.fit(*small.images(4), verbose=0)
    assert str(error.value).startswith("teacher_inputs: a batch of [B, 4, 4, 2], but 'teacher")


def reader(name, key, width):
    inputs = {key: keras.Input((4,), dtype="int32", name=key)}
    x = layers.Embedding(20, width, name="block1")(inputs[key])
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(3, name="logits")(x), name=name)


@small.eagerly()
def test_a_batch_may_hold_the_ids_of_two_tokenizers():
    teacher, student = reader("teacher", "long", 6), reader("student", "short", 4)
    x = {key: RNG.integers(0, 20, (6, 4)).astype("int32") for key in ("long", "short")}
    y = RNG.integers(0, 3, 6)
    with pytest.raises(dskd_keras.InputError, match="takes 'long', student 'student' 'short'"):
        dskd_keras.Distiller(teacher, student)
    distiller = dskd_keras.Distiller(
        teacher, student, ["block1"], teacher_inputs=lambda batch: {"long": batch["long"]}
    )
    logs = train_one(distiller, x, y)
    expected = kl(array(teacher({"long": x["long"]})), array(student({"short": x["short"]})))
    assert logs["prediction_loss"] == pytest.approx(expected.mean(), rel=1e-3)
    # Once trained, the student's own input is enough.
    predicted = distiller.predict({"short": x["short"]}, verbose=0)
    np.testing.assert_allclose(predicted, distiller.predict(x, verbose=0), rtol=1e-5)


@small.eagerly()
def test_of_a_tuple_the_student_takes_the_first():
    teacher, student = small.convnet("teacher", size=16), small.convnet("student", batch_norm=False)
    x, y = small.images(6)
    large = RNG.standard_normal((6, 16, 16, 2)).astype("float32")
    distiller = dskd_keras.Distiller(
        teacher, student, ["stage1"], teacher_inputs=lambda batch: batch[1]
    )
    logs = train_one(distiller, (x, large), y)
    expected = kl(array(teacher(large)), array(student(x))).mean()
    assert logs["prediction_loss"] == pytest.approx(expected, rel=1e-3)
    assert distiller.predict(x, verbose=0).shape == (6, 3)


def fully_convolutional(name, width, stride=1):
    inputs = keras.Input((None, None, 2))
    x = layers.Conv2D(
        width, 3, strides=stride, padding="same", activation="relu", name="stage1",
        data_format="channels_last",
    )(inputs)  # fmt: skip
    x = layers.Conv2D(
        width, 3, strides=2, padding="same", activation="relu", name="stage2",
        data_format="channels_last",
    )(x)  # fmt: skip
    x = layers.GlobalAveragePooling2D(data_format="channels_last")(x)
    return keras.Model(inputs, layers.Dense(3, name="logits")(x), name=name)


@pytest.fixture
def of_any_size():
    teacher = fully_convolutional("teacher", 5, stride=2)
    student = fully_convolutional("student", 4)
    distiller = dskd_keras.Distiller(teacher, student, ["stage1", "stage2"])
    distiller.compile(keras.optimizers.SGD(0.0), loss=small.crossentropy())
    return distiller


@small.eagerly()
def test_sizes_that_are_not_known_before_it_runs(of_any_size):
    for size in (8, 12):
        x = RNG.standard_normal((4, size, size, 2)).astype("float32")
        y = np.array([0, 1, 2, 0])
        logs = of_any_size.train_on_batch(x, y, return_dict=True)
        assert all(np.isfinite(float(value)) for value in logs.values())


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the others know the sizes when they run")
def test_sizes_that_a_compiled_step_does_not_know(of_any_size):
    """A stream says no sizes, so that there is one program for all of them."""
    import tensorflow as tf

    stream = tf.data.Dataset.from_generator(
        lambda: (
            (RNG.standard_normal((4, n, n, 2)).astype("float32"), np.array([0, 1, 2, 0]))
            for n in (8, 12, 10)
        ),
        output_signature=(
            tf.TensorSpec((None, None, None, 2)), tf.TensorSpec((None,), tf.int64)
        ),
    )  # fmt: skip
    history = of_any_size.fit(stream, verbose=0).history
    assert all(np.isfinite(values).all() for values in history.values())


@small.eagerly()
def test_an_unknown_size_gives_the_numbers_of_a_known_one():
    """The teacher's map has half the student's size on each axis."""
    teacher = fully_convolutional("teacher", 5, stride=2)
    student = fully_convolutional("student", 4)
    distiller = dskd_keras.Distiller(teacher, student, ["stage2"], label_weight=0)
    distiller.compile(keras.optimizers.SGD(0.0))
    x = RNG.standard_normal((4, 8, 8, 2)).astype("float32")
    features = array(distiller.teacher(keras.ops.convert_to_tensor(x))["features"])
    projected = array(distiller(x, training=True).deep_features["stage2"])
    assert features.shape[1] == 2 and projected.shape[1] == 4
    pooled = projected.reshape(4, 2, 2, 2, 2, 5).mean((2, 4))
    logs = distiller.train_on_batch(x, return_dict=True)
    assert float(logs["deep_feature_loss/stage2"]) == pytest.approx(
        ((features - pooled) ** 2).mean(), rel=1e-3
    )


def volume(name, width):
    inputs = keras.Input((4, 4, 4, 1))
    x = layers.Conv3D(
        width, 3, padding="same", activation="relu", name="stage1", data_format="channels_last"
    )(inputs)
    x = layers.Conv3D(
        width, 3, strides=2, padding="same", activation="relu", name="stage2",
        data_format="channels_last",
    )(x)  # fmt: skip
    x = layers.GlobalAveragePooling3D(data_format="channels_last")(x)
    return keras.Model(inputs, layers.Dense(3, name="logits")(x), name=name)


@small.eagerly()
def test_volumes_are_supervised():
    teacher, student = volume("teacher", 5), volume("student", 3)
    distiller = dskd_keras.Distiller(teacher, student, ["stage1", "stage2"])
    assert distiller.teacher_layer == ["stage1", "stage2"]
    x = RNG.standard_normal((4, 4, 4, 4, 1)).astype("float32")
    logs = train_one(distiller, x, np.array([0, 1, 2, 0]))
    outputs = distiller(x, training=True)
    of_teacher = distiller.teacher(keras.ops.convert_to_tensor(x))
    for layer, size in (("stage1", 4), ("stage2", 2)):
        features = array(of_teacher[f"features/{layer}"])
        projected = array(outputs.deep_features[layer])
        assert projected.shape == features.shape == (4, size, size, size, 5)
        expected = ((features - projected) ** 2).mean()
        assert logs[f"deep_feature_loss/{layer}"] == pytest.approx(expected, rel=1e-3)


class Sub(keras.Model):
    """Subclassed: Keras sees none of its layers' outputs."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.first = layers.Dense(width, activation="relu")
        self.second = layers.Dense(3)

    def call(self, x):
        hidden = self.first(x)
        return {"logits": self.second(hidden), "hidden": hidden}


def dense(name, width=4):
    inputs = keras.Input((5,))
    x = layers.Dense(width, activation="relu", name="block1")(inputs)
    return keras.Model(inputs, layers.Dense(3, name="logits")(x), name=name)


@pytest.mark.parametrize("how", ["model", "function"])
def test_any_function_teaches(how):
    sub = Sub(6)
    x = RNG.standard_normal((6, 5)).astype("float32")
    y = RNG.integers(0, 3, 6)
    expected = sub(x)
    call = sub if how == "model" else lambda batch: sub(batch)
    teacher = dskd_keras.Teacher(call, logits="logits", features="hidden")
    student = dense("student")
    distiller = dskd_keras.Distiller(teacher, student, ["block1"])
    logs = train_one(distiller, x, y)
    assert logs["prediction_loss"] == pytest.approx(
        kl(array(expected["logits"]), array(student(x))).mean(), rel=1e-3
    )
    projected = array(distiller(x, training=True).deep_features["block1"])
    assert logs["deep_feature_loss/block1"] == pytest.approx(
        ((array(expected["hidden"]) - projected) ** 2).mean(), rel=1e-3
    )
    before = sub.get_weights()
    history = distiller.fit(x, y, batch_size=6, verbose=0).history
    assert history["prediction_loss"][0] == pytest.approx(logs["prediction_loss"], rel=1e-3)
    small.assert_same_bits(before, sub.get_weights())
    with pytest.raises(dskd_keras.InputError, match=r"which can't be saved. Save the student"):
        distiller.get_config()


@small.eagerly()
def test_what_of_its_result_teaches():
    student = dense("student")
    x = RNG.standard_normal((6, 5)).astype("float32")
    by_index = dskd_keras.Teacher(lambda x: (x, x[:, :3]), logits=1)
    logs = train_one(dskd_keras.Distiller(by_index, student), x, np.zeros(6, int))
    assert logs["prediction_loss"] == pytest.approx(
        kl(x[:, :3].astype("float64"), array(student(x))).mean(), rel=1e-3
    )
    whole = dskd_keras.Teacher(lambda x: x[:, :3])
    assert train_one(dskd_keras.Distiller(whole, student), x, np.zeros(6, int)) == pytest.approx(
        logs, rel=1e-5
    )
    # Without feature maps the heads still have predictions to learn.
    deep = dskd_keras.Distiller(whole, student, ["block1"], deep_feature_weight=0)
    assert "deep_prediction_loss/block1" in train_one(deep, x, np.zeros(6, int))
    cases = {
        "without features, which deep_feature": {"teacher": whole, "student_layers": ["block1"]},
        "logits='z', but its result holds": {
            "teacher": dskd_keras.Teacher(lambda x: {"a": x}, logits="z")
        },
        "'Teacher' gives 5 logits, student 'student' 3": {"teacher": dskd_keras.Teacher(abs)},
        "teacher: 3 should be a function": {"teacher": lambda: dskd_keras.Teacher(3)},
    }
    for message, options in cases.items():
        with pytest.raises(dskd_keras.InputError, match=message):
            if not isinstance(options["teacher"], dskd_keras.Teacher):
                options["teacher"]()
            dskd_keras.Distiller(student=student, **options)


@small.eagerly()
def test_a_subclassed_student_gives_its_maps_by_name(tmp_path):
    inputs = keras.Input((5,))
    student = keras.Model(inputs, Sub(4, name="sub")(inputs), name="student")
    teacher = dense("teacher", 6)
    distiller = dskd_keras.Distiller(
        teacher, student, ["sub:hidden"], student_output="logits", teacher_layer="block1"
    )
    x = RNG.standard_normal((6, 5)).astype("float32")
    distiller.compile(
        keras.optimizers.SGD(0.1), loss={"logits": small.crossentropy(), "hidden": None}
    )
    before = student.get_weights()
    logs = distiller.train_on_batch(x, {"logits": np.zeros(6, int)}, return_dict=True)
    assert "deep_feature_loss/sub:hidden" in logs
    assert all((a != b).any() for a, b in zip(before, student.get_weights(), strict=True))
    sub = Sub(4)
    sub(x)
    with pytest.raises(dskd_keras.InputError, match=r"has no graph of layers: wrap it"):
        dskd_keras.Distiller(teacher, sub)
    with pytest.raises(dskd_keras.InputError, match=r"or let it teach as dskd_keras.Teacher"):
        dskd_keras.Distiller(sub, dense("student"))


@pytest.mark.parametrize("weighting", ["uniform", [3.0, 1.0], "confidence"])
@small.eagerly()
def test_several_teachers(weighting, tmp_path):
    teachers = [small.convnet(f"teacher{n}", width=3 + n) for n in range(2)]
    student = small.convnet("student", batch_norm=False)
    distiller = dskd_keras.Distiller(
        teachers, student, ["stage1"], None, teacher_weighting=weighting
    )
    x, y = small.images(6)
    logs = train_one(distiller, x, y)
    student_logits = array(student(x))
    of_each = [array(teacher(x)) for teacher in teachers]
    if weighting == "confidence":
        wrong = [-(z - np.log(np.exp(z).sum(-1, keepdims=True)))[np.arange(6), y] for z in of_each]
        weights = 1 - np.exp(wrong) / np.exp(wrong).sum(0)
    else:
        weights = np.array([0.5, 0.5] if weighting == "uniform" else [0.75, 0.25])[:, None]
    losses = np.array([kl(z, student_logits) for z in of_each])
    assert logs["prediction_loss"] == pytest.approx((weights * losses).sum(0).mean(), rel=1e-3)
    assert distiller.teacher.feature_shape == (4, 4, 6 + 8)
    if weighting != "confidence":
        # The joint map's loss is the weighted sum of the single ones'.
        features = array(distiller.teacher(keras.ops.convert_to_tensor(x))["features"])
        projected = array(distiller(x, training=True).deep_features["stage1"])
        scales = np.sqrt(weights[:, 0] * 14 / [6, 8])
        parts = [(slice(0, 6), scales[0]), (slice(6, 14), scales[1])]
        expected = sum(
            weight * ((features[..., part] / scale - projected[..., part] / scale) ** 2).mean()
            for weight, (part, scale) in zip(weights[:, 0], parts, strict=True)
        )
        assert logs["deep_feature_loss/stage1"] == pytest.approx(expected, rel=1e-3)
    distiller.save(tmp_path / "distiller.keras")
    loaded = keras.models.load_model(tmp_path / "distiller.keras")
    for a, b in zip(distiller.targets(x).teacher.values(), loaded.targets(x).teacher.values(),
                    strict=True):  # fmt: skip
        np.testing.assert_allclose(a, b, rtol=1e-5)
    history = distiller.fit(x, y, batch_size=6, verbose=0).history
    assert history["prediction_loss"][0] == pytest.approx(logs["prediction_loss"], rel=1e-3)


def test_wrong_teacher_weightings():
    teachers = [small.convnet(f"teacher{n}") for n in range(2)]
    student = small.convnet("student", batch_norm=False)
    for weighting in ("confidense", [1.0], [0.0, 0.0], [1.0, -1.0], 3):
        with pytest.raises(dskd_keras.InputError, match="teacher_weighting"):
            dskd_keras.Distiller(teachers, student, teacher_weighting=weighting)
    distiller = dskd_keras.Distiller(
        teachers, student, teacher_weighting="confidence", label_weight=0
    )
    distiller.compile("sgd")
    with pytest.raises(dskd_keras.InputError, match="'confidence' needs labels"):
        distiller.fit(small.images(4)[0], verbose=0)


@small.eagerly()
def test_each_layer_may_follow_a_layer_of_its_own():
    teacher, student = small.convnet("teacher", width=5), small.convnet("student", batch_norm=False)
    distiller = dskd_keras.Distiller(
        teacher, student, ["stage1", "stage2"], teacher_layer=["stage1", "stage2"]
    )
    x, y = small.images(6)
    logs = train_one(distiller, x, y)
    maps = distiller.teacher(keras.ops.convert_to_tensor(x))
    projected = distiller(x, training=True).deep_features
    for layer, shape in {"stage1": (6, 8, 8, 5), "stage2": (6, 4, 4, 10)}.items():
        of_teacher = array(maps[f"features/{layer}"])
        assert of_teacher.shape == projected[layer].shape == shape
        expected = ((of_teacher - array(projected[layer])) ** 2).mean()
        assert logs[f"deep_feature_loss/{layer}"] == pytest.approx(expected, rel=1e-3)
    targets = distiller.targets(x, y)
    again = distiller.fit(x, targets, batch_size=6, verbose=0).history
    assert again["loss"][0] == pytest.approx(logs["loss"], rel=1e-3)
    with pytest.raises(dskd_keras.InputError, match="a list of 2, one for each student layer"):
        dskd_keras.Distiller(teacher, student, ["stage1", "stage2"], teacher_layer=["stage1"])


@pytest.mark.skipif(BACKEND != "tensorflow", reason="strings are TensorFlow's")
def test_text_is_vectorised_within_the_models():
    def classifier(name, width):
        vectorise = layers.TextVectorization(output_sequence_length=4, name="words")
        vectorise.adapt(["a b c d", "b c d e"])
        inputs = keras.Input((), dtype="string")
        x = layers.Embedding(10, width, mask_zero=True, name="block1")(vectorise(inputs))
        x = layers.GlobalAveragePooling1D()(x)
        return keras.Model(inputs, layers.Dense(3, name="logits")(x), name=name)

    import tensorflow as tf

    distiller = dskd_keras.Distiller(
        classifier("teacher", 6), classifier("student", 4), ["block1"], teacher_layer="block1"
    )
    distiller.compile("sgd", loss=small.crossentropy(), metrics=["accuracy"])
    text = tf.constant(["a b", "c d e", "e", "a"])
    history = distiller.fit(text, np.array([0, 1, 2, 0]), verbose=0).history
    assert all(np.isfinite(values).all() for values in history.values())


@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow takes them")
def test_strings_are_refused_elsewhere():
    inputs = keras.Input((), dtype="string", name="text")
    x = layers.Lambda(lambda x: x, output_shape=(3,), dtype="float32")(inputs)
    model = keras.Model(inputs, x)
    with pytest.raises(dskd_keras.InputError, match=r"'text' .* takes strings, which only Tens"):
        dskd_keras.Distiller(small.convnet("teacher"), model)
