"""Models that end in softmax or sigmoid: finding it, and taking it off."""

import dataclasses
import functools
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers

from dskd_keras import copying, graph
from dskd_keras.errors import InputError, unknown_name
from dskd_keras.keras_internals import (
    call_of,
    input_structure,
    output_index,
    output_structure,
    producer,
)

_HALF = ("float16", "bfloat16")

# Sizes that a model leaves open, in a batch that is made up: the second where the first is too
# small for it.
_SIZES = (8, 128)


@dataclasses.dataclass(frozen=True)
class Ending:
    """What a model's output ends in, where it gives no logits.

    Attributes:
        kind: `"softmax"`, `"sigmoid"`, `"log_softmax"` or `"log_sigmoid"`.
        layer: Name of the layer or operation that computes it, `outer/inner` in nested models.
        axis: The axis of a softmax or log_softmax, from the last (-1). None for the others.
        removable: Whether `as_logits` can take it off. Of an average of probabilities, say, it
            can't.
    """

    kind: str
    layer: str
    axis: int | None = None
    removable: bool = True


def ending(model: keras.Model, output: int = 0) -> Ending | None:
    """Returns what an output of a model ends in, as far as its graph says, without running it.

    Operations without weights between the last layer and the output are called on a few random
    numbers: what gives their softmax is one, whatever its name is. An average, a sum or another
    combination of probabilities counts as what they end in.

    Args:
        model: A functional or Sequential model.
        output: Index of the output, among the flattened ones.

    Returns:
        None where the output is computed as logits are, and where the graph can't say: in custom
        layers, say, and in models without a graph.
    """
    return _end(model.outputs[output], {}).ending if graph.has_graph(model) else None


def check_logits(field: str, model: keras.Model, output: int = 0) -> None:
    """Raises `InputError` where a model gives probabilities in place of logits.

    Where the graph can't say, one made-up batch is run in inference mode: random normal numbers,
    zeros for integers. Sizes that the model leaves open become 8, or 128 where the model can't be
    run with 8. Rows (last axis) that are non-negative and sum to one are probabilities then.
    Nothing is said of a model that takes strings or can't be run on such a batch.

    Args:
        field: The argument that held the model: `"teacher"` or `"student"`.
        model: A functional or Sequential model.
        output: Index of the output, among the flattened ones.
    """
    graph.check_graph(field, model)
    end = _end(model.outputs[output], {})
    if end.ending is None:
        if not end.sure and _gives_probabilities(model, output):
            raise InputError(
                f"{field}: '{model.name}' gives probabilities: rows that are non-negative and sum "
                f"to one, where logits are expected. End it before them: keras.Model({field}.input,"
                " logits), where logits is the tensor that they are computed from."
            )
    elif end.ending.removable:
        raise InputError(
            f"{field}: '{model.name}' ends in a {end.ending.kind} (layer '{end.ending.layer}'), "
            f"where logits are expected. Take dskd_keras.as_logits({field}), a copy with equal "
            "weights that ends in logits."
        )
    else:
        raise InputError(f"{field}: {_combined(model, end.ending)}")


def as_logits(model: keras.Model, output: int | str | None = None) -> keras.Model:
    """Returns the twin of a model that ends in softmax or sigmoid, with logits in their place.

    The last activation is left out, be it an argument of the last layer, a layer or an operation,
    in the model itself or in a nested one. What comes after it and changes no value in inference
    (`Identity`, `Dropout`) is left out too; `Reshape` and `Flatten` stay. An activation that the
    model uses elsewhere as well, stays there.

    Args:
        model: A functional or Sequential model, which is not changed.
        output: The output to give logits, where there are several: its index among the flattened
            ones, its key in a dict, or the name of the layer that gives it. Defaults to all that
            end in softmax, sigmoid or the logarithm of one.

    Returns:
        A functional model of the same name, inputs, structure of outputs, and flags `trainable`,
        not compiled. Its weights have the same values and are its own: training one model does not
        change the other. `model` itself where its outputs end in none of these.

    Raises:
        InputError: `model` has no graph of layers, or one that can't be made anew from its
            `get_config`; `output` is none of its outputs; or it gives probabilities that no last
            activation computes, such as an average of several softmaxes.

    Example:

    ```python
    teacher = dskd_keras.as_logits(keras.applications.MobileNetV2())
    distiller = dskd_keras.Distiller(teacher, dskd_keras.as_logits(student))
    ...
    # The trained student gives logits. To use it with probabilities:
    student = distiller.student
    student = keras.Model(student.input, keras.layers.Softmax()(student.output))
    ```
    """
    graph.check_graph("model", model)
    plan = _Plan()
    for index in _outputs(model, output):
        end = _end(model.outputs[index], {})
        if end.logits is not None:
            plan.add(model, index, end)
        elif end.ending is not None:
            raise InputError(f"model: {_combined(model, end.ending)}")
        elif not end.sure and _gives_probabilities(model, index):
            raise InputError(
                f"model: '{model.name}' gives probabilities: rows that are non-negative and sum to "
                "one. No softmax at its end can be taken off. End it before them: "
                "keras.Model(model.input, logits), where logits is the tensor that they are "
                "computed from."
            )
    return plan.carry_out(model) if plan.ends else model


