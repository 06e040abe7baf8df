"""The frozen teacher, as the training step needs it."""

from typing import Any

import keras

from dskd_keras import graph
from dskd_keras.keras_internals import input_structure
from dskd_keras.tracing import Traced


class FrozenTeacher:
    """A teacher that is run and never changed: `model.trainable` becomes False.

    It gives its logits, where `predictions` are needed, and, where `features` are, the output of
    `layer`, by default of the last feature map before the pooling.

    It is no Keras layer on purpose. Keras would track a layer: it would enter every `save_weights`,
    `get_weights` and summary of the distiller, would be unfrozen by `distiller.trainable = True`,
    and would add its regularisation losses.
    """

    model: keras.Model
    feature_shape: tuple[int, ...]  # without the batch, channels last; empty without features
    output_names: list[str]  # the keys of the outputs: "features", "logits"
    variables: list[keras.Variable]

    def __init__(
        self,
        model: keras.Model,
        predictions: bool = True,
        features: bool = True,
        layer: str | None = None,
    ) -> None:
        self.model = model
        model.trainable = False
        opened, outputs, self.feature_shape = model, {}, ()
        if features:
            if layer is None:
                tensor = graph.last_feature_map(model)
            else:
                opened, (tensor,) = graph.tap("teacher_layer", model, [layer])
            outputs["features"] = _single_precision(graph.channels_last(tensor))
            self.feature_shape = tuple(outputs["features"].shape[1:])
        if predictions:
            outputs["logits"] = _single_precision(opened.outputs[0])
        self._graph = keras.Model(input_structure(opened), outputs, name=f"{model.name}_frozen")
        self._traced = Traced(self._graph) if keras.backend.backend() == "torch" else None
        self.output_names = list(outputs)
        self.variables = self._graph.variables

    def __call__(self, x: Any, variables: list[Any] | None = None) -> dict[str, Any]:
        """Runs the teacher on a batch, with `variables` in place of its own values, if given.

        The outputs are in float32 (or float64) whatever the teacher's precision is: `"logits"`
        `[B, C]`, `"features"` `[B, H, W, D]`, `[B, T, D]` or `[B, D]`.
        """
        if self._traced is not None:
            return self._traced(x)
        if variables is None:
            return self._graph(x, training=False)
        outputs, _ = self._graph.stateless_call([], variables, x, training=False)
        return outputs

    def predict(
        self, x: Any, batch_size: int | None = None, verbose: str | int = 0
    ) -> dict[str, Any]:
        """Returns the same dict for all of `x`, computed in batches, as NumPy arrays."""
        return self._graph.predict(x, batch_size=batch_size, verbose=verbose)


def _single_precision(tensor: keras.KerasTensor) -> keras.KerasTensor:
    half = tensor.dtype in ("float16", "bfloat16")
    return keras.ops.cast(tensor, "float32") if half else tensor
