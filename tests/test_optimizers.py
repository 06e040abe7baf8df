"""The SGD of this package against PyTorch's, step by step, and inside Keras's training."""

import keras
import numpy as np
import pytest

from dskd_keras.errors import InputError
from dskd_keras.optimizers import SGD

SHAPES = [(), (5,), (4, 3), (2, 3, 3, 4)]
STEPS = 20
VARIANTS = [
    dict(momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    for momentum, nesterov in [(0.0, False), (0.9, False), (0.9, True)]
    for weight_decay in (0.0, 0.05)
]


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    values = [rng.standard_normal(shape).astype("float32") for shape in SHAPES]
    gradients = [
        [rng.standard_normal(shape).astype("float32") for shape in SHAPES] for _ in range(STEPS)
    ]
    return values, gradients


def apply(optimizer, variables, gradients):
    optimizer.apply([keras.ops.convert_to_tensor(g) for g in gradients], variables)


def keras_steps(optimizer, values, gradients):
    """The variables after each step."""
    variables = [keras.Variable(value, name=f"v{i}") for i, value in enumerate(values)]
    history = []
    for step in gradients:
        apply(optimizer, variables, step)
        history.append([keras.ops.convert_to_numpy(v).copy() for v in variables])
    return history


def torch_steps(learning_rates, values, gradients, clip=None, **arguments):
    torch = pytest.importorskip("torch")
    parameters = [torch.nn.Parameter(torch.tensor(value)) for value in values]
    optimizer = torch.optim.SGD(parameters, lr=learning_rates[0], **arguments)
    history = []
    for learning_rate, step in zip(learning_rates, gradients, strict=True):
        optimizer.param_groups[0]["lr"] = learning_rate
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = torch.tensor(gradient)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        history.append([parameter.detach().numpy().copy() for parameter in parameters])
    return history


def assert_same(found, expected, atol=1e-6):
    for step, (left, right) in enumerate(zip(found, expected, strict=True)):
        for a, b in zip(left, right, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=atol, err_msg=f"step {step}")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_equals_torch_under_a_schedule(variant):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([4, 11], [0.1, 0.02, 0.3])
    rates = [float(keras.ops.convert_to_numpy(schedule(step))) for step in range(STEPS)]
    assert len(set(rates)) == 3
    values, gradients = arrays()
    found = keras_steps(SGD(schedule, **variant), values, gradients)
    assert_same(found, torch_steps(rates, values, gradients, **variant))


def test_equals_torch_where_the_learning_rate_is_assigned():
    values, gradients = arrays(1)
    rates = [0.1 if step < 7 else 0.01 for step in range(STEPS)]
    optimizer = SGD(0.1, momentum=0.9, weight_decay=5e-4)
    variables = [keras.Variable(value) for value in values]
    found = []
    for rate, step in zip(rates, gradients, strict=True):
        optimizer.learning_rate = rate
        apply(optimizer, variables, step)
        found.append([keras.ops.convert_to_numpy(v).copy() for v in variables])
    assert_same(found, torch_steps(rates, values, gradients, momentum=0.9, weight_decay=5e-4))


def test_clips_before_the_decay_as_torch_does():
    values, gradients = arrays(2)
    arguments = dict(momentum=0.9, weight_decay=0.05)
    found = keras_steps(SGD(0.1, global_clipnorm=1.0, **arguments), values, gradients)
    expected = torch_steps([0.1] * STEPS, values, gradients, clip=1.0, **arguments)
    assert_same(found, expected, atol=1e-5)  # PyTorch adds 1e-6 to the norm


def test_decay_alone_leaves_what_pytorch_leaves():
    weight = keras.Variable(np.ones((1,), "float32"))
    optimizer = SGD(0.05, momentum=0.9, weight_decay=5e-4)
    zero = np.zeros((1,), "float32")
    for _ in range(400):
        apply(optimizer, [weight], [zero])
    expected, buffer = 1.0, 0.0
    for _ in range(400):
        buffer = 0.9 * buffer + 5e-4 * expected
        expected -= 0.05 * buffer
    left = keras.ops.convert_to_numpy(weight)[0]
    assert round(expected, 3) == 0.907
    np.testing.assert_allclose(left, expected, rtol=1e-5)


@pytest.mark.parametrize("by", ["list", "name"])
def test_excluded_variables_do_not_decay(by):
    kernel = keras.Variable(np.ones((2,), "float32"), name="kernel")
    gamma = keras.Variable(np.ones((2,), "float32"), name="gamma")
    optimizer = SGD(0.1, momentum=0.9, weight_decay=0.5)
    if by == "list":
        optimizer.exclude_from_weight_decay(var_list=[gamma])
    else:
        optimizer.exclude_from_weight_decay(var_names=["gamma", "beta"])
    apply(optimizer, [kernel, gamma], [np.zeros((2,), "float32")] * 2)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(kernel), 0.95)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(gamma), 1.0)
    with pytest.raises(InputError, match="before"):
        optimizer.exclude_from_weight_decay(var_names=["kernel"])