def _combined(model: keras.Model, found: Ending) -> str:
    return (
        f"'{model.name}' gives what layer '{found.layer}' makes of the outputs of a {found.kind}, "
        "which can't be turned into logits. Build it from models or branches that give logits "
        "(dskd_keras.as_logits)."
    )


def _outputs(model: keras.Model, wanted: int | str | None) -> Collection[int]:
    """Returns the indices of the outputs that `as_logits` was asked for."""
    count = len(model.outputs)
    if wanted is None:
        return range(count)
    if isinstance(wanted, int) and 0 <= wanted < count:
        return (wanted,)
    paths = keras.tree.flatten_with_path(output_structure(model))
    keys = [path[0] if path else None for path, _ in paths]
    names = [producer(tensor).name for tensor in model.outputs]
    for known in (keys, names):
        if isinstance(wanted, str) and wanted in known:
            return [index for index, name in enumerate(known) if name == wanted]
    raise unknown_name("output", wanted, dict.fromkeys([*filter(None, keys), *names]))


class _End(NamedTuple):
    """What the graph says of a tensor: neither `ending` nor `sure` where it can't say."""

    ending: Any = None  # an `Ending`, where there is one
    sure: bool = False
    # The tensor with the logits: as it is, or, where there is a `linear`, once that layer or nested
    # model, which computes the tensor, gives logits.
    logits: keras.KerasTensor | None = None
    linear: Any = None
    # What changes the shape between it and the output.
    reshapes: tuple[Any, ...] = ()


_LOGITS, _UNKNOWN = _End(sure=True), _End()

# Keras's layers and operations, by their names. These keep the order of the values.
_RESHAPES = {"Reshape", "Flatten", "Squeeze", "ExpandDims"}
# These give probabilities of probabilities, logits of logits; and so do those with one of some
# words in their names.
_COMBINES = {
    *("Average", "Concatenate", "Maximum", "Minimum", "Stack"),
    *("Amax", "Max", "Mean", "AdaptiveAveragePool", "AveragePool", "MaxPool"),
    *("GetItem", "Permute", "Resize", "Resizing", "Transpose", *_RESHAPES),
}
_COMBINING = ("Pooling", "UpSampling", "Cropping", "ZeroPadding")
# These give logits of logits. What they give of probabilities is open, but a sum or product of
# several is no better than they are.
_LINEAR = {"Add", "Divide", "Multiply", "Negative", "Rescaling", "Subtract", "Sum", "TrueDivide"}


def _end(tensor: keras.KerasTensor, known: dict[int, _End]) -> _End:
    """Goes back from an output. `known` holds what has been found, by the tensor's id."""
    if id(tensor) not in known:
        known[id(tensor)] = _walk(tensor, known)
    return known[id(tensor)]


