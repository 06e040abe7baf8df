import functools
import inspect
import json

import keras
import numpy as np
import pytest
import small

import dskd_keras
from dskd_keras import losses
from dskd_keras.losses import (
    DIST,
    AttentionTransfer,
    BinaryKLDivergence,
    CosineFeatures,
    DecoupledKLDivergence,
    FeatureMeanSquaredError,
    FeatureNormalizedMeanSquaredError,
    KLDivergence,
    StandardizedKLDivergence,
)


@functools.cache
def compiled(function):
    """The function, on JAX as one program: it would compile every part of it by itself."""
    if keras.backend.backend() != "jax":
        return function
    import jax

    return jax.jit(function)


def computed(function, *args, **kwargs):
    """What a function of tensors returns, as arrays."""
    args, kwargs = keras.tree.map_structure(keras.ops.convert_to_tensor, (args, kwargs))
    return keras.tree.map_structure(keras.ops.convert_to_numpy, compiled(function)(*args, **kwargs))


def value(loss, *args, **kwargs):
    """What Keras makes of a loss: one number."""
    return float(computed(loss.__call__, *args, **kwargs))


def called(loss, *args, **kwargs):
    """What `call` returns: one value an image or a position."""
    return computed(loss.call, *args, **kwargs)


def normal(*shape, scale=2.0, seed=0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype("float32")


class Shifted(keras.layers.Layer):
    """Adds a weight for each entry of the batch, so that one step tells the gradient."""

    def __init__(self, shape):
        super().__init__()
        self.shift = self.add_weight(shape=shape, initializer="zeros")

    def call(self, x):
        return x + self.shift


def trained(cases):
    """The losses of one training step, and their gradients with respect to `y_pred`, by name.

    `cases` are `(loss, y_true, y_pred)` by name. One step for all, as JAX compiles each.
    """
    inputs, outputs, weights = {}, {}, {}
    for name, (_, _, y_pred) in cases.items():
        inputs[name] = keras.Input(batch_shape=y_pred.shape, name=name)
        shifted = Shifted(y_pred.shape)
        outputs[name], weights[name] = shifted(inputs[name]), shifted.shift
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(1.0), loss={name: case[0] for name, case in cases.items()})
    _, y_true, y_pred = ({name: case[i] for name, case in cases.items()} for i in range(3))
    with small.eagerly():
        logs = model.train_on_batch(y_pred, y_true, return_dict=True)
    return {
        name: (float(logs[f"{name}_loss"]), -keras.ops.convert_to_numpy(weight))
        for name, weight in weights.items()
    }


# The formulas once more, in float64, from probabilities.


def softmax(z, axis=-1):
    e = np.exp(z - z.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(axis=-1)


def kl_divergence(p, q, τ=4.0):
    return τ**2 * kl(softmax(p / τ), softmax(q / τ))


def binary_kl_divergence(p, q, τ=4.0):
    p, q = 1 / (1 + np.exp(-p / τ)), 1 / (1 + np.exp(-q / τ))
    return τ**2 * kl(np.stack([p, 1 - p], -1), np.stack([q, 1 - q], -1)).mean(axis=-1)


def decoupled_parts(p, q, label, τ):
    """TCKD and NCKD of each row."""
    target, others = [], []
    for z, y, c in zip(p / τ, q / τ, label, strict=True):
        a, b = softmax(z), softmax(y)
        target.append(kl(np.array([a[c], 1 - a[c]]), np.array([b[c], 1 - b[c]])))
        others.append(kl(softmax(np.delete(z, c)), softmax(np.delete(y, c))))
    return np.array(target), np.array(others)


def decoupled_kl_divergence(p, q, label, τ=4.0, alpha=1.0, beta=8.0):
    parts = decoupled_parts(
        p.reshape(-1, p.shape[-1]), q.reshape(-1, q.shape[-1]), label.ravel(), τ
    )
    return (τ**2 * (alpha * parts[0] + beta * parts[1])).reshape(label.shape)


def dist(p, q, τ=1.0, beta=1.0, gamma=1.0):
    shape, classes = p.shape[:-1], p.shape[-1]
    p, q = (softmax(z.reshape(-1, classes) / τ) for z in (p, q))
    rows = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)]
    batch = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    return (τ**2 * (beta * np.array(rows) + gamma * batch)).reshape(shape)


