"""Names the private part of Keras that a new version has taken away, or changed."""

import ast
import importlib
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

import dskd_keras
from dskd_keras import keras_internals

BACKEND = keras.backend.backend()
PACKAGE = Path(dskd_keras.__file__).parent
CASES = {}


def private(name, backend=BACKEND):
    """Registers the check of a private name, which counts on one backend or on all."""

    def register(check):
        marks = pytest.mark.skipif(backend != BACKEND, reason=f"{backend}'s alone")
        CASES[name] = pytest.param(name, check, id=name, marks=marks)
        return check

    return register


def two_ended():
    """A model with dicts of inputs and of outputs."""
    inputs = {name: keras.Input((3,), name=name) for name in ("a", "b")}
    x = layers.Add(name="sum")([inputs["a"], inputs["b"]])
    return keras.Model(inputs, {"twice": layers.Rescaling(2.0, name="twice")(x), "once": x})


@private("keras.KerasTensor._keras_history")
def keras_history():
    shared = layers.Dense(3)
    first = shared(keras.Input((3,)))
    assert keras_internals.producer(first) is keras_internals.producer(shared(first)) is shared


@private("keras.Operation._inbound_nodes")
def inbound_nodes():
    inputs = keras.Input((3,))
    norm = layers.BatchNormalization()
    first = norm(inputs)
    second = norm(first, training=True)
    for tensor, (source, training) in {first: (inputs, None), second: (first, True)}.items():
        (used,), arguments = keras_internals.call_of(tensor)
        assert used is source and arguments.get("training") is training
        (used,), arguments = keras_internals.arguments_of(tensor)
        assert used is source and arguments.get("training") is training
        assert keras_internals.outputs_of(tensor) == [tensor]
    assert [keras_internals.call_index(tensor) for tensor in (first, second)] == [0, 1]
    inner = two_ended()
    outputs = inner({name: keras.Input((3,)) for name in ("a", "b")})
    flat = [outputs[name] for name in ("once", "twice")]
    assert keras_internals.outputs_of(flat[0]) == flat
    assert [keras_internals.output_index(tensor) for tensor in flat] == [0, 1]
    (passed,), _ = keras_internals.arguments_of(flat[0])
    assert set(passed) == {"a", "b"}


@private("keras.KerasTensor._keras_mask")
def keras_mask():
    tokens = keras.Input((5,), dtype="int32")
    mask = keras_internals.symbolic_mask(layers.Embedding(9, 2, mask_zero=True)(tokens))
    assert mask.shape == (None, 5) and mask.dtype == "bool"
    assert keras_internals.symbolic_mask(layers.Embedding(9, 2)(tokens)) is None


@private("keras.Model._inputs_struct")
def inputs_struct():
    assert set(keras_internals.input_structure(two_ended())) == {"a", "b"}
    inputs = keras.Input((3,))
    outputs = layers.Dense(2)(inputs)
    assert keras_internals.input_structure(keras.Model([inputs], outputs)) is inputs


@private("keras.Model._outputs_struct")
def outputs_struct():
    outputs = keras_internals.output_structure(two_ended())
    assert {name: keras_internals.producer(x).name for name, x in outputs.items()} == {
        "twice": "twice",
        "once": "sum",
    }


@private("keras.Layer._flatten_layers")
def flatten_layers():
    inner = layers.Dense(2, name="inner")
    nested = keras.Sequential([keras.Input((4, 3)), layers.TimeDistributed(inner, name="wrapper")])
    model = keras.Sequential([keras.Input((4, 3)), nested])
    found = keras_internals.flat_layers(model)
    assert found[0] is model and {nested, inner} <= set(found)


@private("keras.Model._compile_loss")
def compile_loss():
    inputs = keras.Input((2,))
    outputs = [layers.Dense(1, kernel_regularizer="l2", name=name)(inputs) for name in ("a", "b")]
    model = keras.Model(inputs, outputs)
    model.compile("sgd", loss=["mse", "mae"], loss_weights=[1.0, 10.0])
    y, y_pred = [np.zeros((2, 1))] * 2, [np.full((2, 1), 3.0, "float32")] * 2
    # Without the layers' own losses.
    assert float(keras_internals.compiled_loss(model, y, y_pred, None)) == 9.0 + 30.0


def model_that_adds_losses():
    inputs = keras.Input((2,))
    inner = layers.Dense(1, activity_regularizer="l2", kernel_regularizer="l2")
    model = keras.Model(inputs, keras.Sequential([layers.Dense(1), inner])(inputs))
    model(np.ones((1, 2), "float32"))
    return model


@private("keras.layers.Layer._losses")
def losses():
    # The regularised weight's is none of a call.
    model = model_that_adds_losses()
    assert len(keras_internals.losses_of_calls(model)) == 1 and len(model.losses) == 2


@private("keras.layers.Layer._clear_losses")
def clear_losses():
    model = model_that_adds_losses()
    keras_internals.forget_losses_of_calls(model)
    assert not keras_internals.losses_of_calls(model) and len(model.losses) == 1


