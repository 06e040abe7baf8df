import json

import keras
import numpy as np
import pytest

import dskd_keras
from dskd_keras import weighting


def allocate(strategy, losses):
    losses = np.array(losses, "float32")
    return keras.ops.convert_to_numpy(weighting.get(strategy)(losses))


def test_by_hand():
    e = np.exp(1.0)
    np.testing.assert_allclose(allocate("softmax", [1.0, 0.0]), [e / (e + 1), 1 / (e + 1)], 1e-6)
    np.testing.assert_allclose(
        allocate(weighting.Softmax(0.5), [0.5, 0.0]), [e / (e + 1), 1 / (e + 1)], 1e-6
    )
    np.testing.assert_allclose(
        allocate("proportional", [1.0, 3.0, 0.0]), [0.25, 0.75, 0.0], 1e-6, 1e-30
    )
    np.testing.assert_allclose(
        allocate("inverse", [0.0, np.log(2.0), 0.0]), [0.375, 0.25, 0.375], 1e-6
    )
    np.testing.assert_allclose(allocate("uniform", [5.0, 1.0, 0.0, 0.0]), [0.25] * 4)


STRATEGIES = [*weighting.names(), weighting.Softmax(1e-3)]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize(
    "losses",
    [[0.0] * 3, [3e38] * 3, [3e38, 0.0, 1.0], [1e-38, 1e-38, 0.0], [-1e-8, 1e-8, 0.0]],
    ids=str,
)
def test_finite_losses_give_shares(strategy, losses):
    weights = allocate(strategy, losses)
    assert np.isfinite(weights).all() and (weights >= 0).all()
    assert weights.sum() == pytest.approx(1.0, rel=1e-5)
    if len(set(losses)) == 1:
        np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_special_losses(strategy):
    np.testing.assert_array_equal(allocate(strategy, [7.0]), [1.0])
    np.testing.assert_array_equal(allocate(strategy, [1.0, np.inf, 2.0]), [0.0, 1.0, 0.0])
    np.testing.assert_array_equal(allocate(strategy, [np.inf, 0.0, np.inf]), [0.5, 0.0, 0.5])


def test_larger_loss_larger_weight_except_inverse():
    for name in ("softmax", "proportional"):
        assert (np.diff(allocate(name, [1.0, 2.0, 3.0])) > 0).all()
    assert (np.diff(allocate("inverse", [1.0, 2.0, 3.0])) < 0).all()


def test_get():
    strategy = weighting.Softmax(2.0)
    assert weighting.get(strategy) is strategy
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(strategy)))
    again = weighting.get(config)
    assert isinstance(again, weighting.Softmax) and again.temperature == 2.0
    with pytest.raises(dskd_keras.InputError, match="Did you mean 'proportional'"):
        weighting.get("proportion")
    with pytest.raises(
        dskd_keras.InputError, match=r"^weighting: None should be one of softmax, prop"
    ):
        weighting.get(None)

    class Total(weighting.Weighting):
        def call(self, losses):
            return keras.ops.sum(losses)

    with pytest.raises(dskd_keras.InputError, match=r"^weighting: Total.call gives .*one weight a"):
        allocate(Total(), [1.0, 2.0])
    with pytest.raises(dskd_keras.InputError, match=r"weighting temperature: 0\.0 should be a pos"):
        weighting.Softmax(0.0)


def test_relative_measures_every_layer_by_its_own_past():
    strategy = weighting.Relative(momentum=0.9)
    past, weights = [], None
    for losses in ([8.0, 1.0], [4.0, 1.0], [4.0, 0.25]):
        past.append(losses)
        weights = allocate(strategy, losses)
        # The exponential mean of what was seen, whose weights sum to 1 from the first step on.
        shares = 0.9 ** np.arange(len(past))[::-1]
        relative = np.array(losses) / np.average(past, axis=0, weights=shares)
        np.testing.assert_allclose(weights, relative / relative.sum(), rtol=1e-5)
    # The second loss has fallen more of late; its size says nothing.
    assert weights[0] > weights[1]
    again = weighting.renamed(strategy, "again")
    assert again.momentum == 0.9
    np.testing.assert_allclose(allocate(again, [8.0, 1.0]), [0.5, 0.5], rtol=1e-6)
    with pytest.raises(dskd_keras.InputError, match=r"momentum: 1\.0 should be"):
        weighting.Relative(1.0)


def test_get_knows_all_names():
    for name in weighting.names():
        assert type(weighting.get(name)).__name__.lower() == name