def standardized_kl_divergence(p, q, τ=2.0):
    p, q = ((z - z.mean(-1, keepdims=True)) / z.std(-1, keepdims=True) for z in (p, q))
    return kl_divergence(p, q, τ)


def attention_transfer(a, b):
    def attention(x):
        x = (x**2).mean(axis=-1).reshape(len(x), -1)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    return ((attention(a) - attention(b)) ** 2).mean(axis=1)


def cosine_features(a, b):
    return 1 - (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


ON_LOGITS = [
    (KLDivergence(), kl_divergence),
    (BinaryKLDivergence(), binary_kl_divergence),
    (DIST(), dist),
    (DIST(4.0, beta=2.0, gamma=0.5), lambda p, q: dist(p, q, 4.0, 2.0, 0.5)),
    (StandardizedKLDivergence(), standardized_kl_divergence),
]
LOGITS_IDS = ["kl", "binary", "dist", "dist_4", "standardized"]


@pytest.mark.parametrize(("loss", "expected"), ON_LOGITS, ids=LOGITS_IDS)
def test_losses_on_logits_against_numpy(loss, expected):
    p, q = normal(2, 6, 5)
    weights = np.array([0.0, 1.0, 2.0, 0.5, 0.0, 1.0], "float32")

    def every(p, q):
        dense = [keras.ops.reshape(z, (2, 1, 3, 5)) for z in (p, q)]
        return loss.call(p, q), loss(p, q), loss(p, q, sample_weight=weights), loss.call(*dense)

    values, mean, weighted, dense = computed(every, p, q)
    assert values.shape == (6,)
    np.testing.assert_allclose(values, expected(p.astype("float64"), q), rtol=1e-4)
    # Through Keras's own entrance, with its mean, and with weights for images.
    assert mean == pytest.approx(values.mean(), rel=1e-5)
    assert weighted == pytest.approx((weights * values).sum() / 6, rel=1e-5)
    # Dense logits: one value a position.
    assert dense.shape == (2, 1, 3)
    np.testing.assert_allclose(dense.ravel(), values, rtol=1e-4)


def decoupled(label):
    """The loss with a label bound to it, as `values` binds it."""
    return lambda p, q: losses.values(DecoupledKLDivergence(), p, q, label=label)


def test_decoupled_kl_divergence_against_numpy():
    p, q = normal(2, 6, 5)
    label = np.array([0, 4, 2, 2, 1, 3])
    expected = decoupled_kl_divergence(p.astype("float64"), q, label)
    one_hot = np.eye(5)[label]
    for given in (label, label[:, None], one_hot, one_hot.astype("float32")):
        result = called(DecoupledKLDivergence(), p, q, label=keras.ops.convert_to_tensor(given))
        np.testing.assert_allclose(result, expected, rtol=1e-4)
    weighed = called(DecoupledKLDivergence(2.0, alpha=3.0, beta=0.5), p, q, label=label)
    expected = decoupled_kl_divergence(p.astype("float64"), q, label, 2.0, 3.0, 0.5)
    np.testing.assert_allclose(weighed, expected, rtol=1e-4)
    # Dense, where a position without a class, such as padding of −1, gets 0.
    p, q = normal(2, 2, 3, 5)
    label = np.array([[0, 4, 2], [2, 1, 3]])
    expected = decoupled_kl_divergence(p.astype("float64"), q, label)
    result = called(DecoupledKLDivergence(), p, q, label=np.eye(5)[label])
    np.testing.assert_allclose(result, expected, rtol=1e-4)
    label[1, 1], expected[1, 1] = -1, 0.0
    result = called(DecoupledKLDivergence(), p, q, label=label)
    np.testing.assert_allclose(result, expected, rtol=1e-4)


@pytest.mark.once
def test_decoupled_parts_make_up_the_plain_divergence():
    # KL = TCKD + (1 − p_target) · NCKD, the paper's first result.
    p, q = normal(2, 6, 5)
    label = np.array([0, 4, 2, 2, 1, 3])
    target, others = (
        called(DecoupledKLDivergence(1.0, *weights), p, q, label=label)
        for weights in ((1.0, 0.0), (0.0, 1.0))
    )
    left = 1 - softmax(p.astype("float64"))[np.arange(6), label]
    np.testing.assert_allclose(target + left * others, called(KLDivergence(1.0), p, q), rtol=1e-4)


def test_kl_divergence_by_hand():
    # softmax([ln 3, 0]) = [3/4, 1/4] against [1/2, 1/2].
    teacher, student = np.array([[np.log(3.0), 0.0]], "float32"), np.zeros((1, 2), "float32")
    expected = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    assert value(KLDivergence(1.0), teacher, student) == pytest.approx(expected, rel=1e-6)
    # At temperature 2 the logits [2 ln 3, 0] soften to the same distribution, times τ².
    assert value(KLDivergence(2.0), 2 * teacher, student) == pytest.approx(4 * expected, rel=1e-6)
    assert value(KLDivergence(), teacher, teacher) == pytest.approx(0.0, abs=1e-6)


def test_a_binary_classifier_is_two_classes():
    p, q = normal(2, 5, 1, scale=5.0)
    two = [np.concatenate([z, np.zeros_like(z)], axis=1) for z in (p, q)]
    np.testing.assert_allclose(
        called(BinaryKLDivergence(3.0), p, q), called(KLDivergence(3.0), *two), rtol=1e-4
    )
    # The mean over labels: repeating them changes nothing.
    np.testing.assert_allclose(
        called(BinaryKLDivergence(3.0), np.tile(p, 7), np.tile(q, 7)),
        called(BinaryKLDivergence(3.0), p, q),
        rtol=1e-5,
    )


def test_divergence_of_huge_logits():
    teacher = np.array([[1e4, -1e4, 0.0]], "float32")
    assert value(KLDivergence(1.0), teacher, -teacher) == pytest.approx(2e4)
    # Two labels of three are as far apart as they can be.
    assert value(BinaryKLDivergence(1.0), teacher, -teacher) == pytest.approx(2 * 1e4 / 3)


@pytest.mark.once
def test_losses_that_leave_the_scale_free():
    p, q = normal(2, 6, 5)
    np.testing.assert_allclose(
        called(StandardizedKLDivergence(), 3 * p + 7, q),
        called(StandardizedKLDivergence(), p, 0.5 * q - 2),
        rtol=1e-3,
    )
    a, b = normal(2, 3, 4, 2)
    for loss in (AttentionTransfer(), CosineFeatures()):
        np.testing.assert_allclose(called(loss, 1e15 * a, b), called(loss, a, 1e-15 * b), rtol=1e-4)


@pytest.mark.parametrize(
    "loss",
    [
        KLDivergence,
        *(
            pytest.param(loss, marks=pytest.mark.once)
            for loss in (BinaryKLDivergence, DecoupledKLDivergence, DIST, StandardizedKLDivergence)
        ),
    ],
)
def test_a_temperature_of_the_step(loss):
    p, q = normal(2, 6, 5)
    label = {"label": np.arange(6) % 5} if loss is DecoupledKLDivergence else {}
    expected = called(loss(2.5), p, q, **label)
    np.testing.assert_allclose(called(loss(), p, q, temperature=2.5, **label), expected, rtol=1e-5)
    for temperature in (2.5, keras.Variable(2.5)):
        call = functools.partial(loss().call, temperature=temperature)
        np.testing.assert_allclose(computed(call, p, q, **label), expected, rtol=1e-5)
    with pytest.raises(dskd_keras.InputError, match=r"^temperature: 0 should be a positive"):
        loss().call(*map(keras.ops.convert_to_tensor, (p, q)), temperature=0, **label)


def test_the_plain_losses_keep_their_bits():
    ops = keras.ops

    def divergence(p, q):
        log_p = ops.log_softmax(ops.divide(p, 4.0), axis=-1)
        log_q = ops.log_softmax(ops.divide(q, 4.0), axis=-1)
        return 4.0**2 * ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1)

    p, q = normal(2, 6, 5)
    np.testing.assert_array_equal(called(KLDivergence(), p, q), computed(divergence, p, q))

    def pooled_error(a, b):
        a = ops.adaptive_average_pool(a, (4, 4), data_format="channels_last")
        return ops.mean(ops.square(a - b), axis=(1, 2, 3))

    a, b = normal(3, 8, 4, 2), normal(3, 4, 4, 2)
    np.testing.assert_array_equal(
        called(FeatureMeanSquaredError(), a, b), computed(pooled_error, a, b)
    )


