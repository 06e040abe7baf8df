"""On PyTorch: a model's call in training as a flat list of operations, with its gradients.

As for a frozen model (`tracing`), and for the same reason. Here weights change, statistics of batch
normalisations are kept, and layers may have a memory.
"""

from collections.abc import Callable
from typing import Any

import keras

from dskd_keras import keras_internals
from dskd_keras.fused_normalization import fused
from dskd_keras.tracing import (
    TOLERANCE,
    Traces,
    alike,
    changes_tensors,
    in_one_line,
    in_tensors,
    keep_layouts,
    record,
    shapes,
    traceable,
)

# A trace takes as long as many steps do. A batch's shape gets one when it has come so often.
AFTER = 20
_Call = Callable[[Any], Any]


class TracedTraining:
    """Calls a model with `training=True`, through a trace where one can be made.

    A trace is checked by its outputs, its gradients and the statistics that it leaves, on the batch
    that it was made with. The model itself is called where that fails, and for layers that draw
    random numbers, count, or add losses. A warning says so, once.

    Attributes:
        after: How often a shape of batches has to come before it gets a trace; 0 traces at once.
            Traced steps round differently, so a run that is to be resumed to the same bits sets it
            to 0 or to infinity whenever it begins.
    """

    def __init__(self, model: keras.Model) -> None:
        self.after: float = AFTER
        self._model = model
        self._layers = keras_internals.flat_layers(model)
        self._seen: dict[Any, int] = {}
        self._traces = Traces(f"The student '{model.name}' trains layer by layer")

    def __call__(self, x: Any) -> Any:
        """Returns the model's outputs in training for a batch."""
        import torch

        x = in_tensors(x)
        leaves = keras.tree.flatten(x)
        trace = None
        if torch.is_grad_enabled() and traceable(leaves):
            trace = self._trace_for(x, leaves)
        return self._by_layers(x) if trace is None else trace(x)

    def _by_layers(self, x: Any) -> Any:
        with fused():
            return self._model(x, training=True)

    def _trace_for(self, x: Any, leaves: list[Any]) -> _Call | None:
        # A layer that is frozen later computes something else.
        key = shapes(leaves), tuple(layer.trainable for layer in self._layers)
        if key not in self._traces and not self._traces.is_full:
            self._seen[key] = self._seen.get(key, -1) + 1
            if self._seen[key] < self.after:
                return None
        return self._traces.obtain(key, lambda: _trace(self._model, x))


def _trace(model: keras.Model, x: Any) -> tuple[_Call | None, str]:
    """Returns a function of a batch, or None and the reason why there is none."""
    import torch

    kept = [(variable, variable.value.detach().clone()) for variable in _memory(model)]
    updates: list[tuple[keras.Variable, Any]] = []
    structure: Any = None

    def call(x: Any) -> list[Any]:
        nonlocal structure
        updates.clear()
        with fused(lambda *update: updates.append(update)):
            structure = model(x, training=True)
        return [*keras.tree.flatten(structure), *(value for _, value in updates)]

    # Neither a layer's memory nor PyTorch's random numbers are to be other than after one call.
    with torch.random.fork_rng():
        try:
            expected = call(x)
            if any(getattr(value, "_keras_mask", None) is not None for value in expected):
                return None, "its outputs have masks"
            if keras_internals.losses_of_calls(model):
                return None, "its layers add losses"
            count, variables = len(expected) - len(updates), [variable for variable, _ in updates]
            trace = record(call, x)
            if changes_tensors(trace):
                return None, "its layers have a memory"
            keep_layouts(trace)
            trace.graph.eliminate_dead_code()
            trace.recompile()
            outputs = trace(x)
            same = all(alike(a, b) for a, b in zip(expected, outputs, strict=True))
            if not same or not _same_gradients(model, expected[:count], outputs[:count]):
                return None, "its trace gives other numbers"
        except Exception as error:  # whatever a layer does that can't be traced
            return None, f"PyTorch can't trace it ({in_one_line(error)})"
        finally:
            keras_internals.forget_losses_of_calls(model)
            for variable, value in kept:
                variable.assign(value)

    def run(x: Any) -> Any:
        outputs = trace(x)
        with torch.no_grad():
            for variable, value in zip(variables, outputs[count:], strict=True):
                variable.assign(value)
        return keras.tree.pack_sequence_as(structure, outputs[:count])

    # Only the form is needed, and not the graph of gradients that hangs on it.
    structure = keras.tree.map_structure(lambda _: 0, structure)
    return run, ""


def _memory(model: keras.Model) -> list[keras.Variable]:
    """Returns what a call may change: statistics, and the states of random generators."""
    trainable = {id(variable) for variable in model.trainable_variables}
    return [variable for variable in model.variables if id(variable) not in trainable]


def _same_gradients(model: keras.Model, expected: list[Any], outputs: list[Any]) -> bool:
    import torch

    parameters = [variable.value for variable in model.trainable_variables]
    if not parameters:
        return True
    generator = torch.Generator().manual_seed(0)
    directions = [
        torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
        for value in expected
    ]

    def gradients(values: list[Any]) -> list[Any]:
        used = [(v, d) for v, d in zip(values, directions, strict=True) if v.requires_grad]
        found = torch.autograd.grad(
            [value for value, _ in used],
            parameters,
            [direction for _, direction in used],
            allow_unused=True,
            retain_graph=True,
        )
        return list(found)

    pairs = list(zip(gradients(expected), gradients(outputs), strict=True))
    if any((a is None) != (b is None) for a, b in pairs):
        return False
    there = [(a, b) for a, b in pairs if a is not None]
    # Of all together: what a normalisation takes away again has gradients of rounding alone.
    largest = max(float(a.abs().max()) for a, _ in there)
    return all(float((a - b).abs().max()) <= TOLERANCE * largest for a, b in there)