def _walk(tensor: keras.KerasTensor, known: dict[int, _End]) -> _End:
    # What is computed from `tensor` on, as functions of it: none where that is the identity.
    functions: list[Any] = []
    reshapes: list[Any] = []
    while True:
        operation, (inputs, arguments) = producer(tensor), call_of(tensor)
        if len(inputs) != 1 or getattr(operation, "weights", None):
            break
        (before,) = inputs
        if _keras_name(operation) in _RESHAPES and before.shape[-1] == tensor.shape[-1]:
            reshapes.insert(0, operation)
        elif _computes_values(operation) and tuple(before.shape) == tuple(tensor.shape):
            tried = [functools.partial(operation, **arguments), *functions]
            kind, axis = _kind(tried, before)
            if kind in _KINDS:
                return _ended(Ending(kind, operation.name, axis), before, None, reshapes)
            if kind is None and graph.has_graph(operation):
                break  # look into it
            functions = [] if kind == _IDENTITY else tried
        else:
            break
        tensor = before
    layer = _unwrapped(operation)
    # Nothing is known of other classes, and the activation of a recurrent layer is not its end.
    of_keras = bool(_keras_name(layer)) and not isinstance(layer, (keras.Model, layers.RNN))
    if hasattr(layer, "activation") and not isinstance(layer, layers.RNN):
        tried = [layer.activation, *functions]
        kind, axis = (_IDENTITY, None) if _is_linear(*tried) else _kind(tried, tensor)
        if kind in _KINDS:
            return _ended(Ending(kind, operation.name, axis), tensor, operation, reshapes)
        return _LOGITS if kind == _IDENTITY and of_keras else _UNKNOWN
    if functions:
        return _UNKNOWN
    if graph.has_graph(operation):
        return _inside(operation, tensor, reshapes)
    if getattr(layer, "weights", None):
        return _LOGITS if of_keras else _UNKNOWN
    return _combination(operation, inputs, known)


def _ended(found: Ending, logits: keras.KerasTensor, linear: Any, reshapes: list[Any]) -> _End:
    if reshapes and found.axis not in (None, -1):
        return _End(dataclasses.replace(found, removable=False), True)  # which axis is it now?
    return _End(found, True, logits, linear, tuple(reshapes))


def _inside(model: keras.Model, tensor: keras.KerasTensor, reshapes: list[Any]) -> _End:
    """Returns what a nested model says of a tensor that it computes."""
    end = _end(model.outputs[output_index(tensor)], {})
    if end.ending is None:
        return end
    found = dataclasses.replace(end.ending, layer=f"{model.name}/{end.ending.layer}")
    if end.logits is None:
        return end._replace(ending=found)
    return _ended(found, tensor, model, reshapes)


def _combination(operation: Any, inputs: list[keras.KerasTensor], known: dict[int, _End]) -> _End:
    """Returns what the inputs of a sum, an average, a pooling and so on say of it."""
    name, several = _keras_name(operation), len(inputs) > 1
    combines = _combines(name) or (several and name in ("Add", "Multiply"))
    if not inputs or not (combines or name in _LINEAR):
        return _UNKNOWN
    if several and name in ("Divide", "TrueDivide"):
        return _UNKNOWN  # exp(x) / sum(exp(x)), say
    endings = []
    for tensor in inputs:
        end = _end(tensor, known)
        if end.sure and end.ending is None:
            return _LOGITS
        endings.append(end.ending)
    found = endings[0]
    if found is None or None in endings or not combines:
        return _UNKNOWN
    return _End(dataclasses.replace(found, layer=operation.name, removable=False), True)


def _computes_values(operation: Any) -> bool:
    """Returns whether to ask what an operation computes, not what its inputs are."""
    name = _keras_name(operation)
    return not (_combines(name) or name in _LINEAR)


def _combines(name: str) -> bool:
    return name in _COMBINES or any(word in name for word in _COMBINING)


def _keras_name(operation: Any) -> str:
    """Returns the name of a class of Keras's own, of others none."""
    own = type(operation).__module__.partition(".")[0] == "keras"
    return type(operation).__name__ if own else ""


def _unwrapped(operation: Any) -> Any:
    """Returns the layer in Keras's wrappers, such as `TimeDistributed`."""
    while isinstance(operation, layers.Wrapper) and _keras_name(operation):
        operation = operation.layer
    return operation


def _is_linear(*functions: Any) -> bool:
    return functions in ((None,), (keras.activations.linear,))


_IDENTITY = "identity"
_KINDS = ("softmax", "sigmoid", "log_softmax", "log_sigmoid")