@pytest.mark.parametrize("shape", [(4, 4, 4, 3), (4, 6, 3), (4, 5), (4, 2, 3, 2, 3)])
def test_feature_loss_is_one_value_an_image(shape):
    a, b = normal(2, *shape, scale=1.0)
    loss = FeatureMeanSquaredError()
    per_image = ((a - b) ** 2).reshape(len(a), -1).mean(axis=1)
    np.testing.assert_allclose(called(loss, a, b), per_image, rtol=1e-5)
    # As many images as columns: a plain MeanSquaredError would weigh the columns here.
    weights = np.array([0.0, 1.0, 2.0, 3.0], "float32")
    assert value(loss, a, b, sample_weight=weights) == pytest.approx(
        (weights * per_image).sum() / 4, rel=1e-5
    )


def test_feature_loss_pools_the_larger_map():
    teacher = np.arange(16, dtype="float32").reshape(1, 4, 4, 1)
    student = np.zeros((1, 2, 2, 1), "float32")
    pooled = np.array([2.5, 4.5, 10.5, 12.5])
    result = value(FeatureMeanSquaredError(), teacher, student)
    assert result == pytest.approx((pooled**2).mean())
    assert value(FeatureMeanSquaredError(), student, teacher) == pytest.approx(result)
    # Sizes that don't divide: windows of two that overlap, as in PyTorch's adaptive pooling.
    teacher = np.array([[[1.0], [2.0], [4.0]]], "float32")
    result = value(FeatureMeanSquaredError(), teacher, np.zeros((1, 2, 1), "float32"))
    assert result == pytest.approx((1.5**2 + 3.0**2) / 2)


