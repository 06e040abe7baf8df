"""Models that others wrote, of keras.applications and KerasHub, as teachers and as students."""

import keras
import numpy as np
import pytest
import small
from keras import layers

import dskd_keras
from dskd_keras.graph import auto_teacher_layers, default_teacher_layer

CLASSES = small.CLASSES
SHALLOW = {
    "mobilenet": ["block_1_expand_relu", "block_3_expand_relu", "block_6_expand_relu"],
    "efficientnet": ["block1a_project_activation", "block2b_add", "block4a_expand_activation"],
}
# At 32 × 32 the last stage has one position, and so no map; at 64 × 64 it has four.
LAST_MAP = {
    ("mobilenet", 32): "block_13_expand_relu",
    ("efficientnet", 32): "block6a_expand_activation",
    ("mobilenet", 64): "out_relu",
    ("efficientnet", 64): "top_activation",
}


def array(x):
    return np.asarray(keras.ops.convert_to_numpy(x), "float64")


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q, tau=4.0):
    log_p, log_q = (z / tau - np.log(np.exp(z / tau).sum(-1, keepdims=True)) for z in (p, q))
    return tau**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1)


def published(family, size=32, **options):
    """A model of keras.applications as it comes: it ends in a softmax, unless options say else."""
    options = {"weights": None, "input_shape": (size, size, 3), **options}
    if options.get("include_top", True):
        options["classes"] = CLASSES
    if family == "mobilenet":
        return keras.applications.MobileNetV2(alpha=0.35, **options)
    return keras.applications.EfficientNetV2B0(**options)


def behind_preprocessing(family="mobilenet", **options):
    """A whole classifier of images 32 × 32 that enlarges and scales them first."""
    inputs = keras.Input((32, 32, 3))
    x = layers.Rescaling(1 / 127.5, offset=-1)(layers.Resizing(64, 64)(inputs))
    return keras.Model(inputs, published(family, 64, **options)(x), name="whole")


def under_a_new_head(family="mobilenet"):
    """A headless model, nested under a classifier of its own."""
    inputs = keras.Input((64, 64, 3))
    x = published(family, 64, include_top=False)(layers.Rescaling(1 / 255)(inputs))
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(CLASSES, name="logits")(x), name="whole")


def nested(model):
    """The name of the only nested model."""
    (name,) = (layer.name for layer in model.layers if isinstance(layer, keras.Model))
    return name


def all_layers(model):
    for layer in model.layers:
        yield from all_layers(layer) if isinstance(layer, keras.Model) else [layer]


def run(model, x):
    # Keras takes training=True from the first Resizing on, where nothing else is said.
    return array(model(x, training=False))


def calibrate(model, x):
    """Gives the batch norms statistics of these images: those of a new model make all alike."""
    norms = [layer for layer in all_layers(model) if isinstance(layer, layers.BatchNormalization)]
    assert len(norms) > 40
    for norm in norms:
        norm.gamma.assign(keras.random.uniform(norm.gamma.shape, 0.5, 1.5))
        norm.beta.assign(keras.random.uniform(norm.beta.shape, -0.2, 0.2))
        norm.momentum = 0.0
    for layer in all_layers(model):
        if isinstance(layer, layers.Dropout):  # of whole branches: the statistics would be others
            layer.rate = 0.0
    model(x, training=True)
    assert run(model, x).std(0).max() > 0.05


def photos(count=4, size=32):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (count, size, size, 3)).astype("float32")
    return x, np.arange(count) % CLASSES


def train(distiller, x, y):
    """One step: its terms are finite, all weights learn, and the teacher keeps its bits."""
    if not distiller.compiled:
        distiller.compile(keras.optimizers.SGD(1.0), loss=small.crossentropy())
    # Keras makes copies for JAX's step and writes them back after it: `fit` does both.
    before = small.values(distiller.trainable_variables)
    of_teacher = small.values(distiller.teacher.model.variables)
    history = distiller.fit(x, y, batch_size=len(y), verbose=0).history
    logs = {name: value for name, (value,) in history.items()}
    assert {"loss", "label_loss", *distiller.term_names} <= logs.keys()
    assert all(np.isfinite(value) for value in logs.values()), logs
    unchanged = [
        variable.path
        for variable, old in zip(distiller.trainable_variables, before, strict=True)
        # Attention is the same whatever is added to all keys: their bias has no gradient.
        if (old == keras.ops.convert_to_numpy(variable)).all()
        and not variable.path.endswith("key/bias")
    ]
    assert not unchanged
    small.assert_same_bits(of_teacher, small.values(distiller.teacher.model.variables))
    return logs