def _kind(functions: list[Any], tensor: keras.KerasTensor) -> tuple[str | None, int | None]:
    """Returns what functions, one after the other, compute of a tensor, and over which axis.

    It is one of `_KINDS`, the identity, or None for anything else.
    """
    shape, rng = tuple(tensor.shape), np.random.default_rng(0)
    if len(shape) < 2 or "float" not in tensor.dtype:
        return None, None
    # Two positions are enough, unless the functions know how many there are.
    few = (2, *(min(size or 2, 2) for size in shape[1:-1]), shape[-1] or 3)
    all_of_them = (2, *(size or 3 for size in shape[1:]))
    for sizes in (few, all_of_them):
        try:
            with keras.StatelessScope():  # leaves no trace in a layer
                x = keras.ops.convert_to_tensor(rng.normal(0, 2, sizes), dtype=tensor.dtype)
                y = x
                for function in functions:
                    y = function(y)
                x, dtype, y = _numbers(x), keras.backend.standardize_dtype(y.dtype), _numbers(y)
        except Exception:  # whatever a function raises that can't be called like this
            continue
        tolerance = 2e-2 if {dtype, tensor.dtype} & {*_HALF} else 1e-4
        for kind, axis, expected in _candidates(x):
            if y.shape == x.shape and np.allclose(y, expected, tolerance, tolerance):
                return kind, axis
        break
    return None, None


def _candidates(x: np.ndarray) -> Iterator[tuple[str, int | None, np.ndarray]]:
    yield _IDENTITY, None, x
    for axis in range(-1, -x.ndim, -1):
        yield "softmax", axis, _of_kind("softmax", axis, x)
    yield "log_softmax", -1, _of_kind("log_softmax", -1, x)
    for kind in ("sigmoid", "log_sigmoid"):
        yield kind, None, _of_kind(kind, None, x)


def _of_kind(kind: str, axis: int | None, x: np.ndarray) -> np.ndarray:
    """Returns what `kind` gives of logits."""
    if "sigmoid" in kind:
        log = -np.logaddexp(0, -x)
    else:
        log = x - np.logaddexp.reduce(x, axis=axis, keepdims=True)
    return log if kind.startswith("log") else np.exp(log)


def _numbers(x: Any) -> np.ndarray:
    return keras.ops.convert_to_numpy(x).astype("float64")


def _gives_probabilities(model: keras.Model, index: int) -> bool:
    """Returns whether an output's rows are such for a batch that is made up."""
    shape, dtype = model.outputs[index].shape, model.outputs[index].dtype
    if len(shape) < 2 or shape[-1] == 1 or "float" not in dtype:
        return False
    values = _run(model)
    if values is None or not values[index].size:
        return False
    sums, tolerance = values[index].sum(axis=-1), 1e-2 if dtype in _HALF else 1e-3
    return bool((values[index] >= 0).all() and (np.abs(sums - 1) < tolerance).all())


def _run(*models: keras.Model) -> Any:
    """Returns the outputs of a model, or of several, for one batch; None where that fails."""
    for size in _SIZES:
        rng = np.random.default_rng(0)
        made_up = []
        for tensor in models[0].inputs:
            if tensor.dtype == "string":
                return None
            shape = (tensor.shape[0] or 4, *(n or size for n in tensor.shape[1:]))
            values = rng.normal(0, 1, shape) if "float" in tensor.dtype else np.zeros(shape)
            made_up.append(keras.ops.convert_to_tensor(values, dtype=tensor.dtype))
        batch = keras.tree.pack_sequence_as(input_structure(models[0]), made_up)
        try:
            with keras.StatelessScope():  # leaves no trace in a model
                outputs = [keras.tree.flatten(model(batch, training=False)) for model in models]
            return [_numbers(output) for output in keras.tree.flatten(outputs)]
        except Exception:  # whatever a model raises that can't be run on such a batch
            continue
    return None


