"""On PyTorch: a frozen model as a flat list of operations, traced once for each shape of a batch.

Keras on PyTorch goes through the layers one by one in every step. On a fast device this costs a
large model more than its convolutions do. It also copies feature maps between memory layouts before
and after every convolution, which PyTorch's convolutions don't need (docs/speed.md).
"""

import operator
import re
import textwrap
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

# The batches of a data set have two shapes, since the last batch is smaller. A user who has a new
# shape in every step should not wait for a new trace in every step.
SHAPES = 8
# A trace is used where its outputs differ from the model's by no more than the order of sums does.
TOLERANCE = 1e-3


class Traces(dict[Any, Callable[[Any], Any] | None]):
    """Traces by what they are made for; None where there can be none.

    Args:
        instead: What is done without one; a warning begins with it, once.
    """

    def __init__(self, instead: str) -> None:
        super().__init__()
        self._instead = instead
        self._warned = False

    @property
    def is_full(self) -> bool:
        """Whether no more are made."""
        return len(self) == SHAPES

    def obtain(
        self, key: Any, make: Callable[[], tuple[Callable[[Any], Any] | None, str]]
    ) -> Callable[[Any], Any] | None:
        """Returns the trace for a key; `make` returns a new one, or None and the reason."""
        if key not in self and self.is_full:
            self._warn(f"its batches have more than {SHAPES} shapes")
            return None
        if key not in self:
            self[key], reason = make()
            if reason:
                self._warn(reason)
        return self[key]

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._instead}, not as a trace: {reason}. This is slower and changes nothing "
                "else.",
                stacklevel=2,
            )


class Traced:
    """Calls a model in inference mode, through a trace where one can be made.

    A trace is checked against the model on the batch that it was made with. The model itself is
    called where it can't be traced, where its trace gives other outputs (because it draws random
    numbers, say), and for batches of a ninth shape. A warning says so, once. Weights are not
    copied: a trace sees them change.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._traces = Traces(f"The model '{model.name}' runs layer by layer")

    def __call__(self, x: Any) -> Any:
        """Returns the model's outputs for a batch."""
        import torch

        x = in_tensors(x)
        leaves = keras.tree.flatten(x)
        trace = None
        if traceable(leaves):
            trace = self._traces.obtain(shapes(leaves), lambda: _trace(self._model, x))
        if trace is None:
            return self._model(x, training=False)
        with torch.no_grad():
            return trace(x)


def in_tensors(x: Any) -> Any:
    """Returns a batch as tensors: `train_on_batch` hands on the arrays that the user gave."""
    return keras.tree.map_structure(
        lambda leaf: keras.ops.convert_to_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf, x
    )


def shapes(leaves: list[Any]) -> Any:
    """Returns what a trace of a call on these tensors is made for."""
    return tuple((tuple(leaf.shape), leaf.dtype, leaf.device) for leaf in leaves)


def traceable(leaves: list[Any]) -> bool:
    """Returns whether a model's call on these can be traced here."""
    import torch

    return all(isinstance(leaf, torch.Tensor) for leaf in leaves) and not (
        torch.compiler.is_compiling() or any(leaf.is_meta for leaf in leaves)
    )


def _trace(model: keras.Model, x: Any) -> tuple[Callable[[Any], Any] | None, str]:
    """Returns a function of a batch, or None and the reason why there is none."""
    import torch

    with torch.no_grad():
        expected = model(x, training=False)
        try:
            trace = record(lambda x: model(x, training=False), x)
            keep_layouts(trace)
            outputs = trace(x)
        except Exception as error:  # whatever a layer does that can't be traced
            return None, f"PyTorch can't trace it ({in_one_line(error)})"
    same = all(
        alike(a, b)
        for a, b in zip(keras.tree.flatten(expected), keras.tree.flatten(outputs), strict=True)
    )
    return (trace, "") if same else (None, "its trace gives other outputs, as random layers do")


def record(call: Callable[[Any], Any], x: Any) -> Any:
    """Returns a call as a graph of operations, without those that change what was just computed.

    Keras's normalisation by moving statistics does: `x.subtract(mean).mul_(…)`.
    """
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    trace = make_fx(call)(x)
    for node in trace.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable or not schema.name.endswith("_"):
            continue
        changed = node.args[0]
        made_by = getattr(changed.target, "_schema", None)
        is_new = made_by is not None and all(value.alias_info is None for value in made_by.returns)
        name = schema.name.removeprefix("aten::").removesuffix("_")
        other = getattr(torch.ops.aten, name, None)
        other = getattr(other, schema.overload_name or "default", None)
        if is_new and len(changed.users) == 1 and other is not None:
            names = [[argument.name for argument in s.arguments] for s in (schema, other._schema)]
            if names[0] == names[1]:
                node.target = other
    trace.recompile()
    return trace


def alike(a: Any, b: Any) -> bool:
    """Returns whether two tensors are the same but for the order of sums."""
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return bool((a == b).all())
    return bool((a - b).abs().max() <= TOLERANCE * a.abs().max())


def in_one_line(error: Exception) -> str:
    """Returns what is said of an error of Keras's or PyTorch's, cut where it is long."""
    # Keras's messages begin with the layer and have the reason in bold.
    lines = [line for line in re.sub(r"\x1b\[\d+m", "", str(error)).splitlines() if line.strip()]
    return textwrap.shorten(" ".join(lines[:2]), 200, placeholder=" …") or type(error).__name__


def changes_tensors(trace: Any) -> bool:
    """Returns whether an operation of a trace changes a tensor in place, or may do so."""
    operations = [node for node in trace.graph.nodes if node.op == "call_function"]
    return any(
        node.target is not operator.getitem
        and (getattr(node.target, "_schema", None) is None or node.target._schema.is_mutable)
        for node in operations
    )


def keep_layouts(trace: Any) -> None:
    """Takes the copies out of a trace that only change the memory layout."""
    import torch

    if changes_tensors(trace):
        return  # it may have been copied for that
    for node in [node for node in trace.graph.nodes if node.op == "call_function"]:
        if node.target is torch.ops.aten.clone.default:
            node.replace_all_uses_with(node.args[0])
            trace.graph.erase_node(node)
        elif node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default  # which copies where it has to
    trace.recompile()