@pytest.mark.skipif(
    keras.backend.backend() == "jax",
    reason="it compiles for a minute; a pair of KerasHub is trained there",
)
@pytest.mark.parametrize(
    ("of_teacher", "of_student"),
    [
        ("efficientnet", "mobilenet"),
        pytest.param("mobilenet", "efficientnet", marks=pytest.mark.once),
    ],
)
@small.eagerly()
def test_two_families_of_keras_applications(of_teacher, of_student):
    teacher = published(of_teacher, classifier_activation=None)
    student = dskd_keras.as_logits(published(of_student))
    distiller = dskd_keras.Distiller(teacher, student, "auto")
    assert distiller.teacher_layer == [*SHALLOW[of_teacher], LAST_MAP[of_teacher, 32]]
    assert list(distiller.student_layers) == [*SHALLOW[of_student], LAST_MAP[of_student, 32]]
    x, y = photos()
    # Before the step: it changes the student.
    expected = kl(array(teacher(x, training=False)), array(student(x, training=True)))
    logs = train(distiller, x, y)
    if of_student == "efficientnet":
        return  # it drops connections at random
    assert logs["prediction_loss"] == pytest.approx(expected.mean(), rel=0.05)


@pytest.mark.once
@pytest.mark.parametrize("family", ["mobilenet", "efficientnet"])
def test_the_softmax_of_a_classifier_is_taken_off(family):
    model, other = published(family), small.convnet("other", size=32, channels=3)
    with pytest.raises(dskd_keras.InputError, match=r"Take dskd_keras.as_logits\(teacher\)"):
        dskd_keras.Distiller(model, other)
    with pytest.raises(dskd_keras.InputError, match=r"Take dskd_keras.as_logits\(student\)"):
        dskd_keras.Distiller(other, model)
    x, _ = photos()
    calibrate(model, x)
    logits = run(dskd_keras.as_logits(model), x)
    np.testing.assert_allclose(softmax(logits), run(model, x), rtol=1e-3, atol=1e-6)
    assert (logits < 0).any()


@pytest.mark.once
def test_a_whole_classifier_behind_preprocessing():
    model = behind_preprocessing()
    inside = nested(model)
    with pytest.raises(dskd_keras.InputError, match=rf"layer '{inside}/predictions'"):
        dskd_keras.Distiller(model, behind_preprocessing(classifier_activation=None))
    x, y = photos()
    calibrate(model, x)
    teacher, student = dskd_keras.as_logits(model), dskd_keras.as_logits(model)
    np.testing.assert_allclose(softmax(run(teacher, x)), run(model, x), rtol=1e-3, atol=1e-6)
    distiller = dskd_keras.Distiller(teacher, student, "auto")
    # Neither the enlarged image nor a padded one.
    assert list(distiller.student_layers) == distiller.teacher_layer
    assert [shape[:2] for shape in distiller.teacher.feature_shapes.values()] == [
        (size, size) for size in (32, 16, 8, 4, 2)
    ]
    ends = (*SHALLOW["mobilenet"], LAST_MAP["mobilenet", 32], LAST_MAP["mobilenet", 64])
    assert distiller.teacher_layer == [f"{inside}/{layer}" for layer in ends]
    train(distiller, x, y)


@pytest.mark.once
def test_a_headless_backbone_under_a_new_head():
    teacher, student = under_a_new_head("efficientnet"), under_a_new_head()
    distiller = dskd_keras.Distiller(teacher, student, "auto")
    # What the nested model gives has the nested model's name.
    *shallow, last = distiller.teacher_layer
    ends = (*SHALLOW["efficientnet"], LAST_MAP["efficientnet", 32])
    assert shallow == [f"{nested(teacher)}/{layer}" for layer in ends]
    assert last == nested(teacher)
    shape = (None, *distiller.teacher.feature_shapes[f"features/{last}"])
    assert shape == teacher.get_layer("pool").input.shape
    ends = (*SHALLOW["mobilenet"], LAST_MAP["mobilenet", 32])
    of_student = [f"{nested(student)}/{layer}" for layer in ends]
    assert list(distiller.student_layers) == [*of_student, nested(student)]
    train(distiller, *photos(size=64))