def values_in_fit(sync):
    """What a callback reads of a metric after each of two steps, and `_jax_state_synced` there."""
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    model.compile("sgd", "mse", metrics=[keras.metrics.MeanAbsoluteError(name="error")])
    found = []

    def read(batch, logs):
        if sync:
            model.jax_state_sync()
        count = next(v for v in model.metrics_variables if v.path.endswith("error/count"))
        value = keras_internals.metric_value(model, count)
        found.append((float(value), getattr(model, "_jax_state_synced", None)))

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=read)
    model.fit(np.ones((8, 2)), np.ones((8, 1)), batch_size=4, callbacks=[callback], verbose=0)
    return found


@private("keras.Model._jax_state", "jax")
def jax_state():
    assert values_in_fit(sync=False) == [(4.0, False), (8.0, False)]


@private("keras.Model._jax_state_synced", "jax")
def jax_state_synced():
    assert values_in_fit(sync=True) == [(4.0, True), (8.0, True)]


@private("keras.src.backend.jax.trainer.JAXEpochIterator._get_distributed_iterator", "jax")
def get_distributed_iterator():
    asked = []

    class Asked(keras.distribution.DataParallel):
        def get_data_layout(self, data_shape):
            asked.append(data_shape)
            return super().get_data_layout(data_shape)

    with Asked(devices=keras.distribution.list_devices()[:1]).scope():
        model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
        with keras_internals.layout_of_each_batch():
            model.predict(np.ones((5, 2)), batch_size=4, verbose=0)
    assert asked == [(4, 2), (1, 2)]


def built_optimizer():
    variables = [keras.Variable(np.ones(2), name=name) for name in ("kernel", "bias")]
    optimizer = dskd_keras.optimizers.SGD(1.0, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    optimizer.build(variables)
    return optimizer, variables


@private("keras.optimizers.Optimizer._use_weight_decay")
def use_weight_decay():
    optimizer, variables = built_optimizer()
    assert [keras_internals.decays(optimizer, v) for v in variables] == [True, False]


@private("keras.optimizers.Optimizer._get_variable_index")
def get_variable_index():
    optimizer, variables = built_optimizer()
    assert [keras_internals.variable_index(optimizer, v) for v in variables] == [0, 1]


@private("keras.optimizers.Optimizer._backend_update_step", "torch")
def backend_update_step():
    optimizer, variables = built_optimizer()
    calls = []
    optimizer._update_all = lambda *args: calls.append(args)
    optimizer.apply([keras.ops.zeros(2)] * 2, variables)
    assert len(calls) == 1, "Keras no longer calls it"


@pytest.mark.parametrize("name, check", CASES.values())
def test_what_is_used_of_keras_is_there(name, check):
    try:
        check()
    except Exception as error:
        pytest.fail(
            f"{name} has gone or changed in Keras {keras.__version__}: "
            f"{type(error).__name__}: {error}"
        )


def test_between_steps_a_metric_has_its_value():
    assert [value for value, _ in values_in_fit(sync=False)] == [4.0, 8.0]


def test_every_private_name_that_is_used_has_a_case():
    tree = ast.parse(Path(keras_internals.__file__).read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {  # getattr(model, "_name", …)
        node.args[1].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr"
    }
    used = {name for name in used if name.startswith("_")}
    used |= {hook.rpartition(".")[2] for hook in keras_internals.HOOKS}
    assert used == {name.rpartition(".")[2] for name in CASES}


def test_hooks_override_what_keras_has():
    for hook, overridden_by in keras_internals.HOOKS.items():
        owner, _, method = hook.rpartition(".")
        module, _, name = overridden_by.rpartition(".")
        cls = getattr(importlib.import_module(module), name)
        assert method in vars(cls)
        module, _, base = owner.rpartition(".")
        assert hasattr(getattr(importlib.import_module(module), base), method)


# Private names of other libraries than Keras.
ELSEWHERE = {
    "_asdict", "_replace",  # named tuples
    "_core", "_reconstruct",  # NumPy's, in torch_weights.py
    "_exit",  # Python's, of a process
    "_foreach_add", "_foreach_add_", "_foreach_mul", "_foreach_mul_", "_foreach_sub_",  # PyTorch's
    "_schema", "_unsafe_view",  # PyTorch's
}  # fmt: skip
# The search, which has an adapter of its own for KerasTuner and TensorFlow.
OWN_ADAPTER = PACKAGE / "tuning"


def sources():
    files = [path for path in PACKAGE.rglob("*.py") if OWN_ADAPTER not in path.parents]
    return [path for path in files if path.name != "keras_internals.py"]


@pytest.mark.once
@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_else_reaches_into_keras(path):
    tree = ast.parse(path.read_text())
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    # What the file makes itself: methods, functions, classes, and attributes that it assigns.
    own = {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
    own |= {getattr(node, "name", None) for node in ast.walk(tree)}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    own |= {hook.rpartition(".")[2] for hook in keras_internals.HOOKS}
    private = {
        f"{ast.unparse(node)} in line {node.lineno}"
        for node in attributes
        if node.attr.startswith("_")
        and not node.attr.startswith("__")
        and node.attr not in own | ELSEWHERE
    }
    assert not private
    imported = {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("keras.src")
    }
    assert not imported