def test_feature_losses_compare_unlike_maps_by_their_means():
    teacher = np.ones((2, 3, 3, 4), "float32")
    teacher[0] *= 3.0
    student = np.ones((2, 7, 4), "float32")
    assert value(FeatureMeanSquaredError(), teacher, student) == 2.0
    np.testing.assert_allclose(called(CosineFeatures(), teacher, student), [0.0, 0.0], atol=1e-6)


def normalized(a, b):
    axes = tuple(range(a.ndim - 1))
    variance = ((a - a.mean(axis=axes)) ** 2).mean()
    return ((a - b) ** 2).reshape(len(a), -1).mean(axis=1) / variance


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 5, 6), (4, 6)])
def test_normalized_feature_loss_is_the_share_of_variance_that_is_not_explained(shape):
    loss = FeatureNormalizedMeanSquaredError()
    teacher, student = normal(2, *shape)
    expected = normalized(teacher.astype("float64"), student)
    np.testing.assert_allclose(called(loss, teacher, student), expected, rtol=1e-4)
    # The same features in other units, of another origin.
    other = called(loss, 30 * teacher + 7, 30 * student + 7)
    np.testing.assert_allclose(other, expected, rtol=1e-3)
    means = np.broadcast_to(teacher.mean(axis=tuple(range(len(shape) - 1))), shape)
    assert called(loss, teacher, means.copy()).mean() == pytest.approx(1.0, rel=1e-4)
    assert (called(loss, np.ones(shape, "float32"), student) == 0).all()


def test_attention_transfer_against_numpy():
    # Each side has channels of its own.
    teacher, student = normal(3, 2, 3, 2, 7), normal(3, 2, 3, 2, 2, seed=1)
    result = called(AttentionTransfer(), teacher, student)
    assert result.shape == (3,)
    expected = attention_transfer(teacher.astype("float64"), student)
    np.testing.assert_allclose(result, expected, rtol=1e-4)
    teacher, student = normal(3, 4, 6, 7), normal(3, 2, 3, 2)
    pooled = teacher.astype("float64").reshape(3, 2, 2, 3, 2, 7).mean(axis=(2, 4))
    np.testing.assert_allclose(
        called(AttentionTransfer(), teacher, student),
        attention_transfer(pooled, student),
        rtol=1e-4,
    )


@pytest.mark.parametrize("positions", [(), (5,), (4, 3)])
def test_cosine_features_against_numpy(positions):
    a, b = normal(2, 3, *positions, 6)
    result = called(CosineFeatures(), a, b)
    assert result.shape == (3, *positions)
    np.testing.assert_allclose(result, cosine_features(a.astype("float64"), b), rtol=1e-4)


