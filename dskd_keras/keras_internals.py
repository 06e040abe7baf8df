"""The one place that reaches for what Keras keeps private.

Each function here says what the private name is needed for: Keras has no public way to it. The
tests in `tests/test_keras_internals.py` name the one that a new version of Keras has taken away.
"""

from typing import Any

import keras
import numpy as np

# Keras's private methods that classes of this package override, each with the class that does. They
# can't be reached through functions.
HOOKS: dict[str, str] = {
    # Updates all variables at once on PyTorch, where one after the other is slow. Where Keras does
    # not call it, `update_step` does the same.
    "keras.optimizers.Optimizer._backend_update_step": "dskd_keras.optimizers.SGD",
}

# A graph of layers. `layer.output`, the public way to a tensor, fails as soon as the layer was
# called in a second graph, and opening a nested model does that.


def producer(tensor: keras.KerasTensor) -> Any:
    """Returns the layer or operation that computes a symbolic tensor."""
    return tensor._keras_history.operation


def call_of(tensor: keras.KerasTensor) -> tuple[list[keras.KerasTensor], dict[str, Any]]:
    """Returns the tensors and the keyword arguments of the call that computed a tensor."""
    history = tensor._keras_history
    node = history.operation._inbound_nodes[history.node_index]
    return node.input_tensors, node.arguments.kwargs


def input_structure(model: keras.Model) -> Any:
    """Returns a model's symbolic inputs in the structure that it is called with.

    The public `model.inputs` is a flat list, where the caller's structure may be a dict.
    """
    inputs = getattr(model, "_inputs_struct", model.inputs)  # a Sequential has none
    return inputs[0] if isinstance(inputs, (list, tuple)) and len(inputs) == 1 else inputs


def output_structure(model: keras.Model) -> Any:
    """Returns a model's symbolic outputs in the structure that it returns."""
    return getattr(model, "_outputs_struct", model.outputs[0])  # a Sequential has none


def flat_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """Returns a model, then all layers in it: those of nested models and of wrappers too."""
    return model._flatten_layers()


# Training.


def metric_value(model: keras.Model, variable: keras.Variable) -> np.ndarray:
    """Returns the value of a metric's variable, between the steps of `fit` too.

    On JAX variables hold no values during `fit`: these are in the state that goes from step to
    step. Keras's public `jax_state_sync` puts all of them back, and here one is enough.
    """
    value: Any = variable
    if getattr(model, "_jax_state", None) and not model._jax_state_synced:
        index = [other is variable for other in model.metrics_variables].index(True)
        value = model._jax_state["metrics_variables"][index]
    return keras.ops.convert_to_numpy(value)


def decays(optimizer: keras.optimizers.Optimizer, variable: keras.Variable) -> bool:
    """Returns whether weight decay applies to a variable: that none of the exclusions names it."""
    return optimizer._use_weight_decay(variable)


def variable_index(optimizer: keras.optimizers.Optimizer, variable: keras.Variable) -> int:
    """Returns the place of a variable among those that the optimizer was built for."""
    return optimizer._get_variable_index(variable)
