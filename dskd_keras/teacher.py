"""The frozen teacher, as the training step needs it."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from dskd_keras import graph
from dskd_keras.depthwise import as_products
from dskd_keras.errors import InputError, wrong
from dskd_keras.inputs import of_model
from dskd_keras.keras_internals import flat_layers, input_structure
from dskd_keras.tracing import Traced

# How many images an example for a function has.
_EXAMPLES = 2


class FrozenTeacher:
    """A teacher that is run and never changed: `model.trainable` becomes False.

    It gives its logits, where `predictions` are needed, and, where `features` are, the output of
    `layer`, by default of the last feature map before the pooling.

    It is no Keras layer on purpose. Keras would track a layer: it would enter every `save_weights`,
    `get_weights` and summary of the distiller, would be unfrozen by `distiller.trainable = True`,
    and would add its regularisation losses.

    Args:
        model: A functional or Sequential model.
        predictions: Whether its logits are needed.
        features: Whether its feature maps are.
        layer: The layer whose map is taken, or a list with one for each supervised layer.
        output: Which of its outputs are the logits, counted in flattened order.
        classes: Which of its classes are taken, in which order; all by default.
        inputs: A function or a functional model from the student's batch to the teacher's.

    Attributes:
        model: The model.
        layer: The layer that was chosen, or the list that was given; None without features.
        feature_names: The keys of the maps among the outputs: one for all supervised layers, or one
            for each.
        feature_shapes: The shapes of the maps by their keys, without the batch, channels last.
        output_names: The keys of the outputs that the terms need: `"features"`, `"logits"`. Beside
            them there are `"features_mask"` and `"logits_mask"` where positions are padding.
        variables: All variables that a call reads.
        supports_jit: Whether XLA can compile all of its layers.
    """

    layer: str | list[str] | None
    feature_shapes: dict[str, tuple[Any, ...]]

    def __init__(
        self,
        model: keras.Model,
        predictions: bool = True,
        features: bool = True,
        layer: str | Sequence[str] | None = None,
        output: int = 0,
        classes: Sequence[int] | None = None,
        inputs: Any = None,
    ) -> None:
        self.model = model
        model.trainable = False
        if features and layer is None:
            layer = graph.default_teacher_layer(model, output)
        names = [layer] if isinstance(layer, str) else list(layer or ())
        self.layer = layer if isinstance(layer, str) or layer is None else names
        outputs: dict[str, Any] = {}
        self.feature_names, self.feature_shapes = [], {}
        names = names if features else []
        # Without names, too: the mask of dense logits may be inside a nested model.
        tapped = graph.tap("teacher_layer", model, list(dict.fromkeys(names)))
        opened = tapped.model
        if features:
            maps = dict(zip(dict.fromkeys(names), zip(*tapped[1:], strict=True), strict=True))
            for name in names:
                key = "features" if isinstance(layer, str) else f"features/{name}"
                tensor, mask = maps[name]
                outputs[key] = _single_precision(graph.channels_last(tensor))
                if mask is not None:
                    outputs[f"{key}_mask"] = mask
                self.feature_names.append(key)
                self.feature_shapes[key] = tuple(outputs[key].shape[1:])
        if predictions:
            logits = opened.outputs[output]
            if len(logits.shape) > 2 and (mask := graph.mask_of(logits)) is not None:
                outputs["logits_mask"] = mask
            logits = _single_precision(logits)
            outputs["logits"] = logits if classes is None else ops.take(logits, classes, axis=-1)
        self._before = None
        self._graph = keras.Model(input_structure(opened), outputs, name=f"{model.name}_frozen")
        if graph.has_graph(inputs):
            self._graph = _behind(inputs, self._graph)
        elif inputs is not None:
            self._before = inputs
        self._traced = Traced(self._graph) if keras.backend.backend() == "torch" else None
        self.output_names = [name for name in outputs if not name.endswith("_mask")]
        self.variables = self._graph.variables
        self.supports_jit = all(
            getattr(layer, "supports_jit", True) for layer in flat_layers(self._graph)
        )

    @property
    def feature_shape(self) -> tuple[Any, ...]:
        """The shape of the (first) map without the batch, channels last; empty without features."""
        return self.feature_shapes[self.feature_names[0]] if self.feature_names else ()

    def __call__(self, x: Any, variables: list[Any] | None = None) -> dict[str, Any]:
        """Runs the teacher on a batch, with `variables` in place of its own values, if given.

        The outputs are in float32 (or float64) whatever the teacher's precision is: `"logits"`
        `[B, C]`, `"features"` `[B, H, W, D]`, `[B, T, D]` or `[B, D]`.
        """
        if self._before is not None:
            x = self._before(x)
        x = of_model("teacher_inputs" if self._before else "x", self._graph, x)
        if self._traced is not None:
            return self._traced(x)
        with as_products():
            if variables is None:
                return self._graph(x, training=False)
            outputs, _ = self._graph.stateless_call([], variables, x, training=False)
            return outputs

    def predict(
        self, x: Any, batch_size: int | None = None, verbose: str | int = 0
    ) -> dict[str, Any]:
        """Returns the same dict for all of `x`, computed in batches, as NumPy arrays."""
        if self._before is not None:
            return in_batches(self, x, batch_size)
        x = of_model("x", self._graph, x)
        return self._graph.predict(x, batch_size=batch_size, verbose=verbose)


class Teacher:
    """Any function of a batch as a teacher: a subclassed model, another framework's, a service.

    The function is run in the training step, before the student and outside of its gradients. On
    TensorFlow and JAX the step is compiled, so the function has to be made of what can be compiled
    there: Keras operations, or the backend's own. Of a `keras.Model` or layer, such as a subclassed
    model, the weights are read anew in every step, and it runs in inference mode. A function of
    yours that calls a model has to say so itself: `model(x, training=False)`. Without it dropout
    and batch normalisation may work as in training.

    A distiller with such a teacher can't be saved as a whole; its student and its weights can.

    Args:
        call: A function of a batch, as `fit` gets it (or `teacher_inputs` makes it), or a Keras
            model.
        logits: What of its result are the logits `[B, C]` (or `[B, T, C]`, `[B, H, W, C]`): a key,
            an index, or a function of the result. Defaults to the result itself, unless `features`
            is given.
        features: What of its result is the feature map, channels last. Defaults to none.
        example: A batch for finding the shapes. Defaults to zeros in the shape of the student's
            inputs, with sizes of 8 where they are unknown.

    Example:

    ```python
    teacher = dskd_keras.Teacher(model, logits="logits", features="last_hidden_state")
    distiller = dskd_keras.Distiller(teacher, student, student_layers=["block2"])
    ```
    """

    def __init__(
        self,
        call: Callable[[Any], Any],
        logits: Any = None,
        features: Any = None,
        example: Any = None,
    ) -> None:
        if not callable(call):
            raise wrong("teacher", call, "a function of a batch, or a Keras model")
        self.call = call
        self.logits = (lambda result: result) if logits is None and features is None else logits
        self.features = features
        self.example = example


class FunctionTeacher:
    """A `Teacher` in the place of a `FrozenTeacher`.

    Args:
        teacher: The teacher.
        student: The student, for the shapes of an example.
        predictions: Whether its logits are needed.
        features: Whether its feature map is.
        classes: As for `FrozenTeacher`.
        inputs: As for `FrozenTeacher`.
    """

    layer = None
    feature_shapes: dict[str, tuple[Any, ...]]

    def __init__(
        self,
        teacher: Teacher,
        student: keras.Model,
        predictions: bool,
        features: bool,
        classes: Sequence[int] | None = None,
        inputs: Any = None,
    ) -> None:
        self.model = teacher
        self._picks = {}
        if features:
            self._picks["features"] = _needed("features", teacher.features)
        if predictions:
            self._picks["logits"] = _needed("logits", teacher.logits)
        self._classes = classes
        self._before = inputs
        self._layer = teacher.call if isinstance(teacher.call, keras.layers.Layer) else None
        example = teacher.example
        if example is None:
            example = _example(student)
        shapes = {name: tuple(x.shape) for name, x in self.predict(example).items()}
        for name, shape in shapes.items():
            if len(shape) < 2:
                raise InputError(
                    f"teacher: its {name} have the shape {shape}, where [B, C] or a feature map "
                    "[B, ..., D] is expected."
                )
        self.classes = shapes["logits"][-1] if predictions else None
        self.feature_names = ["features"] if features else []
        # The sizes of an example are those of other batches, except where the student's vary.
        vary = any(None in x.shape[1:] for x in student.inputs)
        self.feature_shapes = {
            name: tuple(None if vary else size for size in shapes[name][1:-1]) + shapes[name][-1:]
            for name in self.feature_names
        }
        self.output_names = list(self._picks)
        self.supports_jit = getattr(self._layer, "supports_jit", True)

    @property
    def variables(self) -> list[keras.Variable]:
        """Those of a Keras model; a function's are not known."""
        return [] if self._layer is None else self._layer.variables

    @property
    def feature_shape(self) -> tuple[Any, ...]:
        """As in `FrozenTeacher`."""
        return self.feature_shapes["features"] if self.feature_names else ()

    def __call__(self, x: Any, variables: list[Any] | None = None) -> dict[str, Any]:
        """Runs the function on a batch, as `FrozenTeacher` does."""
        with _no_gradients():
            if self._before is not None:
                x = self._before(x)
            result = self._run(x, variables)
            outputs = {name: _picked(name, pick, result) for name, pick in self._picks.items()}
        if self._classes is not None and "logits" in outputs:
            outputs["logits"] = ops.take(outputs["logits"], self._classes, axis=-1)
        return {name: _single_precision(value) for name, value in outputs.items()}

    def _run(self, x: Any, variables: list[Any] | None) -> Any:
        if self._layer is None:
            return self.model.call(x)
        if variables is None:
            return self._layer(x, training=False)
        values = zip(self.variables, variables, strict=True)
        with keras.StatelessScope(state_mapping=list(values)):
            return self._layer(x, training=False)

    def predict(
        self, x: Any, batch_size: int | None = None, verbose: str | int = 0
    ) -> dict[str, Any]:
        """Returns the outputs for all of `x`, computed in batches, as NumPy arrays."""
        return in_batches(self, x, batch_size)