# Where a formula has an edge: equal sides, a side that doesn't vary, huge and tiny values.
EDGES_OF_LOGITS = [
    ([1.0, 2.0, 3.0, 0.5], [1.0, 2.0, 3.0, 0.5]),
    ([1.0, 2.0, 3.0, 0.5], [0.1, 0.1, 0.1, 0.1]),
    ([0.1, 0.1, 0.1, 0.1], [1.0, 2.0, 3.0, 0.5]),
    ([0.0] * 4, [0.0] * 4),
    ([1e4, -1e4, 0.0, 0.0], [-1e4, 1e4, 0.0, 0.0]),
    ([1e15, -1e15, 0.0, 1.0], [1e15, -1e15, 0.0, 1.0]),
]
EDGES_OF_MAPS = [
    ([[1.0, 2.0], [3.0, 0.5]], [[1.0, 2.0], [3.0, 0.5]]),
    ([[1.0, 2.0], [3.0, 0.5]], [[0.0, 0.0], [0.0, 0.0]]),
    ([[0.0, 0.0], [0.0, 0.0]], [[1.0, 2.0], [3.0, 0.5]]),
    ([[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]),
    ([[1e15, 1e15], [0.0, 0.0]], [[-1e15, 1e15], [1e-15, 0.0]]),
]
LABEL_OF_EDGES = np.array([0, 1, 2, 3, 0, -1])
EQUALS = np.tile(np.array([[1.0, 2.0, 0.5, -1e4]], "float32"), (3, 1))


def of_name(name):
    on_maps = name == "attention_transfer" or "feature" in name
    return losses.get("feature_loss" if on_maps else "prediction_loss", name)


def edges(name):
    """Both sides for a loss of that name."""
    on_maps = name == "attention_transfer" or "feature" in name
    sides = zip(*(EDGES_OF_MAPS if on_maps else EDGES_OF_LOGITS), strict=True)
    return [np.array(side, "float32") for side in sides]


@pytest.fixture(scope="module")
def at_edges():
    cases = {name: (of_name(name), *edges(name)) for name in losses.names()}
    name = "decoupled_kl_divergence"
    cases[name] = (decoupled(LABEL_OF_EDGES), *edges(name))
    # No class varies over the batch, and the last has no probability at all.
    cases["dist_of_equals"] = (DIST(), EQUALS, EQUALS)
    return trained(cases)


@pytest.mark.parametrize("name", [*losses.names(), "dist_of_equals"])
def test_edges_give_finite_losses_and_gradients(at_edges, name):
    total, gradient = at_edges[name]
    assert np.isfinite(total) and np.isfinite(gradient).all()
    if name != "dist":  # there an image hangs on the others
        np.testing.assert_allclose(gradient[0], 0.0, atol=1e-5)


def test_values_at_edges(at_edges):
    np.testing.assert_allclose(
        called(CosineFeatures(), *edges("cosine_features")),
        [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]],
        atol=1e-6,
    )
    # Attention of length 1 against none, over two positions.
    np.testing.assert_allclose(
        called(AttentionTransfer(), *edges("attention_transfer")),
        [0.0, 0.5, 0.5, 0.0, 0.0],
        atol=1e-6,
    )
    np.testing.assert_allclose(
        called(DIST(gamma=0.0), *edges("dist"))[:5], [0.0, 1.0, 1.0, 1.0, 4 / 3], atol=1e-4
    )
    # Equal images, and the correlation 0 over the batch.
    assert at_edges["dist_of_equals"][0] == pytest.approx(1.0, abs=1e-4)


def test_dist_counts_a_rare_class_like_others():
    p, q = normal(2, 6, 4)
    rare = np.array([0.0, 0.0, 0.0, -30.0], "float32")
    expected = dist((p + rare).astype("float64"), q + rare)
    np.testing.assert_allclose(called(DIST(), p + rare, q + rare), expected, rtol=1e-3)