@pytest.mark.once
@pytest.mark.parametrize(
    ("build", "arguments"),
    [
        # With statistics of few positions, at 32 × 32, rounding errors grow a million times.
        (published, ("efficientnet", 64)),
        (behind_preprocessing, ("mobilenet",)),
        (under_a_new_head, ("mobilenet",)),
    ],
)
def test_the_batch_norms_of_a_family_are_folded(build, arguments):
    model = build(*arguments)
    x, _ = photos(size=model.input.shape[1])
    calibrate(model, x)
    folded = dskd_keras.fold_batch_norm(model)
    assert not any(isinstance(layer, layers.BatchNormalization) for layer in all_layers(folded))
    np.testing.assert_allclose(run(folded, x), run(model, x), rtol=1e-2, atol=1e-4)
    assert default_teacher_layer(folded) == default_teacher_layer(model)
    assert auto_teacher_layers(folded) == auto_teacher_layers(model)


def bert(name, hub, width, as_backbone):
    backbone = hub.models.BertBackbone(
        vocabulary_size=50, num_layers=2, num_heads=2, hidden_dim=width,
        intermediate_dim=2 * width, max_sequence_length=12, dropout=0.0, name=f"{name}_bert",
    )  # fmt: skip
    if not as_backbone:
        return hub.models.BertTextClassifier(backbone, CLASSES, dropout=0.0, name=name)
    inputs = {
        key: keras.Input((None,), dtype="int32", name=key)
        for key in ("token_ids", "segment_ids", "padding_mask")
    }
    logits = layers.Dense(CLASSES, name="logits")(backbone(inputs)["pooled_output"])
    return keras.Model(inputs, logits, name=name)


def text(padding=0, filler=0):
    rng = np.random.default_rng(0)
    mask = np.array([[1] * 6, [1] * 4 + [0] * 2, [1] * 3 + [0] * 3], "int32")
    ids = np.where(mask > 0, rng.integers(1, 50, mask.shape), filler).astype("int32")
    ids, mask = (np.pad(x, ((0, 0), (0, padding))) for x in (ids, mask))
    x = {"token_ids": ids, "segment_ids": np.zeros_like(ids), "padding_mask": mask}
    return x, np.array([0, 1, 2])


def steps_terms(distiller, x, y):
    """The terms of one step alone: what train_on_batch returns are means over all of them."""
    distiller.train_on_batch(x, y)
    return distiller.step_terms()


@pytest.mark.parametrize(
    "as_backbone",
    [True, pytest.param(False, marks=pytest.mark.once)],
    ids=["backbone", "task"],
)
@small.eagerly()
def test_a_pair_of_kerashub(as_backbone):
    hub = pytest.importorskip("keras_hub")
    teacher, student = (
        bert(name, hub, width, as_backbone) for name, width in (("teacher", 12), ("student", 8))
    )
    # A task of KerasHub is a functional model with its backbone nested in it.
    distiller = dskd_keras.Distiller(
        teacher,
        student,
        [f"{student_name(student)}/transformer_layer_0"],
        teacher_layer=f"{student_name(teacher)}/transformer_layer_1",
        mask="padding_mask",
    )
    x, y = text()
    distiller.compile(keras.optimizers.SGD(0.0), loss=small.crossentropy())
    # JAX would compile another length anew.
    length = 0 if keras.backend.backend() == "jax" else 3
    before, *changed = (
        steps_terms(distiller, *batch)
        for batch in ((x, y), text(filler=7), text(padding=length, filler=5))
    )
    for terms in changed:
        assert terms == pytest.approx(before, rel=1e-4)
    distiller.optimizer.learning_rate = 1.0
    logs = train(distiller, x, y)
    assert logs["prediction_loss"] > 0


