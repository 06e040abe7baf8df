"""The one place that reaches for what Keras keeps private.

Each function here says what the private name is needed for: Keras has no public way to it. The
tests in `tests/test_keras_internals.py` name the one that a new version of Keras has taken away.
"""

import contextlib
from collections.abc import Iterator
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


def call_index(tensor: keras.KerasTensor) -> int:
    """Returns the number of the call that computed a tensor, among all calls of the layer."""
    return tensor._keras_history.node_index


def output_index(tensor: keras.KerasTensor) -> int:
    """Returns the place of a tensor among all that were computed with it, `outputs_of` it."""
    return tensor._keras_history.tensor_index


def outputs_of(tensor: keras.KerasTensor) -> list[keras.KerasTensor]:
    """Returns all tensors that the call gave that computed a tensor, in flattened order."""
    history = tensor._keras_history
    return history.operation._inbound_nodes[history.node_index].outputs


def arguments_of(tensor: keras.KerasTensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of the call that computed a tensor, in their structure."""
    history = tensor._keras_history
    arguments = history.operation._inbound_nodes[history.node_index].arguments
    return arguments.args, arguments.kwargs


def symbolic_mask(tensor: keras.KerasTensor) -> keras.KerasTensor | None:
    """Returns the mask that Keras has attached to a symbolic tensor, if any.

    A layer that masks, such as `Embedding(mask_zero=True)`, attaches one. Keras shows it to the
    layers that are called with the tensor, and to nobody else.
    """
    mask = getattr(tensor, "_keras_mask", None)
    return mask if isinstance(mask, keras.KerasTensor) else None


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


@contextlib.contextmanager
def values_kept(model: keras.Model) -> Iterator[None]:
    """A context in which an error leaves the variables of a JAX model their values.

    Keras takes them out of the variables for `fit`, `evaluate` and `predict`, and puts them back at
    the end. After an error it doesn't: what is read then are new initial values, without a word.
    """
    if keras.backend.backend() != "jax":
        yield
        return
    before = getattr(model, "_jax_state", None)
    variables = [*model.trainable_variables, *model.non_trainable_variables]
    variables += model.metrics_variables
    variables += getattr(getattr(model, "optimizer", None), "variables", [])
    values = [variable.value for variable in variables]
    try:
        yield
    except BaseException:
        state = getattr(model, "_jax_state", None)
        if state is not None and state is not before:
            model.jax_state_sync()  # a step was done
        else:
            for variable, value in zip(variables, values, strict=True):
                if not value.is_deleted():
                    variable.assign(value)
        raise


@contextlib.contextmanager
def layout_of_each_batch() -> Iterator[None]:
    """A context in which JAX's `fit`, `evaluate` and `predict` ask for the layout of each batch.

    Keras asks a distribution for the layout of the first batch and takes it for all of them; a
    smaller last batch, which may not divide among the devices, can't be laid out that way. Arrays
    that are spread over the devices already stay as they are.
    """
    import jax
    from keras.src.backend.jax import trainer

    def placed(array: Any, distribution: Any) -> Any:
        if array is None or isinstance(array, jax.Array):
            return array
        layout = distribution.get_data_layout(array.shape).backend_layout
        return jax.make_array_from_callback(array.shape, layout, lambda index: array[index])

    def iterator(self: Any, distribution: Any) -> Iterator[Any]:
        for batch in self.data_adapter.get_jax_iterator():
            yield keras.tree.map_structure(lambda array: placed(array, distribution), batch)

    before = trainer.JAXEpochIterator._get_distributed_iterator
    trainer.JAXEpochIterator._get_distributed_iterator = iterator
    try:
        yield
    finally:
        trainer.JAXEpochIterator._get_distributed_iterator = before


def publish(key: str, text: str) -> None:
    """Lets all processes of `jax.distributed` read a text.

    It is JAX that keeps this way to itself. Its public ways between processes are steps of a
    program, which all of them run at once; one that has nothing to do yet would time out.
    """
    from jax._src import distributed

    distributed.global_state.client.key_value_set(key, text)


def published(key: str) -> str:
    """Returns the text that another process publishes, after waiting for it for a year at most."""
    from jax._src import distributed

    return distributed.global_state.client.blocking_key_value_get(key, 365 * 24 * 3600 * 1000)


def compiled_loss(model: keras.Model, y: Any, y_pred: Any, sample_weight: Any) -> Any:
    """Returns what `compile(loss=...)` asks for of all outputs, a scalar.

    The public `compute_loss` adds the losses of layers, such as regularisers.
    """
    return model._compile_loss(y, y_pred, sample_weight)


def losses_of_calls(model: keras.Model) -> list[Any]:
    """Returns what layers have added by `add_loss` and activity regularisers in the last call.

    The public `losses` has those of regularised weights too.
    """
    return [loss for layer in model._flatten_layers() for loss in layer._losses]


def forget_losses_of_calls(model: keras.Model) -> None:
    """Takes back what `losses_of_calls` returns, as Keras does when a model is called again."""
    model._clear_losses()


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