LABEL = np.array([0, 2, 3])
GRADIENTS = {
    **dict(zip(LOGITS_IDS, ON_LOGITS, strict=True)),
    "decoupled": (decoupled(LABEL), lambda p, q: decoupled_kl_divergence(p, q, LABEL)),
    "features": (FeatureMeanSquaredError(), lambda a, b: ((a - b) ** 2).mean(axis=1)),
    "normalized": (FeatureNormalizedMeanSquaredError(), normalized),
    # One channel, so that a gradient that is lost at the largest entry would show.
    "attention": (
        lambda a, b: AttentionTransfer().call(a[..., None], b[..., None]),
        lambda a, b: attention_transfer(a[..., None], b[..., None]),
    ),
    "cosine": (CosineFeatures(), cosine_features),
}


@pytest.fixture(scope="module")
def gradients():
    p, q = normal(2, 3, 4, scale=1.0)
    return p, q, trained({name: (loss, p, q) for name, (loss, _) in GRADIENTS.items()})


@pytest.mark.once
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_against_differences(gradients, name):
    p, q, found = gradients
    (total, gradient), (_, expected) = found[name], GRADIENTS[name]
    p, q, step = p.astype("float64"), q.astype("float64"), 1e-5
    assert total == pytest.approx(expected(p, q).mean(), rel=1e-4)
    for index in np.ndindex(q.shape):
        shift = np.zeros_like(q)
        shift[index] = step
        slope = (expected(p, q + shift).mean() - expected(p, q - shift).mean()) / (2 * step)
        assert gradient[index] == pytest.approx(slope, rel=1e-2, abs=1e-4)


MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], "bool")
MASKED = [
    DIST(),
    FeatureMeanSquaredError(),
    FeatureNormalizedMeanSquaredError(),
    AttentionTransfer(),
    CosineFeatures(),
]


def padded(x, padding):
    return np.where(MASK[..., None], x, np.float32(padding))


@pytest.mark.parametrize("loss", MASKED, ids=lambda loss: loss.name)
def test_padding_never_matters(loss):
    a, b = normal(2, 3, 5, 4)
    expected = called(loss, a, b, mask=MASK)
    assert np.isfinite(expected).all()
    for padding in (0.0, 1e30, np.nan):
        sides = padded(a, padding), padded(b, padding)
        np.testing.assert_array_equal(called(loss, *sides, mask=MASK), expected)
    weights = MASK.astype("float32") * 0.5
    np.testing.assert_array_equal(called(loss, *sides, mask=weights), expected)


def test_no_gradient_at_padding():
    a, b = (padded(x, np.nan) for x in normal(2, 3, 5, 4))

    def masked(loss):
        return lambda y_true, y_pred: loss.call(y_true, y_pred, mask=MASK)

    for _, gradient in trained({loss.name: (masked(loss), a, b) for loss in MASKED}).values():
        assert (gradient[~MASK] == 0.0).all()
        assert np.isfinite(gradient).all() and np.abs(gradient[MASK]).max() > 1e-4


def test_masked_values():
    a, b = normal(2, 3, 5, 4)
    mask = MASK
    double = a.astype("float64")
    expected = np.where(mask, ((double - b) ** 2).mean(axis=-1), 0.0)
    np.testing.assert_allclose(
        called(FeatureMeanSquaredError(), a, b, mask=mask), expected, rtol=1e-5
    )
    of_valid = double[mask]
    expected = np.where(mask, ((double - b) ** 2).mean(axis=-1), 0.0) / of_valid.var(axis=0).mean()
    np.testing.assert_allclose(
        called(FeatureNormalizedMeanSquaredError(), a, b, mask=mask), expected, rtol=1e-4
    )
    expected = np.where(mask, cosine_features(double, b), 0.0)
    np.testing.assert_allclose(called(CosineFeatures(), a, b, mask=mask), expected, rtol=1e-4)
    # What an image of the valid positions alone gives.
    expected = [*attention_transfer(double[:1, :3], b[:1, :3])]
    expected += [*attention_transfer(double[1:2], b[1:2]), 0.0]
    np.testing.assert_allclose(called(AttentionTransfer(), a, b, mask=mask), expected, rtol=1e-4)
    result = called(DIST(), a, b, mask=mask)
    np.testing.assert_allclose(result[mask], dist(double[mask], b[mask]), rtol=1e-4)
    assert (result[~mask] == 0.0).all()