def student_name(model):
    """The name of the backbone within a model."""
    (backbone,) = (layer for layer in model.layers if layer.name.endswith("_bert"))
    return backbone.name


@pytest.mark.once
@pytest.mark.parametrize("mask", ["padding_mask", None])
def test_it_is_the_mask_that_makes_padding_of_kerashub_count_nowhere(mask):
    hub = pytest.importorskip("keras_hub")
    teacher, student = (
        bert(name, hub, width, True) for name, width in (("teacher", 12), ("student", 8))
    )
    layer = "student_bert/transformer_layer_0"
    distiller = dskd_keras.Distiller(teacher, student, [layer], mask=mask)
    assert distiller.teacher_layer == "teacher_bert/transformer_layer_1"
    distiller.compile(keras.optimizers.SGD(0.0), loss=small.crossentropy())
    x, y = text()
    before = steps_terms(distiller, x, y)
    after = steps_terms(distiller, *text(padding=5, filler=7))
    expected = kl(run(teacher, x), run(student, x)).mean()
    assert before["prediction_loss"] == pytest.approx(expected, rel=1e-3)
    # The models' own attention leaves padding out.
    assert after["prediction_loss"] == pytest.approx(expected, rel=1e-3)
    if mask is None:
        assert after["deep_feature_loss"] != pytest.approx(before["deep_feature_loss"], rel=1e-3)
        return
    assert after == pytest.approx(before, rel=1e-4)
    inner = teacher.get_layer("teacher_bert")
    last = keras.Model(inner.input, inner.get_layer("transformer_layer_1").output)
    projected = array(distiller(x, training=True).deep_features[layer])
    squares = ((run(last, x) - projected) ** 2).mean(-1)
    assert before["deep_feature_loss"] == pytest.approx(
        squares[x["padding_mask"] == 1].mean(), rel=1e-3
    )


@pytest.mark.once
def test_the_softmax_of_a_task_of_kerashub_is_taken_off():
    hub = pytest.importorskip("keras_hub")
    student = bert("student", hub, 8, True)
    inner = bert("teacher", hub, 12, True).get_layer("teacher_bert")
    task = hub.models.BertTextClassifier(inner, CLASSES, activation="softmax", preprocessor=None)
    with pytest.raises(dskd_keras.InputError, match=r"Take dskd_keras.as_logits\(teacher\)"):
        dskd_keras.Distiller(task, student)
    distiller = dskd_keras.Distiller(
        dskd_keras.as_logits(task), student, ["student_bert/transformer_layer_0"],
        mask="padding_mask",
    )  # fmt: skip
    assert distiller.teacher_layer == "teacher_bert/transformer_layer_1"
    x, y = text()
    expected = kl(np.log(run(task, x)), run(student, x)).mean()
    assert train(distiller, x, y)["prediction_loss"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.once
@pytest.mark.parametrize("kind", ["DistilBertBackbone", "RobertaBackbone"])
def test_other_backbones_of_kerashub(kind, tmp_path):
    create = getattr(pytest.importorskip("keras_hub").models, kind)

    def classifier(name, width):
        backbone = create(
            vocabulary_size=50, num_layers=2, num_heads=2, hidden_dim=width,
            intermediate_dim=2 * width, max_sequence_length=12, dropout=0.0, name="bert",
        )  # fmt: skip
        inputs = {key: keras.Input((None,), dtype="int32", name=key) for key in backbone.input}
        logits = layers.Dense(CLASSES, name="logits")(backbone(inputs)[:, 0])
        return keras.Model(inputs, logits, name=name)

    teacher, student = classifier("teacher", 12), classifier("student", 8)
    with pytest.raises(dskd_keras.InputError, match=r"such as .*'bert/transformer_layer_0'"):
        dskd_keras.Distiller(teacher, student, "auto")
    names = [f"bert/transformer_layer_{number}" for number in range(2)]
    distiller = dskd_keras.Distiller(teacher, student, names, names, mask="padding_mask")
    x, y = text()
    del x["segment_ids"]
    train(distiller, x, y)
    distiller.student.save(tmp_path / "student.keras")
    loaded = keras.models.load_model(tmp_path / "student.keras")
    np.testing.assert_allclose(run(loaded, x), run(student, x), rtol=1e-4, atol=1e-6)