def test_accumulated_gradients_make_one_step_with_their_mean():
    values, gradients = arrays(3)
    gradients = gradients[:6]
    arguments = dict(momentum=0.9, nesterov=True, weight_decay=0.05)
    found = keras_steps(SGD(0.1, gradient_accumulation_steps=2, **arguments), values, gradients)
    pairs = zip(gradients[::2], gradients[1::2], strict=True)
    means = [[(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in pairs]
    expected = keras_steps(SGD(0.1, **arguments), values, means)
    assert_same(found[1::2], expected)
    assert_same(found[:1], [values])  # nothing moves before the second gradient


def regression(optimizer=None):
    """A linear model without a bias, whose gradient a test can write down."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, use_bias=False)])
    model.layers[0].set_weights([np.array([[1.0], [-1.0], [0.5]], "float32")])
    if optimizer is not None:
        model.compile(optimizer, "mean_squared_error")
    rng = np.random.default_rng(4)
    inputs = rng.standard_normal((8, 3)).astype("float32")
    return model, inputs, inputs @ np.array([[0.3], [0.6], [-1.0]], "float32")


def regression_in_numpy(inputs, targets, learning_rates, momentum, weight_decay):
    weight = np.array([[1.0], [-1.0], [0.5]])
    buffer = np.zeros_like(weight)
    for learning_rate in learning_rates:
        gradient = 2 * inputs.T @ (inputs @ weight - targets) / len(inputs)
        buffer = momentum * buffer + gradient + weight_decay * weight
        weight = weight - learning_rate * buffer
    return weight


def wrap(kind, optimizer):
    return keras.optimizers.LossScaleOptimizer(optimizer) if kind == "loss scale" else optimizer


@pytest.mark.parametrize("kind", ["plain", "loss scale"])
def test_fit_equals_numpy(kind):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([3], [0.1, 0.01])
    optimizer = wrap(kind, SGD(schedule, momentum=0.9, weight_decay=0.05))
    model, inputs, targets = regression(optimizer)
    model.fit(inputs, targets, batch_size=8, epochs=10, shuffle=False, verbose=0)
    expected = regression_in_numpy(inputs, targets, [0.1] * 4 + [0.01] * 6, 0.9, 0.05)
    np.testing.assert_allclose(model.get_weights()[0], expected, rtol=1e-5, atol=1e-6)


def test_fit_in_mixed_float16():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model, inputs, targets = regression()
        model.compile(SGD(0.1, momentum=0.9, weight_decay=0.05), "mean_squared_error")
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        # The default scale of 2**15 overflows float16 here, so that Keras skips the first steps.
        model.optimizer.initial_scale = 64.0
        model.fit(inputs, targets, batch_size=8, epochs=10, shuffle=False, verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    expected = regression_in_numpy(inputs, targets, [0.1] * 10, 0.9, 0.05)
    np.testing.assert_allclose(model.get_weights()[0], expected, atol=0.005)


def test_rows_that_an_embedding_does_not_use_decay_as_in_torch():
    model = keras.Sequential([keras.Input((1,), dtype="int32"), keras.layers.Embedding(3, 2)])
    model.layers[0].set_weights([np.ones((3, 2), "float32")])
    model.compile(SGD(0.1, momentum=0.9, weight_decay=0.5), "mean_squared_error")
    model.fit(np.zeros((2, 1), "int32"), np.ones((2, 1, 2)), verbose=0)
    np.testing.assert_allclose(model.get_weights()[0], 0.95, rtol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "loss scale"])
def test_a_saved_training_continues_where_it_stopped(kind, tmp_path):
    def train(model, epochs):
        model.fit(inputs, targets, batch_size=8, epochs=epochs, shuffle=False, verbose=0)

    optimizer = wrap(kind, SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.05))
    model, inputs, targets = regression(optimizer)
    train(model, 3)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    inner = getattr(loaded.optimizer, "inner_optimizer", loaded.optimizer)
    assert type(inner).__module__ == "dskd_keras.optimizers"
    train(model, 3)
    train(loaded, 3)
    np.testing.assert_allclose(loaded.get_weights()[0], model.get_weights()[0], rtol=1e-6)


def test_configuration_survives_a_round_trip():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 100)
    optimizer = SGD(
        schedule,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
        global_clipnorm=2.0,
        gradient_accumulation_steps=4,
        name="student_sgd",
    )
    serialized = keras.optimizers.serialize(optimizer)
    assert serialized["registered_name"] == "dskd_keras>SGD"
    rebuilt = keras.optimizers.deserialize(serialized)
    assert isinstance(rebuilt, SGD)
    assert rebuilt.get_config() == optimizer.get_config()
    config = rebuilt.get_config()
    assert (config["weight_decay"], config["momentum"], config["nesterov"]) == (5e-4, 0.9, True)
    assert rebuilt.coupled_weight_decay == 5e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(learning_rate=-0.1), r"^learning_rate: -0\.1 should be a number of at least 0\.$"),
        (dict(learning_rate="fast"), r"^learning_rate: 'fast' should be"),
        (dict(momentum=1.0), r"^momentum: 1\.0 should be a number of at least 0 and below 1\.$"),
        (dict(momentum=-0.1), r"^momentum: -0\.1"),
        (dict(momentum=float("nan")), r"^momentum: nan"),
        (dict(nesterov=True), r"^nesterov: True, but momentum is 0"),
        (dict(weight_decay=-1e-4), r"^weight_decay: -0\.0001 should be a number of at least 0\.$"),
        (dict(weight_decay=None), r"^weight_decay: None"),
        (dict(weight_decay=float("inf")), r"^weight_decay: inf"),
    ],
)
def test_unusable_settings_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        SGD(**arguments)