@pytest.mark.parametrize("temperature", [0, -1.0, float("inf"), "4", None, True])
def test_bad_temperature(temperature):
    for loss in (KLDivergence, BinaryKLDivergence, StandardizedKLDivergence):
        with pytest.raises(dskd_keras.InputError, match=r"^temperature: .* should be a positive"):
            loss(temperature)


def test_wrong_inputs():
    for loss, field, number in (
        (DecoupledKLDivergence, "alpha", -1),
        (DecoupledKLDivergence, "beta", "8"),
        (DIST, "beta", -1),
        (DIST, "gamma", float("nan")),
    ):
        with pytest.raises(dskd_keras.InputError, match=rf"^{field}: .* of at least 0"):
            loss(**{field: number})
    p = np.zeros((3, 5), "float32")
    with pytest.raises(
        dskd_keras.InputError, match=r"^label: None, but Decoupled.* take KLDivergence"
    ):
        value(DecoupledKLDivergence(), p, p)
    for shape in ((4,), (3, 4)):
        with pytest.raises(
            dskd_keras.InputError, match=r"^label: shape .* should be \(3,\), class indices, or"
        ):
            called(DecoupledKLDivergence(), p, p, label=np.zeros(shape, "int32"))
    with pytest.raises(dskd_keras.InputError, match=r"at least 2 classes"):
        called(DecoupledKLDivergence(), p[:, :1], p[:, :1], label=np.zeros(3, "int32"))
    with pytest.raises(
        dskd_keras.InputError,
        match=r"^y_pred: shape \(3, 1\) should have the 5 classes of y_true, shape \(3, 5\)\.",
    ):
        value(KLDivergence(), p, p[:, :1])


@pytest.mark.parametrize("loss", [FeatureMeanSquaredError(), CosineFeatures()])
def test_maps_of_other_channels(loss):
    with pytest.raises(
        dskd_keras.InputError,
        match=r"^y_pred: shape \(2, 4, 1\) should have the 8 channels of y_true, shape "
        r"\(2, 3, 3, 8\)\. Project one of them",
    ):
        value(loss, np.zeros((2, 3, 3, 8), "float32"), np.zeros((2, 4, 1), "float32"))


def test_maps_that_do_not_fit():
    image, sequence = np.zeros((2, 3, 3, 4), "float32"), np.zeros((2, 5, 4), "float32")
    for a, b in ((image, sequence), (image[:, 0, 0], image[:, 0, 0])):
        with pytest.raises(dskd_keras.InputError, match=r"^y_pred: shape .*both be \[B, \*pos"):
            value(AttentionTransfer(), a, b)
    mask = np.ones((2, 3), "bool")
    with pytest.raises(dskd_keras.InputError, match=r"^mask: .*\(2, 5, 4\) and y_pred \(2, 3, 4\)"):
        called(FeatureMeanSquaredError(), sequence, sequence[:, :3], mask=mask)
    with pytest.raises(dskd_keras.InputError, match=r"^mask: shape \(2, 3\) should be \(2, 5\)"):
        called(FeatureMeanSquaredError(), sequence, sequence, mask=mask)


SETTINGS = [
    KLDivergence(2.5, reduction="sum"),
    BinaryKLDivergence(1.5, name="other"),
    DecoupledKLDivergence(2.0, alpha=0.5, beta=2.0),
    DIST(3.0, beta=2.0, gamma=0.25),
    StandardizedKLDivergence(3.0),
    FeatureMeanSquaredError(),
    FeatureNormalizedMeanSquaredError(reduction="sum"),
    AttentionTransfer(reduction=None),
    CosineFeatures(),
]


@pytest.mark.parametrize("loss", SETTINGS, ids=lambda loss: type(loss).__name__)
def test_round_trip(loss):
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(loss)))
    again = losses.get("prediction_loss", config)
    assert type(again) is type(loss) and again.get_config() == loss.get_config()
    # All settings are in the configuration.
    settings = {*inspect.signature(type(loss)).parameters} - {"dtype"}
    assert {*loss.get_config()} == settings


def squared(y_true, y_pred):
    return keras.ops.square(y_true - y_pred)


