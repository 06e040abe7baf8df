import functools
import itertools

import hypothesis
import keras
import numpy as np
import pytest
import small
from hypothesis import strategies as st

import dskd_keras
from dskd_keras import maps

BACKEND = keras.backend.backend()

# The same examples in every run.
SETTINGS = hypothesis.settings(derandomize=True, database=None, deadline=None, max_examples=25)


def compiled(function):
    """The function as one program where the backend has such."""
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function, autograph=False)
    return function


def arrays(results):
    """Tensors as arrays; None stays."""
    return keras.tree.map_structure(
        lambda x: None if x is None else keras.ops.convert_to_numpy(x), results
    )


def tensors(*values):
    return [None if value is None else keras.ops.convert_to_tensor(value) for value in values]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def masks(*shape, seed=0):
    """Half of the positions; none of the last image."""
    mask = np.random.default_rng(seed).random(shape) < 0.5
    mask[-1] = False
    return mask


def window(i, size, out):
    """PyTorch's window i of an axis; the nearest position where there are more windows."""
    if out > size:
        return slice(i * size // out, i * size // out + 1)
    return slice(i * size // out, -(-(i + 1) * size // out))


def reference(x, sizes, weights=None):
    """The averages over windows, one by one, and where anything was valid."""
    own = x.shape[1:-1]
    weights = np.ones(x.shape[:-1]) if weights is None else weights.astype("float64")
    found = np.zeros((len(x), *sizes, x.shape[-1]))
    valid = np.zeros((len(x), *sizes), "bool")
    for image, *index in itertools.product(range(len(x)), *map(range, sizes)):
        inside = (image, *map(window, index, own, sizes))
        share = weights[inside]
        if share.sum() > 0:
            values = np.where(share[..., None] > 0, x[inside], 0.0) * share[..., None]
            found[(image, *index)] = values.reshape(-1, x.shape[-1]).sum(axis=0) / share.sum()
            valid[(image, *index)] = True
    return found, valid


# 7 and 14 are sizes that Keras's own pooling gets wrong on JAX, 1 on TensorFlow.
RESIZED = [
    ((5,), (3,)),
    ((14,), (7,)),
    ((5, 6), (1, 3)),
    ((15, 4), (7, 4)),
    ((3, 5), (4, 2)),
    ((2, 3), (5, 6)),
    ((3, 4, 5), (2, 4, 1)),
    ((4, 2, 3), (2, 4, 3)),
]


@pytest.mark.parametrize(("own", "sizes"), RESIZED, ids=str)
def test_resized_against_a_loop(own, sizes):
    x, mask = normal(3, *own, 2), masks(3, *own)
    weights = mask * np.random.default_rng(1).random(mask.shape).astype("float32")

    @compiled
    def every(x, mask, weights):
        plain, nothing = maps.resized(x, sizes)
        assert nothing is None
        return plain, maps.resized(x, sizes, mask), maps.resized(x, sizes, weights)

    plain, (masked, valid), (weighted, valid_by_weight) = arrays(every(*tensors(x, mask, weights)))
    np.testing.assert_allclose(plain, reference(x, sizes)[0], rtol=1e-4, atol=1e-6)
    expected, expected_valid = reference(x, sizes, mask)
    assert 0 < expected_valid.sum() < expected_valid.size
    np.testing.assert_allclose(masked, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(valid, expected_valid)
    np.testing.assert_allclose(weighted, reference(x, sizes, weights)[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(valid_by_weight, expected_valid)


def test_where_keras_pools_rightly_its_bits_are_kept():
    def pool(x):
        return keras.ops.adaptive_average_pool(x, (4, 2), data_format="channels_last")

    (x,) = tensors(normal(2, 7, 5, 3))
    np.testing.assert_array_equal(
        arrays(compiled(lambda x: maps.resized(x, (4, 2))[0])(x)), arrays(compiled(pool)(x))
    )
    assert maps.resized(x, (7, 5))[0] is x


@pytest.mark.parametrize("positions", [(), (5,), (3, 4)], ids=str)
def test_mean_over_positions(positions):
    x, mask = normal(3, *positions, 2), masks(3, *positions)
    plain, masked = arrays(
        compiled(lambda x, m: (maps.mean_over_positions(x), maps.mean_over_positions(x, m)))(
            *tensors(x, mask)
        )
    )
    axes = tuple(range(1, len(x.shape) - 1))
    np.testing.assert_allclose(plain, x.mean(axis=axes), rtol=1e-5, atol=1e-6)
    rows = [x[i][mask[i]].reshape(-1, 2) for i in range(3)]
    expected = [row.mean(axis=0) if len(row) else np.zeros(2) for row in rows]
    np.testing.assert_allclose(masked, expected, rtol=1e-5, atol=1e-6)


def test_gradients_where_a_window_has_no_valid_position():
    mask = np.array([[True, True, False, False, False]])

    class Shifted(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.shift = self.add_weight(shape=(1, 5, 1), initializer="zeros")

        def call(self, x):
            return x + self.shift

    def loss(_, x):
        pooled, _ = maps.resized(x, (2,), mask)
        return pooled + keras.ops.expand_dims(maps.mean_over_positions(x, mask & False), 1)

    inputs = keras.Input(batch_shape=(1, 5, 1))
    layer = Shifted()
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.SGD(1.0), loss=loss)
    x = np.array([[1.0, 2.0, np.nan, 4.0, 5.0]], "float32")[..., None]
    with small.eagerly():
        model.train_on_batch(x, np.zeros_like(x))
    # The mean over two windows, of which the second, from position 2 on, has nothing valid.
    np.testing.assert_allclose(
        -arrays(layer.shift.value).ravel(), [0.25, 0.25, 0.0, 0.0, 0.0], rtol=1e-6
    )


def test_aligned():
    a, b = tensors(normal(2, 6, 3, 2), normal(2, 4, 5, 7))
    mask_a, mask_b = masks(2, 6, 3), masks(2, 4, 5, seed=1)

    @compiled
    def every(a, b, mask_a, mask_b):
        return [
            maps.aligned(a, b)[:2],
            maps.aligned(a, b, mask_a, mask_b),
            maps.aligned(a, b, mask_a),
            maps.aligned(a, b, None, mask_b),
        ]

    (left, right), both, first, second = arrays(every(a, b, *tensors(mask_a, mask_b)))
    a, b = arrays((a, b))
    np.testing.assert_allclose(left, reference(a, (4, 3))[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(right, reference(b, (4, 3))[0], rtol=1e-4, atol=1e-6)
    (masked_a, valid_a), (masked_b, valid_b) = (
        reference(x, (4, 3), mask) for x, mask in ((a, mask_a), (b, mask_b))
    )
    assert (valid_a != valid_b).any()
    np.testing.assert_allclose(both[0], masked_a, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(both[1], masked_b, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(both[2], valid_a & valid_b)
    np.testing.assert_array_equal(first[2], valid_a)
    np.testing.assert_array_equal(second[2], valid_b)


def test_maps_of_different_ranks_become_means():
    image, sequence, vector = tensors(normal(2, 3, 4, 5), normal(2, 6, 5), normal(2, 5))
    mask = np.array([[True] * 2 + [False] * 4, [True] * 6])
    left, right, none = maps.aligned(image, sequence, mask_b=mask)
    assert none is None
    np.testing.assert_allclose(arrays(left), arrays(image).mean(axis=(1, 2)), rtol=1e-5, atol=1e-6)
    expected = [arrays(sequence)[0, :2].mean(axis=0), arrays(sequence)[1].mean(axis=0)]
    np.testing.assert_allclose(arrays(right), expected, rtol=1e-5, atol=1e-6)
    left, right, none = maps.aligned(image, vector)
    assert none is None and right is vector and tuple(left.shape) == (2, 5)


def test_sizes():
    a, b, c = tensors(normal(2, 3, 4, 5), normal(2, 3, 4, 1), normal(2, 4, 3, 5))
    assert maps.sizes(a) == (3, 4) and maps.sizes(tensors(normal(2, 5))[0]) == ()
    assert maps.equal_sizes(a, b) is True
    assert maps.equal_sizes(a, c) is False
    assert maps.equal_sizes(a, a[:, 0]) is False


def test_wrong_inputs():
    (x,) = tensors(normal(2, 3, 4, 5))
    with pytest.raises(dskd_keras.InputError, match=r"^sizes: \(3,\) should have .*\(2, 3, 4, 5\)"):
        maps.resized(x, (3,))
    for mask in (np.ones((2, 4, 3)), np.ones((2, 3))):
        with pytest.raises(dskd_keras.InputError, match=r"^mask: .* should be \(2, 3, 4\), one"):
            maps.resized(x, (1, 1), mask)
        with pytest.raises(dskd_keras.InputError, match=r"^mask: .* should be \(2, 3, 4\), one"):
            maps.mean_over_positions(x, mask)


shapes = st.lists(st.integers(1, 6), max_size=3)


@pytest.mark.skipif(BACKEND == "jax", reason="JAX would compile each shape")
@SETTINGS
@hypothesis.given(shapes, shapes, st.booleans(), st.booleans(), st.integers(0, 9))
def test_any_two_maps_align(own, other, masked_a, masked_b, seed):
    a, b = normal(2, *own, 3, seed=seed), normal(2, *other, 2, seed=seed)
    mask_a = masks(2, *own, seed=seed) if masked_a else None
    mask_b = masks(2, *other, seed=seed + 1) if masked_b else None

    def aligned(padding):
        sides = [
            x if mask is None else np.where(mask[..., None], x, np.float32(padding))
            for x, mask in ((a, mask_a), (b, mask_b))
        ]
        return arrays(maps.aligned(*tensors(*sides, mask_a, mask_b)))

    left, right, mask = aligned(0.0)
    alike = len(own) == len(other)
    common = [min(sizes) for sizes in zip(own, other, strict=True)] if alike else []
    assert left.shape == (2, *common, 3) and right.shape == (2, *common, 2)
    if alike and (masked_a or masked_b):
        expected = True
        for x, given_mask in ((a, mask_a), (b, mask_b)):
            if given_mask is not None:
                expected = expected & reference(x, common, given_mask)[1]
        np.testing.assert_array_equal(mask, expected)
    else:
        assert mask is None
    # Averages stay between the smallest and the largest of what they are of, or are zero.
    assert left.max() <= max(a.max(), 0) + 1e-5 and left.min() >= min(a.min(), 0) - 1e-5
    # What stands at positions that are not valid never matters.
    for padding in (1e30, np.nan):
        again = aligned(padding)
        np.testing.assert_array_equal(again[0], left)
        np.testing.assert_array_equal(again[1], right)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="sizes are known elsewhere")
@pytest.mark.parametrize("own", [(5,), (5, 6), (3, 4, 5)], ids=str)
def test_unknown_sizes(own):
    import tensorflow as tf

    unknown = [None] * (len(own) + 1)
    known = (3, *own[1:])  # the student's map, known along the first axis alone
    seen = []

    @functools.partial(
        tf.function,
        autograph=False,
        jit_compile=len(own) == 2,  # XLA needs each size once the shapes are known
        input_signature=[
            tf.TensorSpec([*unknown, 2]),
            tf.TensorSpec([None, 3, *unknown[2:], 4]),
            tf.TensorSpec(unknown, "bool"),
        ],
    )
    def align(a, b, mask):
        seen.append(maps.equal_sizes(a, b))
        plain = maps.aligned(a, b)[:2]
        return plain, maps.aligned(a, b, mask), maps.mean_over_positions(a, mask)

    for sizes in (known, own, tuple(size + 2 for size in own)):
        a, b, mask = normal(2, *sizes, 2), normal(2, *known, 4), masks(2, *sizes)
        common = tuple(map(min, sizes, known))
        (left, right), (masked, _, valid), mean = arrays(align(a, b, mask))
        np.testing.assert_allclose(left, reference(a, common)[0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(right, reference(b, common)[0], rtol=1e-4, atol=1e-6)
        expected, expected_valid = reference(a, common, mask)
        np.testing.assert_allclose(masked, expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(valid, expected_valid)
        np.testing.assert_allclose(
            mean, reference(a, (1,) * len(own), mask)[0].reshape(2, 2), rtol=1e-4, atol=1e-6
        )
    assert {*seen} == {None}
