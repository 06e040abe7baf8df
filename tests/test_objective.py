"""The whole objective and its gradient, against a computation that shares nothing with it."""

import keras
import numpy as np
import pytest
import small

import dskd_keras

WEIGHTS = {
    "label_weight": 0.7,
    "prediction_weight": 1.3,
    "deep_prediction_weight": 0.9,
    "deep_feature_weight": 2.1,
}
LAYERS = ["stage1", "stage2"]


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def kl(p, q, tau):
    """τ²KL for each image, and its gradient in q."""
    log_p, log_q = log_softmax(p / tau), log_softmax(q / tau)
    value = tau**2 * (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return value, tau * (np.exp(log_q) - np.exp(log_p))


def crossentropy(label, z):
    log_q = log_softmax(z)
    one_hot = np.eye(z.shape[-1])[label]
    return -log_q[np.arange(len(label)), label], np.exp(log_q) - one_hot


def mean_squared_error(target, p):
    size = p[0].size
    value = ((target - p) ** 2).reshape(len(p), -1).mean(axis=1)
    return value, 2 * (p - target) / size


def allocate(name, loss):
    loss = np.array(loss)
    softmax = np.exp(log_softmax(loss))
    return {
        "softmax": softmax,
        "proportional": loss / loss.sum(),
        "inverse": (1 - softmax) / (len(loss) - 1),
        "uniform": np.full(len(loss), 1 / len(loss)),
    }[name]


def average_pool(x, size):
    """Average pooling of `[B, H, W, C]` to `[B, size, size, C]` where sizes divide."""
    factor = x.shape[1] // size
    return x.reshape(len(x), size, factor, size, factor, -1).mean(axis=(2, 4))


def reference(label, teacher, outputs, weight, tau, weighting, of_teacher):
    """Loss, logs and the gradients in every output, in float64.

    `of_teacher` gives for each supervised layer the name of the teacher's.
    """
    to_double = lambda x: np.asarray(keras.ops.convert_to_numpy(x), "float64")  # noqa: E731
    logits, deep_logits, deep_features = keras.tree.map_structure(to_double, outputs[:3])
    target = keras.tree.map_structure(to_double, teacher)
    batch = len(logits)
    logs, gradients, total = {}, {}, 0.0

    def add(coefficient, value, gradient):
        nonlocal total
        total += coefficient * (weight * value).sum() / batch
        scale = (coefficient * weight / batch).reshape((-1,) + (1,) * (gradient.ndim - 1))
        return scale * gradient

    value, gradient = crossentropy(label, logits)
    logs["label_loss"] = (weight * value).sum() / batch
    gradients["logits"] = add(WEIGHTS["label_weight"], value, gradient)
    value, gradient = kl(target["logits"], logits, tau)
    logs["prediction_loss"] = (weight * value).sum() / batch
    gradients["logits"] = gradients["logits"] + add(WEIGHTS["prediction_weight"], value, gradient)

    for kind, of_layer in (("prediction", deep_logits), ("feature", deep_features)):
        terms = []
        for name in LAYERS:
            if kind == "prediction":
                terms.append(kl(target["logits"], of_layer[name], tau))
            else:
                pooled = average_pool(target[of_teacher[name]], of_layer[name].shape[1])
                terms.append(mean_squared_error(pooled, of_layer[name]))
        means = [(weight * value).sum() / batch for value, _ in terms]
        for name, mean, share, term in zip(
            LAYERS, means, allocate(weighting, means), terms, strict=True
        ):
            logs[f"deep_{kind}_loss/{name}"] = mean
            logs[f"deep_{kind}_allocation/{name}"] = share
            gradients[f"{kind}/{name}"] = add(share * WEIGHTS[f"deep_{kind}_weight"], *term)
            logs[f"deep_{kind}_loss"] = logs.get(f"deep_{kind}_loss", 0) + share * mean
    return total, logs, gradients


@pytest.mark.parametrize(
    "weighting, tau, weighted",
    [
        ("softmax", 4.0, False),
        ("softmax", 1.0, True),
        ("proportional", 1.0, False),
        ("inverse", 4.0, True),
        ("uniform", 1.0, True),
    ],
)
@small.eagerly()
def test_loss_logs_and_gradients_equal_an_independent_computation(weighting, tau, weighted):
    check_step(weighting, tau, weighted, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [("float32", 2e-4, 2e-6), ("bfloat16", 5e-2, 5e-3)]
)
@small.eagerly()
def test_with_a_folded_teacher_they_are_those_of_the_plain_one(dtype, rtol, atol):
    def folded(teacher):
        return dskd_keras.fold_batch_norm(teacher, dtype)

    check_step("proportional", 4.0, True, rtol, atol, folded)


@small.eagerly()
def test_by_default_each_layer_is_compared_with_the_teachers_of_its_place():
    check_step("softmax", 4.0, True, rtol=2e-4, atol=2e-6, teacher_layer="auto")


def check_step(
    weighting, tau, weighted, rtol, atol, prepare=lambda teacher: teacher, teacher_layer="stage2"
):
    teacher = small.convnet("teacher", width=5)
    # A batch normalisation that has seen something.
    for stage in ("stage1_bn", "stage2_bn"):
        norm = teacher.get_layer(stage)
        width = norm.gamma.shape[0]
        norm.moving_mean.assign(np.linspace(-0.2, 0.3, width))
        norm.moving_variance.assign(np.linspace(0.5, 2.0, width))
        norm.gamma.assign(np.linspace(0.7, 1.4, width))
    student = small.convnet("student", batch_norm=False)
    # Larger logits, so that the terms differ from each other and from uniform.
    teacher.get_layer("logits").kernel.assign(teacher.get_layer("logits").kernel * 9.0)
    distiller = dskd_keras.Distiller(
        prepare(teacher), student, LAYERS, temperature=tau, weighting=weighting, **WEIGHTS,
        teacher_layer=teacher_layer,
    )  # fmt: skip
    # Momentum-free SGD at rate 1 makes the change of a weight the negative gradient.
    distiller.compile(keras.optimizers.SGD(1.0), loss=small.crossentropy())
    x, y = small.images(6)
    weight = np.linspace(0.0, 2.0, 6).astype("float32") if weighted else None

    outputs = distiller(x, training=True)
    expected, logs, gradients = reference(
        y,
        keras.Model(
            teacher.input,
            {
                "logits": teacher.get_layer("logits").output,
                **{name: teacher.get_layer(name).output for name in LAYERS},
            },
        )(x, training=False),
        outputs,
        np.ones(6) if weight is None else weight.astype("float64"),
        tau,
        weighting,
        {name: name if teacher_layer == "auto" else teacher_layer for name in LAYERS},
    )
    pooled = keras.Model(student.inputs[0], student.get_layer("pool").output)
    features = np.asarray(keras.ops.convert_to_numpy(pooled(x)), "float64")

    heads = distiller.student_with_heads
    watched = {
        "logits": student.get_layer("logits"),
        **{f"{name}_logits": heads.get_layer(f"head_{name}_logits") for name in LAYERS},
        **{f"{name}_projection": heads.get_layer(f"head_{name}_projection") for name in LAYERS},
    }
    before = {name: small.values(layer.trainable_variables) for name, layer in watched.items()}
    result = distiller.train_on_batch(x, y, sample_weight=weight, return_dict=True)
    change = {
        name: [
            old - new
            for old, new in zip(before[name], small.values(layer.trainable_variables), strict=True)
        ]
        for name, layer in watched.items()
    }

    close = {"rtol": rtol, "atol": atol}
    np.testing.assert_allclose(result["loss"], expected, **close)
    assert set(logs) == set(result) - {"loss"}
    for name, value in logs.items():
        np.testing.assert_allclose(result[name], value, err_msg=name, **close)

    kernel, bias = change["logits"]
    np.testing.assert_allclose(bias, gradients["logits"].sum(axis=0), **close)
    np.testing.assert_allclose(kernel, features.T @ gradients["logits"], **close)
    for name in LAYERS:
        in_logits = gradients[f"prediction/{name}"]
        projected = np.asarray(keras.ops.convert_to_numpy(outputs.deep_features[name]), "float64")
        kernel, bias = change[f"{name}_logits"]
        np.testing.assert_allclose(bias, in_logits.sum(axis=0), **close)
        np.testing.assert_allclose(kernel, projected.mean(axis=(1, 2)).T @ in_logits, **close)
        # The projector learns from both losses: through its classifier and directly.
        positions = projected.shape[1] * projected.shape[2]
        through_classifier = (in_logits @ before[f"{name}_logits"][0].T) / positions
        in_projection = gradients[f"feature/{name}"] + through_classifier[:, None, None, :]
        np.testing.assert_allclose(
            change[f"{name}_projection"][1], in_projection.sum(axis=(0, 1, 2)), **close
        )


@small.eagerly()
def test_class_weight_counts_as_sample_weight_in_every_term():
    x, y = small.images(6)
    distiller = dskd_keras.Distiller(small.convnet("teacher"), small.convnet("student"), ["stage1"])
    # Nothing changes that a training step computes with.
    distiller.compile(keras.optimizers.SGD(0.0), loss=small.crossentropy())
    by_class = {0: 0.5, 1: 2.0, 2: 1.25}
    histories = []
    for weights in (
        {"class_weight": by_class},
        {"sample_weight": np.array([by_class[label] for label in y], "float32")},
        {},
    ):
        histories.append(
            distiller.fit(x, y, batch_size=6, shuffle=False, verbose=0, **weights).history
        )
    for term, value in histories[1].items():
        assert histories[0][term] == pytest.approx(value, rel=1e-6)
    for term in ("label_loss", "prediction_loss", "deep_feature_loss/stage1"):
        assert histories[0][term] != pytest.approx(histories[2][term], rel=1e-3)


@small.eagerly()
def test_the_larger_teacher_map_is_pooled_to_the_students_size():
    teacher, student = small.convnet("teacher", width=3), small.convnet("student")
    distiller = dskd_keras.Distiller(
        teacher, student, ["stage2"], teacher_layer="stage1", label_weight=0, prediction_weight=0,
        deep_prediction_weight=0, deep_feature_weight=1,
    )  # fmt: skip
    distiller.compile("sgd")
    x, _ = small.images(4)
    features = keras.ops.convert_to_numpy(distiller.teacher(x)["features"])
    projected = keras.ops.convert_to_numpy(distiller(x, training=True).deep_features["stage2"])
    assert features.shape == (4, 8, 8, 3) and projected.shape == (4, 4, 4, 3)
    expected = ((average_pool(features, 4) - projected) ** 2).mean()
    result = distiller.train_on_batch(x, return_dict=True)
    assert result["loss"] == pytest.approx(expected, rel=1e-5)