class _Plan:
    """What ends in logits in place of an activation, and the copies that are made for that."""

    def __init__(self) -> None:
        # By the ids of models: their outputs that are to be logits, by index.
        self.ends: dict[int, dict[int, _End]] = {}
        # The ids of the layers with an activation that are to be without it.
        self._activated: set[int] = set()
        # By the ids of layers and nested models: the layer and its copy.
        self._made: dict[int, tuple[Any, Any]] = {}
        # By the ids of copies that give logits: the activations of their outputs, by index.
        self._activations: dict[int, dict[int, layers.Layer]] = {}
        # By the ids of tensors that those computed: the logits, and the tensor itself.
        self._logits: dict[int, tuple[keras.KerasTensor, keras.KerasTensor]] = {}

    def add(self, model: keras.Model, index: int, end: _End) -> None:
        """Plans that an output gives logits."""
        self.ends.setdefault(id(model), {})[index] = end
        if graph.has_graph(end.linear):
            inner = output_index(end.logits)
            self.add(end.linear, inner, _end(end.linear.outputs[inner], {}))
        elif end.linear is not None:
            self._activated.add(id(end.linear))

    def carry_out(self, model: keras.Model) -> keras.Model:
        """Returns the twin of a model, with its weights and flags."""
        twin = self._twin(model)
        for layer, copy in self._made.values():
            if not graph.has_graph(layer):
                copying.copy_state(copy, layer)
        # From the outside in: a flag that is set reaches all layers within.
        for layer, copy in [(model, twin), *reversed(self._made.values())]:
            if copy.trainable != layer.trainable:
                copy.trainable = layer.trainable
        self._check(model, twin)
        return twin

    def _twin(self, model: keras.Model) -> keras.Model:
        ends = self.ends.get(id(model), {})
        cut = [ends[i].logits if i in ends else tensor for i, tensor in enumerate(model.outputs)]
        structure = keras.tree.pack_sequence_as(output_structure(model), cut)
        twin = graph.rebuild(
            keras.Model(input_structure(model), structure, name=model.name), self._copy, self._call
        )
        outputs, activations = list(twin.outputs), {}
        for index, end in ends.items():
            tensor, dtype = outputs[index], model.outputs[index].dtype
            if end.linear is not None:
                tensor, _ = self._logits[id(tensor)]
            for reshape in end.reshapes:
                tensor = self._copy(reshape)(tensor)
            if tensor.dtype != dtype:
                tensor = layers.Identity(dtype=dtype, name=f"{model.name}_logits_{index}")(tensor)
            outputs[index] = tensor
            activations[index] = _layer_of(end.ending, dtype, f"{model.name}_{index}_of_logits")
        if ends:
            structure = keras.tree.pack_sequence_as(output_structure(model), outputs)
            twin = keras.Model(input_structure(twin), structure, name=model.name)
            self._activations[id(twin)] = activations
        return twin

    def _copy(self, layer: Any) -> Any:
        if not isinstance(layer, layers.Layer):
            return layer  # an operation has no weights
        if id(layer) not in self._made:
            if graph.has_graph(layer):
                copy = self._twin(layer)
            elif id(layer) in self._activated:
                copy = copying.anew(layer, _make_linear)
                self._activations[id(copy)] = {
                    0: layers.Activation(
                        _unwrapped(layer).activation,
                        dtype=layer.dtype_policy,
                        name=f"{layer.name}_of_logits",
                    )
                }
            else:
                copy = copying.anew(layer)
            self._made[id(layer)] = layer, copy
        return self._made[id(layer)][1]

    def _call(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = layer(*args, **kwargs)
        flat = keras.tree.flatten(outputs)
        # Others than the model's output may need what it gave before. Where none does, the model
        # will be without it.
        for index, activation in self._activations.get(id(layer), {}).items():
            logits, flat[index] = flat[index], activation(flat[index])
            self._logits[id(flat[index])] = logits, flat[index]
        return keras.tree.pack_sequence_as(outputs, flat)

    def _check(self, model: keras.Model, twin: keras.Model) -> None:
        """Raises `InputError` where a layer that is not Keras's does more than its activation."""
        others = [
            layer
            for layer, _ in self._made.values()
            if id(layer) in self._activated and not _keras_name(layer)
        ]
        values = _run(model, twin) if others else None
        if values is None:
            return
        for index, end in self.ends[id(model)].items():
            found, given, logits = end.ending, values[index], values[len(model.outputs) + index]
            if not np.allclose(_of_kind(found.kind, found.axis, logits), given, 2e-2, 2e-2):
                raise InputError(
                    f"model: layer '{others[0].name}' ({type(others[0]).__name__}) has a "
                    f"{found.kind} as its activation, but does not end in it. Build the model so "
                    "that it gives logits."
                )


def _layer_of(found: Ending, dtype: str, name: str) -> layers.Layer:
    if found.kind == "softmax":
        return layers.Softmax(found.axis, dtype=dtype, name=name)
    return layers.Activation(found.kind, dtype=dtype, name=name)


def _make_linear(config: dict[str, Any]) -> None:
    """Changes the configuration of a layer, or of one in wrappers, to have no activation."""
    while "activation" not in config:
        if "layer" not in config:
            raise ValueError("it does not hold `activation`")
        config = config["layer"]["config"]
    config["activation"] = "linear"