def in_batches(
    teacher: Callable[[Any], dict[str, Any]], x: Any, batch_size: int | None
) -> dict[str, Any]:
    """Returns a teacher's outputs for all of `x`, as NumPy arrays."""
    count, size = len(keras.tree.flatten(x)[0]), batch_size or 32
    parts = []
    for start in range(0, count, size):
        chosen = slice(start, start + size)
        part = keras.tree.map_structure(functools.partial(_part, chosen=chosen), x)
        parts.append({k: ops.convert_to_numpy(v) for k, v in teacher(part).items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _part(array: Any, chosen: slice) -> Any:
    return ops.convert_to_tensor(array[chosen])


def _behind(before: keras.Model, model: keras.Model) -> keras.Model:
    """Returns a model that gives a batch to one model and what comes out to another."""
    start = keras.tree.map_structure(
        lambda x: keras.Input(x.shape[1:], dtype=x.dtype, name=x.name),
        input_structure(before),
    )
    between = before(start)
    return keras.Model(start, model(of_model("teacher_inputs", model, between)), name=model.name)


def _needed(name: str, pick: Any) -> Any:
    if pick is None:
        terms = {
            "features": "deep_feature_weight or deep_prediction_weight",
            "logits": "prediction_weight or deep_prediction_weight",
        }
        raise InputError(
            f"teacher: dskd_keras.Teacher without {name}, which {terms[name]} needs. Say which "
            f"part of the result they are: {name}=KEY."
        )
    return pick


def _picked(name: str, pick: Any, result: Any) -> Any:
    if callable(pick):
        return pick(result)
    try:
        # The outputs of other libraries have attributes.
        is_item = isinstance(pick, int) or isinstance(result, dict)
        return result[pick] if is_item else getattr(result, pick)
    except (KeyError, IndexError, TypeError, AttributeError):
        known = list(result) if isinstance(result, dict) else type(result).__name__
        raise InputError(f"teacher: {name}={pick!r}, but its result holds {known}.") from None


def _example(student: keras.Model) -> Any:
    def zeros(x: keras.KerasTensor) -> Any:
        shape = [_EXAMPLES, *(8 if size is None else size for size in x.shape[1:])]
        return np.zeros(shape, "int32" if "int" in x.dtype else x.dtype)

    return keras.tree.map_structure(zeros, input_structure(student))


def _no_gradients() -> Any:
    """Returns a context in which PyTorch records nothing; the others differentiate a function."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


def _single_precision(tensor: Any) -> Any:
    half = keras.backend.standardize_dtype(tensor.dtype) in ("float16", "bfloat16")
    return ops.cast(tensor, "float32") if half else tensor
