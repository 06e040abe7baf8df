"""Models that others wrote, of keras.applications and KerasHub, as teachers and as students."""

import keras
import numpy as np
import pytest
import small
from keras import layers

import dskd_keras

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


def photos(count=4, size=32):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (count, size, size, 3)).astype("float32")
    return x, np.arange(count) % CLASSES


def train(distiller, x, y):
    """One step: its terms are finite, all weights learn, and the teacher keeps its bits."""
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
        if (old == keras.ops.convert_to_numpy(variable)).all()
    ]
    assert not unchanged
    small.assert_same_bits(of_teacher, small.values(distiller.teacher.model.variables))
    return logs


@pytest.mark.parametrize(
    ("of_teacher", "of_student"),
    [
        ("efficientnet", "mobilenet"),
        pytest.param("mobilenet", "efficientnet", marks=pytest.mark.once),
    ],
)
@small.eagerly()
def test_two_families_of_keras_applications(of_teacher, of_student):
    ending = published(of_teacher)
    with pytest.raises(dskd_keras.InputError, match=r"Take dskd_keras.as_logits\(teacher\)"):
        dskd_keras.Distiller(ending, published(of_student, classifier_activation=None))
    teacher = dskd_keras.as_logits(ending)
    student = dskd_keras.as_logits(published(of_student))
    distiller = dskd_keras.Distiller(teacher, student, "auto")
    assert distiller.teacher_layer == LAST_MAP[of_teacher, 32]
    assert list(distiller.student_layers) == SHALLOW[of_student]
    x, y = photos()
    if keras.backend.backend() == "jax":
        train(distiller, x, y)  # outside of a step it compiles every operation for itself
        return
    # Before the step: it changes the student.
    expected = kl(array(teacher(x, training=False)), array(student(x, training=True)))
    logs = train(distiller, x, y)
    if of_student == "efficientnet":
        return  # it drops connections at random
    assert logs["prediction_loss"] == pytest.approx(expected.mean(), rel=0.05)


@pytest.mark.once
def test_a_whole_classifier_behind_preprocessing():
    family = "mobilenet"
    inputs = keras.Input((32, 32, 3))
    x = layers.Rescaling(1 / 127.5, offset=-1)(layers.Resizing(64, 64)(inputs))
    classifier = published(family, 64, classifier_activation=None)
    teacher = keras.Model(inputs, classifier(x), name="teacher")
    distiller = dskd_keras.Distiller(
        teacher, small.convnet("student", size=32, channels=3), ["stage1"]
    )
    assert distiller.teacher_layer == f"{classifier.name}/{LAST_MAP[family, 64]}"
    assert distiller.teacher.feature_shape[:2] == (2, 2)
    train(distiller, *photos())
    folded = dskd_keras.fold_batch_norm(teacher)
    images, _ = photos()
    np.testing.assert_allclose(
        array(folded(images, training=False)),
        array(teacher(images, training=False)),
        rtol=1e-3,
        atol=1e-4,
    )
    again = dskd_keras.Distiller(folded, small.convnet("student", size=32, channels=3), ["stage1"])
    assert again.teacher.feature_shape == distiller.teacher.feature_shape


@pytest.mark.once
def test_a_backbone_under_a_new_head_is_a_student():
    backbone = published("mobilenet", 64, include_top=False)
    inputs = keras.Input((64, 64, 3))
    x = layers.GlobalAveragePooling2D()(backbone(layers.Rescaling(1 / 255)(inputs)))
    student = keras.Model(inputs, layers.Dense(CLASSES)(x), name="student")
    teacher = small.convnet("teacher", size=64, channels=3)
    distiller = dskd_keras.Distiller(teacher, student, "auto")
    assert all(name.startswith(f"{backbone.name}/block_") for name in distiller.student_layers)
    train(distiller, *photos(size=64))


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


@pytest.mark.parametrize("as_backbone", [True, False], ids=["backbone", "task"])
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
    before, *changed = (
        distiller.train_on_batch(*batch, return_dict=True)
        for batch in ((x, y), text(filler=7), text(padding=3))
    )
    for logs in changed:
        for name, value in before.items():
            assert float(logs[name]) == pytest.approx(float(value), rel=1e-3), name
    logs = train(distiller, x, y)
    assert logs["prediction_loss"] > 0


def student_name(model):
    """The name of the backbone within a model."""
    (backbone,) = (layer for layer in model.layers if layer.name.endswith("_bert"))
    return backbone.name
