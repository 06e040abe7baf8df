"""On PyTorch: a frozen model as a flat list of operations, traced once for each shape of a batch.

There Keras goes through the layers one by one in every step, which costs a large model more than
its convolutions on a fast device, and copies feature maps between memory layouts on the way into
and out of every convolution, which PyTorch's convolutions don't need (docs/speed.md).
"""

import keras
import numpy as np

# Batches of a data set have two shapes, the last one being smaller. Whoever has a new one in every
# step is not to trace in every step.
_SHAPES = 8
# A trace is used where its outputs are those of the model, but for the order of sums.
_TOLERANCE = 1e-3


class Traced:
    """Calls a model in inference mode, through a trace where one can be made.

    A trace is checked against the model on the batch that it was made with. A model that can't be
    traced, or whose trace gives other outputs (because it draws random numbers, say), is called as
    it is. Weights are not copied: a trace sees them change.

    Args:
        model: A functional model.
    """

    def __init__(self, model):
        self._model = model
        self._traces = {}

    def __call__(self, x):
        """Returns the model's outputs for a batch."""
        import torch

        # Of `train_on_batch` the step gets the arrays that the user gave.
        x = keras.tree.map_structure(
            lambda leaf: (
                keras.ops.convert_to_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf
            ),
            x,
        )
        leaves = keras.tree.flatten(x)
        traceable = all(isinstance(leaf, torch.Tensor) for leaf in leaves) and not (
            torch.compiler.is_compiling() or any(leaf.is_meta for leaf in leaves)
        )
        if not traceable:
            return self._model(x, training=False)
        key = tuple((tuple(leaf.shape), leaf.dtype, leaf.device) for leaf in leaves)
        if key not in self._traces:
            if len(self._traces) == _SHAPES:
                return self._model(x, training=False)
            self._traces[key] = _trace(self._model, x)
        trace = self._traces[key]
        if trace is None:
            return self._model(x, training=False)
        with torch.no_grad():
            return trace(x)


def _trace(model, x):
    """Returns a function of a batch, None where that would not be the model's."""
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        expected = model(x, training=False)
        try:
            trace = make_fx(lambda x: model(x, training=False))(x)
            _keep_layouts(trace)
            outputs = trace(x)
        except Exception:
            # Whatever a layer does that can't be traced: the model itself can do it.
            return None
    same = all(
        a.shape == b.shape and bool((a - b).abs().max() <= _TOLERANCE * a.abs().max())
        for a, b in zip(keras.tree.flatten(expected), keras.tree.flatten(outputs), strict=True)
    )
    return trace if same else None


def _keep_layouts(trace):
    """Takes the copies out of a trace that only change the memory layout."""
    import torch

    operations = [node for node in trace.graph.nodes if node.op == "call_function"]
    if any(getattr(node.target, "_schema", None) is None or node.target._schema.is_mutable
           for node in operations):  # fmt: skip
        return  # what is changed in place may have been copied for that
    for node in operations:
        if node.target is torch.ops.aten.clone.default:
            node.replace_all_uses_with(node.args[0])
            trace.graph.erase_node(node)
        elif node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default  # which copies where it has to
    trace.recompile()
