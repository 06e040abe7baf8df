import json

import keras
import numpy as np
import pytest

import dskd_keras
from dskd_keras.losses import FeatureMeanSquaredError, KLDivergence


def value(loss, *args, **kwargs):
    return float(keras.ops.convert_to_numpy(loss(*args, **kwargs)))


def test_kl_divergence_by_hand():
    # softmax([ln 3, 0]) = [3/4, 1/4] against [1/2, 1/2].
    teacher, student = np.array([[np.log(3.0), 0.0]], "float32"), np.zeros((1, 2), "float32")
    expected = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    assert value(KLDivergence(1.0), teacher, student) == pytest.approx(expected, rel=1e-6)
    # At temperature 2 the logits [2 ln 3, 0] soften to the same distribution, times τ².
    assert value(KLDivergence(2.0), 2 * teacher, student) == pytest.approx(4 * expected, rel=1e-6)
    assert value(KLDivergence(), teacher, teacher) == pytest.approx(0.0, abs=1e-6)


def test_kl_divergence_stays_finite_for_huge_logits():
    teacher = np.array([[1e4, -1e4, 0.0]], "float32")
    result = value(KLDivergence(1.0), teacher, -teacher)
    assert result == pytest.approx(2e4)


def test_kl_divergence_weighs_images():
    rng = np.random.default_rng(0)
    p, q = rng.standard_normal((2, 4, 5)).astype("float32")
    single = [value(KLDivergence(), p[i : i + 1], q[i : i + 1]) for i in range(4)]
    weights = np.array([0.0, 1.0, 2.0, 0.5], "float32")
    expected = (weights * single).sum() / 4
    assert value(KLDivergence(), p, q, sample_weight=weights) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(4, 4, 4, 3), (4, 6, 3), (4, 5)])
def test_feature_loss_is_one_value_an_image(shape):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, *shape)).astype("float32")
    loss = FeatureMeanSquaredError()
    per_image = ((a - b) ** 2).reshape(len(a), -1).mean(axis=1)
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(loss.call(*map(keras.ops.convert_to_tensor, (a, b)))),
        per_image,
        rtol=1e-5,
    )
    # As many images as columns: a plain MeanSquaredError would weigh the columns here.
    weights = np.array([0.0, 1.0, 2.0, 3.0], "float32")
    assert value(loss, a, b, sample_weight=weights) == pytest.approx(
        (weights * per_image).sum() / 4, rel=1e-5
    )


def test_feature_loss_pools_the_teachers_larger_map():
    teacher = np.arange(16, dtype="float32").reshape(1, 4, 4, 1)
    student = np.zeros((1, 2, 2, 1), "float32")
    pooled = np.array([2.5, 4.5, 10.5, 12.5])
    result = value(FeatureMeanSquaredError(), teacher, student)
    assert result == pytest.approx((pooled**2).mean())
    # Sizes that don't divide: windows of two that overlap, as in PyTorch's adaptive pooling.
    teacher = np.array([[[1.0], [2.0], [4.0]]], "float32")
    result = value(FeatureMeanSquaredError(), teacher, np.zeros((1, 2, 1), "float32"))
    assert result == pytest.approx((1.5**2 + 3.0**2) / 2)


def test_feature_loss_compares_unlike_maps_by_their_means():
    teacher = np.ones((2, 3, 3, 4), "float32")
    teacher[0] *= 3.0
    assert value(FeatureMeanSquaredError(), teacher, np.ones((2, 7, 4), "float32")) == 2.0


@pytest.mark.parametrize("temperature", [0, -1.0, float("inf"), "4", None, True])
def test_bad_temperature(temperature):
    with pytest.raises(dskd_keras.InputError, match=r"^temperature: .* should be a positive"):
        KLDivergence(temperature)


@pytest.mark.parametrize("loss", [KLDivergence(2.5, reduction="sum"), FeatureMeanSquaredError()])
def test_round_trip(loss):
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(loss)))
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is type(loss) and again.get_config() == loss.get_config()