def test_get():
    for name in losses.names():
        own, other = "prediction_loss", "feature_loss"
        if "feature" in name or name == "attention_transfer":
            own, other = other, own
        loss = losses.get(own, name)
        with pytest.raises(dskd_keras.InputError, match=rf"^{other}: '{name}' should be a known"):
            losses.get(other, name)
        assert isinstance(loss, keras.losses.Loss) and loss.name == name
    loss = DIST(2.0)
    assert losses.get("prediction_loss", loss) is loss
    assert losses.get("prediction_loss", squared) is squared
    own = keras.losses.MeanAbsoluteError()
    config = keras.saving.serialize_keras_object(own)
    assert type(losses.get("feature_loss", config)) is keras.losses.MeanAbsoluteError
    with pytest.raises(
        dskd_keras.InputError,
        match=r"^prediction_loss: 'kl_divergense' .*Did you mean 'kl_divergence'.* as an object",
    ):
        losses.get("prediction_loss", "kl_divergense")
    for wrong in (None, 4.0, KLDivergence, {"a": 1}):
        with pytest.raises(
            dskd_keras.InputError, match=r"^prediction_loss: .* should be one of kl_divergence, bin"
        ):
            losses.get("prediction_loss", wrong)


def test_values_hand_on_what_a_loss_names():
    extras = {"temperature": 2.0, "label": "L", "mask": "M"}
    assert losses.values(lambda a, b: (a, b), 1, 2, **extras) == (1, 2)
    assert losses.values(lambda a, b, mask, scale=3: (mask, scale), 1, 2, **extras) == ("M", 3)
    assert losses.values(lambda a, b, **rest: rest, 1, 2, **extras) == extras
    assert losses.values(lambda *both, label: (both, label), 1, 2, **extras) == ((1, 2), "L")
    # The first two arguments are the sides, whatever they are called.
    assert losses.values(lambda label, logits: (label, logits), 1, 2, **extras) == (1, 2)

    class Named(keras.losses.Loss):
        def call(self, y_true, y_pred, temperature=1.0):
            return temperature

    assert losses.values(Named(), 1, 2, **extras) == 2.0
    p, q = map(keras.ops.convert_to_tensor, normal(2, 6, 5))
    result = losses.values(keras.losses.MeanSquaredError(), p, q, **extras)
    assert tuple(result.shape) == (6,)
    result = losses.values(KLDivergence(), p, q, temperature=2.0, label=None, mask=None)
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(result), keras.ops.convert_to_numpy(KLDivergence(2.0).call(p, q))
    )


@pytest.mark.once
def test_in_keras_distillation():
    teacher, student = (
        small.convnet(name, batch_norm=False, size=4) for name in ("teacher", "student")
    )
    x, y = small.images(size=4)
    (p, a), (q, b) = (
        keras.Model(
            model.input, [model.get_layer("logits").output, model.get_layer("stage1").output]
        ).predict(x, verbose=0)
        for model in (teacher, student)
    )
    expected = kl_divergence(p.astype("float64"), q).mean() + 3.0 * ((a - b) ** 2).mean()
    assert expected > 0.1

    predictions = keras.distillation.LogitsDistillation(temperature=1.0, loss=KLDivergence(4.0))
    features = keras.distillation.FeatureDistillation(
        loss=FeatureMeanSquaredError(), teacher_layer_name="stage1", student_layer_name="stage1"
    )
    distiller = keras.distillation.Distiller(
        teacher, student, [predictions, features], [1.0, 3.0], student_loss_weight=0.0
    )
    distiller.compile(keras.optimizers.SGD(0.1), loss=small.crossentropy())
    with small.eagerly():
        logs = distiller.train_on_batch(x, y, return_dict=True)
    assert float(logs["distillation_loss"]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="sizes are known elsewhere")
def test_unknown_sizes():
    import tensorflow as tf

    unknown = tf.TensorSpec([None, None, None, 3])
    a, b = normal(2, 6, 4, 3), normal(2, 3, 5, 3, seed=1)
    every = [FeatureMeanSquaredError(), AttentionTransfer(), CosineFeatures()]
    traced = tf.function(
        lambda *sides: [loss.call(*sides) for loss in every],
        input_signature=[unknown, unknown],
        autograph=False,
    )
    for other in (a, b):
        for loss, result in zip(every, traced(a, other), strict=True):
            np.testing.assert_allclose(result.numpy(), called(loss, a, other), 1e-4, 1e-6)
